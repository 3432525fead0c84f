from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.convert.layouts import train_on_layouts
from tests.convert.small_checkpoints import MakeCheckpoint, save_small


@pytest.fixture(scope="session")
def checkpoint_of(tmp_path_factory: pytest.TempPathFactory) -> MakeCheckpoint:
    """Small checkpoints by their overrides; to be read only."""
    made: dict[tuple[str | int, ...], Path] = {}

    def make(*overrides: str, steps: int = 0) -> Path:
        key = (*overrides, steps)
        if key not in made:
            made[key] = save_small(tmp_path_factory.mktemp("run"), *overrides, steps=steps)
        return made[key]

    return make


@pytest.fixture(scope="session")
def layouts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints of four ranks; see ``tests.convert.layouts``."""
    return train_on_layouts(tmp_path_factory.mktemp("layouts"))


@pytest.fixture
def own_modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers copies remote code into a folder of the user's: here into the test's."""
    cache = str(tmp_path / "modules")
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", cache)
    monkeypatch.syspath_prepend(cache)
    # A package remembers the folder that it was imported from, another test's.
    for name in [name for name in sys.modules if name.split(".")[0] == "transformers_modules"]:
        monkeypatch.delitem(sys.modules, name)
