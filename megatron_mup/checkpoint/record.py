"""The parameterization record: what a checkpoint says of the model it holds.

The resolved table, the configuration and the package version are saved with the weights. A run
under other rules is refused with the difference; nothing is ever rescaled after loading. Must not
import torch or megatron.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from megatron_mup import __version__
from megatron_mup.config import DecayStyle, RunConfig
from megatron_mup.config_io import config_to_dict
from megatron_mup.errors import CheckpointError
from megatron_mup.parameterization.table import difference

FORMAT = 1

FUNCTION_KEYS = ("role", "shape", "forward_mult")
"""Columns that decide what function the weights are: compared even when only weights are loaded."""

_EVERYTHING = frozenset({"*"})
_SPEED_ONLY = frozenset({"transformer_impl", "attention_backend"})

_RESUMED: dict[str, frozenset[str]] = {
    "model": _EVERYTHING,
    "parameterization": _EVERYTHING,
    "optimizer": _EVERYTHING,
    "schedule": _EVERYTHING,
    "training": frozenset({"global_batch_size", "rampup_batch_size", "loss_denominator", "seed"}),
    "precision": frozenset({"bf16", "fp8_format", "fp8_recipe"}),
    "data": frozenset({"eod_mask_loss", "eod_token"}),
}
"""Options that must stay for a resumed run to equal the uninterrupted one. Layout, logging,
evaluation and the microbatch may change; shards may have moved to another folder."""

_FINETUNED: dict[str, frozenset[str]] = {"model": _EVERYTHING}

# Whether lr_decay_iters is written out or follows train_iters does not matter; its value does, and
# is compared as ``decay_iters``. The sequence length is free when only weights are loaded.
_RESUME_FREE = _SPEED_ONLY | {"lr_decay_iters"}
_FINETUNE_FREE = _SPEED_ONLY | {"seq_length"}


def make_record(run: RunConfig) -> dict[str, Any]:
    """Plain data to save with a checkpoint."""
    table = run.table
    return {
        "format": FORMAT,
        "version": __version__,
        "config": config_to_dict(run),
        "table": table.to_json(),
        # A tied model has no row for its readout, so the multipliers stand here as well.
        "multipliers": asdict(table.multipliers),
        "decay_iters": run.decay_iters,
        "planned_iters": run.planned_iters,
    }


def check_record(saved: Mapping[str, Any], run: RunConfig, *, weights_only: bool) -> None:
    """Refuse to continue a checkpoint under other rules.

    Args:
        saved: record from the checkpoint.
        run: the configuration that wants to continue it.
        weights_only: finetuning; everything but the function may differ then.

    Raises:
        CheckpointError: with every number that differs.
    """
    if saved.get("format") != FORMAT:
        raise CheckpointError(
            f"checkpoint record has format {saved.get('format')}, this version reads {FORMAT}; "
            f"it was written by megatron_mup {saved.get('version')}"
        )
    current = make_record(run)
    lines = _multiplier_differences(saved, current)
    if weights_only:
        lines += _option_differences(saved, current, _FINETUNED, free=_FINETUNE_FREE)
        lines += difference(saved["table"], current["table"], keys=FUNCTION_KEYS)
        cure = "use the checkpoint's model and multipliers"
    else:
        lines += _option_differences(saved, current, _RESUMED, free=_RESUME_FREE)
        lines += _length_differences(saved, run)
        lines += difference(saved["table"], current["table"])
        cure = "use the checkpoint's options"
        # Weights of another model cannot be loaded either.
        if not any(line.startswith("model.") for line in lines):
            cure += ", or load only the weights with checkpoint.finetune=true"
    if lines:
        listed = "\n  ".join(lines)
        raise CheckpointError(f"the checkpoint belongs to another run:\n  {listed}\n{cure}")


def _multiplier_differences(saved: Mapping[str, Any], current: Mapping[str, Any]) -> list[str]:
    return [
        f"{name} multiplier was {saved['multipliers'].get(name)}, now {value}"
        for name, value in current["multipliers"].items()
        if saved["multipliers"].get(name) != value
    ]


def _length_differences(saved: Mapping[str, Any], run: RunConfig) -> list[str]:
    """The planned length decides the learning rates and, over epochs, the order of the data.

    A constant schedule has no end, so such a run may be made longer; see ``length_warning``.
    """
    if run.schedule.lr_decay_style is DecayStyle.CONSTANT:
        return []
    lines = []
    if saved["decay_iters"] != run.decay_iters:
        lines.append(
            f"the schedule ended at iteration {saved['decay_iters']}, now at "
            f"{run.decay_iters}; schedule.lr_decay_iters={saved['decay_iters']} keeps it"
        )
    if saved["planned_iters"] != run.planned_iters:
        lines.append(
            f"data was shuffled for {saved['planned_iters']} iterations, now for "
            f"{run.planned_iters} (the larger of train_iters and lr_decay_iters); a run "
            f"cannot be made longer than planned, so keep train_iters at {saved['planned_iters']} "
            "or below"
        )
    return lines


def length_warning(saved: Mapping[str, Any], run: RunConfig) -> str | None:
    """What a longer run under a constant schedule cannot keep; None when all is kept."""
    planned = saved["planned_iters"]
    constant = run.schedule.lr_decay_style is DecayStyle.CONSTANT
    if not constant or planned == run.planned_iters:
        return None
    return (
        f"data was shuffled for {planned} iterations, now for {run.planned_iters}: where that "
        "takes another number of epochs, the order of all data is another one and samples can "
        "repeat; to avoid it, start with schedule.lr_decay_iters at the final length"
    )


def _option_differences(
    saved: Mapping[str, Any],
    current: Mapping[str, Any],
    sections: Mapping[str, frozenset[str]],
    *,
    free: frozenset[str],
) -> list[str]:
    lines = []
    for section, compared in sections.items():
        before, now = saved["config"][section], current["config"][section]
        for key, value in now.items():
            counts = key not in free and (compared is _EVERYTHING or key in compared)
            if counts and before.get(key) != value:
                lines.append(f"{section}.{key} was {before.get(key)}, now {value}")
    return lines
