"""Rows of sweeps that nobody ran: parabolas with noise, diverged runs, and what a test changes."""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from megatron_mup.transfer.runs import Row, Status

LOG2_LRS = (-9.0, -8.0, -7.0, -6.0, -5.0, -4.0, -3.0)
SIZES = (64, 128, 256, 512)


def a_row(**changes: Any) -> Row:
    """A finished run, with what a test changes."""
    row = Row(
        sweep="sample",
        cell="0" * 12,
        arm="mup",
        axis="width",
        size=64.0,
        log2_lr=-6.0,
        seed=1,
        settings={},
        status=Status.FINISHED,
        validation_loss=3.0,
        train_loss=2.9,
        steps=500,
        planned_steps=500,
        tokens=2_048_000,
        parameters=100_000,
        non_embedding_parameters=50_000,
        validation_tokens=200_000,
        loss_spikes=0,
        seconds=60.0,
        config_sha256="0" * 64,
        data_sha256="d" * 64,
        commit="0123456789abcdef",
        version="0.1.0",
        torch="2.11.0",
        megatron_core="0.19.2",
        machine="two cores of a laptop",
        started="2026-01-02T03:04:05+00:00",
    )
    row = replace(row, **changes)
    # An identity of its own, as a row of a sweep has; a test may still name one.
    if "cell" not in changes:
        parts = (row.arm, row.size, row.log2_lr, row.seed, sorted(row.settings.items()))
        row = replace(row, cell=hashlib.sha256(repr(parts).encode()).hexdigest()[:12])
    return row


def arm_rows(
    arm: str,
    *,
    optimum: float,
    shift: float = 0.0,
    sizes: Sequence[float] = SIZES,
    log2_lrs: Sequence[float] = LOG2_LRS,
    seeds: Sequence[int] = (1, 2, 3),
    noise: float = 0.01,
    diverges_above: float = math.inf,
    **changes: Any,
) -> list[Row]:
    """Runs of one arm: loss = 2 + 4 n^-1/4 + 0.03 (x - x*)^2 (1 + 0.1 (x - x*)), x* shifting.

    Args:
        arm: its name.
        optimum: x*, log2 LR, at the first size.
        shift: octaves that x* moves per doubling of the size.
        sizes: increasing.
        log2_lrs: the grid.
        seeds: of each point.
        noise: standard deviation of one run's loss, nats.
        diverges_above: a run this many octaves above x* diverges.
        changes: further fields of every row.
    """
    random = np.random.default_rng(sum(map(ord, arm)))
    rows = []
    for size in sizes:
        best = optimum + shift * math.log2(size / sizes[0])
        for seed in seeds:
            common = random.normal(0, noise)
            for log2_lr in log2_lrs:
                away = log2_lr - best
                loss = 2 + 4 * size**-0.25 + 0.03 * away**2 * max(0.3, 1 + 0.1 * away)
                loss += common + random.normal(0, noise)
                # The seeds do not all diverge at the same rate.
                diverged = away > diverges_above + 0.4 * (seed - 2)
                fields: dict[str, Any] = {
                    "status": Status.DIVERGED if diverged else Status.FINISHED,
                    "validation_loss": math.nan if diverged else loss,
                    "train_loss": math.nan if diverged else loss - 0.1,
                    "parameters": int(12 * size * size + 2048 * size),
                    "seconds": size / 2,
                }
                place = {"arm": arm, "size": float(size), "log2_lr": log2_lr, "seed": seed}
                rows.append(a_row(**(fields | place | changes)))
    return rows


def two_arms() -> list[Row]:
    """muP, whose optimum stays, and SP, whose optimum leaves the grid; some runs diverge."""
    stays = arm_rows("mup", optimum=-5.6, shift=-0.05, diverges_above=2.3)
    leaves = arm_rows("sp", optimum=-5.8, shift=-1.15, diverges_above=2.9)
    return stays + leaves
