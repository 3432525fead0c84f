"""``megatron-mup sweep config``: a cell as a configuration that ``megatron-mup train`` takes."""

from __future__ import annotations

import json

import yaml

from megatron_mup.config_io import config_to_dict
from megatron_mup.errors import ConfigError
from megatron_mup.transfer.sweep.cells import Cell, make_cells
from megatron_mup.transfer.sweep.folder import SweepFolder

SHORTEST = 4
"""Hex digits that name a cell."""


def cell_yaml(folder: SweepFolder, cell: str) -> str:
    """The YAML of one cell, whether it has run or not.

    Args:
        folder: of the sweep.
        cell: its id, or the beginning of it.

    Returns:
        A training configuration that gives the losses of the cell's row.

    Raises:
        ConfigError: no cell begins so, or several do.
    """
    sweep = folder.read_sweep()
    cells = {item.id: item for item in make_cells(sweep, folder.data)}
    # Cells of an earlier YAML are on record with their configurations alone.
    recorded = {path.stem for path in folder.config("x").parent.glob("*.json")}
    name = _only_one(cell, sorted(recorded | set(cells)))
    if name in cells:
        canonical = cells[name].canonical
    else:
        canonical = folder.config(name).read_text(encoding="utf-8")
    sections = json.loads(canonical)
    sections["data"] |= _data_paths(next(iter(cells.values())))
    header = f"# Cell {name} of the sweep {sweep.name}.\n"
    return header + yaml.safe_dump(sections, sort_keys=True)


def _only_one(cell: str, names: list[str]) -> str:
    found = [name for name in names if name.startswith(cell)] if len(cell) >= SHORTEST else []
    if len(found) != 1:
        what = f"cells {', '.join(found[:5])} begin" if found else "no cell of the sweep begins"
        raise ConfigError(
            f"{what} with '{cell}'; give the id in the column 'cell' of runs.csv, at least "
            f"{SHORTEST} digits of it"
        )
    return found[0]


def _data_paths(cell: Cell) -> dict[str, object]:
    data = config_to_dict(cell.run)["data"]
    return {key: data[key] for key in data if key.endswith("_path") and data[key]}
