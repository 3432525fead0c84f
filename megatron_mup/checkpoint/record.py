"""The parameterization record: what a checkpoint says of the model it holds.

The resolved table, the configuration and the package version are saved with the weights. A run
under other rules is refused with the difference; nothing is ever rescaled after loading. Must not
import torch or megatron.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron_mup import __version__
from megatron_mup.config import RunConfig
from megatron_mup.config_io import config_to_dict
from megatron_mup.errors import CheckpointError
from megatron_mup.parameterization.table import difference

FORMAT = 1

FUNCTION_KEYS = ("role", "shape", "forward_mult")
"""Columns that decide what function the weights are: compared even when only weights are loaded."""

_FUNCTION_SECTIONS = ("model",)
_RESUME_SECTIONS = ("model", "parameterization")
_FREE_OPTIONS = frozenset({"transformer_impl", "attention_backend", "seq_length"})
"""Model options that change speed or length, not the weights."""


def make_record(run: RunConfig) -> dict[str, Any]:
    """Plain data to save with a checkpoint."""
    return {
        "format": FORMAT,
        "version": __version__,
        "config": config_to_dict(run),
        "table": run.table.to_json(),
    }


def check_record(saved: Mapping[str, Any], run: RunConfig, *, weights_only: bool) -> None:
    """Refuse to continue a checkpoint under other rules.

    Args:
        saved: record from the checkpoint.
        run: the configuration that wants to continue it.
        weights_only: finetuning; LR, decay, eps and init may differ then.

    Raises:
        CheckpointError: with every number that differs.
    """
    current = make_record(run)
    if saved.get("format") != FORMAT:
        raise CheckpointError(
            f"checkpoint record has format {saved.get('format')}, this version reads {FORMAT}; "
            f"it was written by megatron_mup {saved.get('version')}"
        )
    sections = _FUNCTION_SECTIONS if weights_only else _RESUME_SECTIONS
    lines = _option_differences(saved["config"], current["config"], sections)
    saved_optimizer = saved["config"]["optimizer"]["optimizer"]
    if not weights_only and saved_optimizer != run.optimizer.optimizer.value:
        lines.append(f"optimizer.optimizer was {saved_optimizer}, now {run.optimizer.optimizer}")
    if weights_only:
        lines += difference(saved["table"], current["table"], keys=FUNCTION_KEYS)
    else:
        lines += difference(saved["table"], current["table"])
    if lines:
        cure = (
            "use the checkpoint's model and multipliers"
            if weights_only
            else "use the checkpoint's options, or load only the weights with "
            "checkpoint.finetune=true"
        )
        raise CheckpointError(
            "the checkpoint belongs to another parameterization:\n  "
            + "\n  ".join(lines)
            + f"\n{cure}"
        )


def _option_differences(
    saved: Mapping[str, Any], current: Mapping[str, Any], sections: tuple[str, ...]
) -> list[str]:
    lines = []
    for section in sections:
        for key, value in current[section].items():
            if key not in _FREE_OPTIONS and saved[section].get(key) != value:
                lines.append(f"{section}.{key} was {saved[section].get(key)}, now {value}")
    return lines
