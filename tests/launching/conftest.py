"""What every test of the launch steps may ask for."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.launching.run_folders import write_config


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """A configuration as a user writes it, without a learning rate."""
    return write_config(tmp_path)
