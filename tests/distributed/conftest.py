"""The cells of the equality matrix, each trained once per test session."""

from __future__ import annotations

import json
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_mup.training.processes import Launch, parallel_processes
from tests.configurations import tiny
from tests.distributed.cells import LAYOUTS, MUTATIONS, PAIRS, Layout, file_name, overrides
from tests.distributed.spawn import run_ranks
from tests.distributed.worker import Weights, run_cell


@dataclass(frozen=True)
class Cell:
    """One rank's initial weights and report."""

    weights: Weights
    report: dict[str, Any]


class Reference:
    """Models on one rank, in this process; each trained when first asked for."""

    def __init__(self) -> None:
        self._cells: dict[tuple[str, int], Cell] = {}

    def __call__(self, model: str, layers: int) -> Cell:
        """The cell of a model of a depth."""
        if (model, layers) not in self._cells:
            run = tiny(*overrides(model, Layout(1, layers=layers)))
            with parallel_processes(run, Launch()):
                masked = model.startswith("masked")
                self._cells[model, layers] = Cell(*run_cell(run, Launch(), masked=masked))
        return self._cells[model, layers]


class Matrix:
    """Results of the spawned ranks."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def ranks(self, model: str, layout: str, mutation: str | None = None) -> list[Cell]:
        """A cell's results, one for each rank."""
        cells = []
        for rank in range(LAYOUTS[layout].ranks):
            stem = f"{file_name(model, layout, mutation)}.rank{rank}"
            folder = self._folder / f"{LAYOUTS[layout].ranks}"
            with np.load(folder / f"{stem}.npz") as stored:
                weights = dict(stored)
            cells.append(Cell(weights, json.loads((folder / f"{stem}.json").read_text())))
        return cells


def _job(ranks: int) -> list[dict[str, Any]]:
    """Layouts of a number of ranks with their cells, for the worker."""
    pairs = [(model, layout, None) for model, layout in PAIRS]
    defects = [(model, layout, name) for name, (model, layout) in MUTATIONS.items()]
    cells = [cell for cell in pairs + defects if LAYOUTS[cell[1]].ranks == ranks]
    by_layout = sorted(cells, key=lambda cell: list(LAYOUTS).index(cell[1]))
    return [
        {
            "patches": LAYOUTS[layout].patches,
            "cells": [
                {
                    "name": file_name(model, layout, mutation),
                    "overrides": overrides(model, LAYOUTS[layout]),
                    "mutation": [mutation] if mutation else [],
                    "masked": model.startswith("masked"),
                }
                for model, _, mutation in group
            ],
        }
        for layout, group in groupby(by_layout, key=lambda cell: cell[1])
    ]


@pytest.fixture(scope="session")
def reference() -> Reference:
    """The models on one rank."""
    return Reference()


@pytest.fixture(scope="session")
def matrix(tmp_path_factory: pytest.TempPathFactory) -> Matrix:
    """All cells: one job of two ranks and one of four."""
    root = tmp_path_factory.mktemp("matrix")
    for ranks in (2, 4):
        folder = root / f"{ranks}"
        folder.mkdir()
        job = {"world_size": ranks, "layouts": _job(ranks)}
        run_ranks("tests.distributed.worker", job, folder, timeout=400)
    return Matrix(root)
