"""What a sweep's writer is told before it runs: what its YAML does besides what it says. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_mup.transfer.sweep.base import left_out_of_base, replaced_options
from megatron_mup.transfer.sweep.cells import Cell
from megatron_mup.transfer.sweep.spec import Sweep

FEW_STEPS = 10
"""Shorter runs say little of a learning rate: warmup and decay are a step or two each (ours)."""


def remarks(sweep: Sweep, cells: Sequence[Cell]) -> list[str]:
    """Lines for the user.

    Args:
        sweep: what is asked for.
        cells: all of its cells.
    """
    return [*base_remarks(sweep), *_short_runs(sweep, cells)]


def base_remarks(sweep: Sweep) -> list[str]:
    """What of the base is not used; of what ``check_base`` refuses, if it has not been asked."""
    lines = [
        f"base: {option} is left out: in each run it is set by {owner}"
        for option, owner in replaced_options(sweep).items()
    ]
    places = left_out_of_base(sweep)
    if places:
        lines.append(
            f"base: left out: {', '.join(places)}; the sweep places checkpoints, logs and caches "
            "itself"
        )
    return lines


def _short_runs(sweep: Sweep, cells: Sequence[Cell]) -> list[str]:
    """A warning of runs that are over before they have begun."""
    short = [cell for cell in cells if cell.run.training.train_iters < FEW_STEPS]
    if not short:
        return []
    least = min(short, key=lambda cell: cell.run.training.train_iters)
    training = least.run.training
    steps, batch = training.train_iters, training.global_batch_size * least.run.model.seq_length
    sizes = ", ".join(f"{size:g}" for size in dict.fromkeys(cell.size for cell in short))
    option = "base.training.train_iters"
    if sweep.tokens is not None or sweep.axis == "tokens":
        option = "tokens" if sweep.tokens is not None else "scale.values"
    return [
        f"warning: runs of {sweep.axis} {sizes} make fewer than {FEW_STEPS} steps (the shortest "
        f"{steps}, of {batch:,} tokens each), too few to tell learning rates apart; raise {option}"
    ]
