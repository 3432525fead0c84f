"""Whatever the runs look like, a number is finite or its absence has a reason."""

from __future__ import annotations

import math

import numpy as np

from megatron_mup.transfer.fits import (
    Curve,
    Estimate,
    fit_minima,
    judge,
    measure_transfer,
    predict_log2_lr,
)


def wild_curve(rng: np.random.Generator, size: float) -> Curve:
    """Missing and diverged runs, odd grids, hills instead of valleys, no noise or much."""
    grid = np.arange(rng.integers(1, 8)) * rng.choice([0.5, 1.0, 2.0]) - 8.0
    noise, bend = rng.choice([0.0, 0.001, 0.1]), rng.choice([0.05, 0.05, 0.05, -0.05, 0.0])
    runs = [(-6.0, math.nan, 0)]
    for seed in range(rng.integers(1, 4)):
        for x in grid[rng.random(len(grid)) > 0.2]:
            loss = 3.0 + 0.05 * seed + bend * (x + 6.3) ** 2 + noise * rng.standard_normal()
            runs.append((float(x), float(loss) if rng.random() > 0.1 else math.nan, seed))
    kept = runs[1:] or runs
    return Curve(
        size=size,
        log2_lrs=tuple(run[0] for run in kept),
        losses=tuple(run[1] for run in kept),
        seeds=tuple(run[2] for run in kept),
    )


def check(estimate: Estimate) -> None:
    shown = (estimate.value, estimate.low, estimate.high)
    assert all(part is None or math.isfinite(part) for part in shown)
    if estimate.low is not None and estimate.high is not None:
        assert estimate.low <= estimate.high
    assert None not in shown or estimate.reason


def test_every_missing_number_has_a_reason() -> None:
    rng = np.random.default_rng(3)
    for _ in range(60):
        sizes = 32.0 * 2.0 ** np.arange(rng.integers(1, 6))
        curves = [wild_curve(rng, float(size)) for size in sizes]
        minima = fit_minima(curves)
        transfer = measure_transfer(minima, curves)
        for one in minima:
            for estimate in (one.log2_lr, one.loss, one.curvature):
                check(estimate)
        for estimate in vars(transfer).values():
            if isinstance(estimate, Estimate):
                check(estimate)
        check(predict_log2_lr(minima, 1000.0))
        verdict = judge(transfer)
        assert verdict.next_steps or verdict.outcome != "cannot tell"
