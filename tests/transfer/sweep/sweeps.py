"""Small sweeps that several tests start from."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import yaml

from megatron_mup.transfer.runs import Row, Status
from megatron_mup.transfer.sweep.cells import Cell, make_cells
from megatron_mup.transfer.sweep.spec import Sweep, sweep_from_dict
from tests.data.written_shards import write_shard
from tests.transfer.report.sample_rows import a_row

SWEEP: dict[str, Any] = {
    "name": "tiny",
    "base": {
        "model": {
            "num_layers": 1,
            "hidden_size": 32,
            "num_attention_heads": 2,
            "vocab_size": 96,
            "make_vocab_size_divisible_by": 32,
            "seq_length": 16,
        },
        "parameterization": {
            "base_hidden_size": 32,
            "base_ffn_hidden_size": 128,
            "base_kv_channels": 16,
            "base_num_layers": 1,
        },
        "training": {"global_batch_size": 4, "micro_batch_size": 4},
        "data": {"train_data_path": ["shards/train"], "valid_data_path": ["shards/valid"]},
    },
    "scale": {"axis": "width", "values": [32, 64]},
    "learning_rate": {"log2": [-7, -5]},
    "seeds": [1, 2],
    "tokens": {"rule": "fixed_tokens", "tokens": 600},
    "warmup_fraction": 0.25,
    "run": {"eval_tokens": 100},
}
"""Two widths, two rates, two seeds: eight cells of ten steps."""


def sweep_data(**changes: Any) -> dict[str, Any]:
    """The tiny sweep with some top-level keys replaced; None removes one."""
    data = copy.deepcopy(SWEEP) | changes
    return {key: value for key, value in data.items() if value is not None}


def sweep_of(**changes: Any) -> Sweep:
    return sweep_from_dict(sweep_data(**changes), origin="s.yaml")


def cells_of(**changes: Any) -> list[Cell]:
    return make_cells(sweep_of(**changes), Path("data"))


def row_of(cell: Cell, loss: float = 3.0, **changes: Any) -> Row:
    """Row of a cell that ended with this loss; it diverged where that is not finite.

    Args:
        cell: of a sweep.
        loss: nats per token.
        changes: columns with other values.
    """
    columns = {
        "cell": cell.id,
        "arm": cell.arm,
        "size": cell.size,
        "log2_lr": cell.log2_lr,
        "seed": cell.seed,
        "settings": cell.settings,
        "status": Status.FINISHED if math.isfinite(loss) else Status.DIVERGED,
        "validation_loss": loss,
    }
    return a_row(**columns | changes)


def write_sweep(folder: Path, **changes: Any) -> Path:
    """The sweep's YAML with shards of its own: 4,800 tokens to train on, 1,600 held out."""
    for part, documents in (("train", 60), ("valid", 20)):
        ids = [
            [(7 * number + step * step) % 96 for step in range(80)] for number in range(documents)
        ]
        write_shard(folder / "shards" / part, ids)
    data = sweep_data(**changes)
    data["base"]["data"] = {
        "train_data_path": [str(folder / "shards" / "train")],
        "valid_data_path": [str(folder / "shards" / "valid")],
    }
    path = folder / "sweep.yaml"
    path.write_text(yaml.safe_dump(data))
    return path
