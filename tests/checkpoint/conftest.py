from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.checkpoint.malicious import Marker


@pytest.fixture
def marker(tmp_path: Path) -> Iterator[Marker]:
    marker = Marker(tmp_path / "was-run")
    yield marker
    assert not marker.path.exists()
