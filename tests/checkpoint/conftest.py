from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_mup.checkpoint import writing as writing_module
from tests.checkpoint.held_writers import Gate
from tests.checkpoint.malicious import Marker


@pytest.fixture
def marker(tmp_path: Path) -> Iterator[Marker]:
    marker = Marker(tmp_path / "was-run")
    yield marker
    assert not marker.path.exists()


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    """A gate in front of every writer of this test."""
    gate = Gate(*os.pipe())
    monkeypatch.setattr(writing_module, "write_now", gate.write)
    yield gate
    os.close(gate.reading)
    os.close(gate.writing)
