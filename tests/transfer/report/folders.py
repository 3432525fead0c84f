"""Folders of sweeps that nobody ran."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from megatron_mup.transfer.runs import Row, append_row
from megatron_mup.transfer.sweep.folder import SweepFolder
from tests.transfer.sweep.sweeps import cells_of, row_of, sweep_of

TEN: dict[str, Any] = {"learning_rate": {"log2": [-8, -7, -6, -5, -4]}, "seeds": [1]}
TWENTY: dict[str, Any] = {**TEN, "tokens": {"rule": "fixed_tokens", "tokens": 1200}}


def rows_of_cells(options: Mapping[str, Any], *, level: float = 3.0, **changes: Any) -> list[Row]:
    """A finished run of each cell."""
    return [
        row_of(cell, level + 0.05 * (cell.log2_lr + 6) ** 2, **changes)
        for cell in cells_of(**options)
    ]


def folder_of(path: Path, options: Mapping[str, Any], rows: Iterable[Row]) -> Path:
    """A folder with the YAML and the table."""
    SweepFolder(path).write_sweep(sweep_of(**options))
    for row in rows:
        append_row(path / "runs.csv", row)
    return path
