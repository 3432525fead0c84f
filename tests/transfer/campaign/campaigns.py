"""A small campaign, and rows of its proxies that nobody ran."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from megatron_mup.transfer.campaign.spec import Campaign, load_campaign
from megatron_mup.transfer.runs import Row
from megatron_mup.transfer.sweep.cells import Cell
from tests.transfer.sweep.sweeps import SWEEP, row_of, sweep_data

WIDTHS = [32, 64, 128]
RATES = [-9, -8, -7, -6, -5, -4, -3]

TARGET: dict[str, Any] = {
    "model": {**SWEEP["base"]["model"], "hidden_size": 512, "num_attention_heads": 32},
    "parameterization": SWEEP["base"]["parameterization"],
    # As the sweep: 600 tokens in batches of 4 x 16, a quarter of it warmup.
    "training": {"global_batch_size": 4, "micro_batch_size": 2, "train_iters": 10},
    "schedule": {"lr_warmup_iters": 2},
    "data": SWEEP["base"]["data"],
}


def target_data(**changes: Any) -> dict[str, Any]:
    """The target with some options replaced, given as ``section__option``."""
    data = copy.deepcopy(TARGET)
    for name, value in changes.items():
        section, _, option = name.partition("__")
        data.setdefault(section, {})[option] = value
    return data


def campaign_data(**changes: Any) -> dict[str, Any]:
    """The campaign with some top-level keys replaced; None removes one."""
    sweep = sweep_data(
        scale={"axis": "width", "values": WIDTHS},
        learning_rate={"log2": RATES},
        seeds=[1, 2, 3],
        arms={"mup": {}, "sp": {"parameterization.name": "sp"}},
    )
    data = {"name": "small", "sweep": sweep, "arm": "mup", "target": {"config": "target.yaml"}}
    data |= changes
    return {key: value for key, value in data.items() if value is not None}


def write_campaign(folder: Path, config: dict[str, Any] | None = None, /, **changes: Any) -> Path:
    """The campaign's YAML and the target's configuration beside it."""
    (folder / "target.yaml").write_text(yaml.safe_dump(config or TARGET))
    path = folder / "campaign.yaml"
    path.write_text(yaml.safe_dump(campaign_data(**changes)))
    return path


def campaign_of(folder: Path, config: dict[str, Any] | None = None, /, **changes: Any) -> Campaign:
    return load_campaign(write_campaign(folder, config, **changes))


def loss_with(*, at: float = -6.0, shift: float = 0.0) -> Callable[[float, float], float]:
    """2 + 4 n^-1/4 + 0.05 (x - x*)^2, where x* is ``at`` at width 32 and shifts per doubling."""

    def loss(width: float, log2_lr: float) -> float:
        best = at + shift * math.log2(width / 32)
        return 2 + 4 * width**-0.25 + 0.05 * (log2_lr - best) ** 2

    return loss


def rows_of(
    cells: Sequence[Cell], loss: Callable[[float, float], float], *, noise: float = 0.003
) -> list[Row]:
    """Rows of cells at a loss, each with a little noise of its own.

    Args:
        cells: of the sweep.
        loss: of width and log2 LR.
        noise: standard deviation, nats.
    """
    random = np.random.default_rng(5)
    return [
        row_of(cell, loss(cell.size, cell.log2_lr) + float(random.normal(0, noise)))
        for cell in cells
    ]
