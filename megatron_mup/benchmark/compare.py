"""The comparisons that ``make bench`` makes: sizes, contestants, limits."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from megatron_mup.benchmark.contestants import (
    TrainStep,
    benchmark_run,
    mup_contestant,
    plain_contestant,
    random_batches,
    stock_contestant,
)
from megatron_mup.benchmark.measure import alternate, ratio
from megatron_mup.benchmark.report import Comparison
from megatron_mup.config import RunConfig
from megatron_mup.training.processes import Launch, parallel_processes

STOCK_LIMIT = 1.03
"""Upper end of muP's cost relative to stock Megatron-Core, which ``make bench`` checks."""

PLAIN_LIMIT = 1.10
"""Upper end of its cost relative to plain PyTorch, which ``make bench`` checks."""

SIZES: dict[str, RunConfig] = {
    "3M": benchmark_run(hidden_size=256, num_layers=4),
    "11M": benchmark_run(hidden_size=384, num_layers=6),
}
"""Models that are compared with plain PyTorch; the first also with stock Megatron-Core."""

BATCHES = 8
"""Distinct batches, used in turn."""


def compare(
    sizes: Mapping[str, RunConfig],
    *,
    pairs: int,
    echo: Callable[[str], None],
    mup: Callable[[RunConfig], TrainStep] = mup_contestant,
) -> list[Comparison]:
    """Measure the first size against stock Megatron-Core and every size against plain PyTorch.

    Args:
        sizes: runs by the names that the table gives them.
        pairs: pairs of steps against stock Megatron-Core; half of them, but at least 2, against
            plain PyTorch, whose limit leaves more room for the interval.
        echo: receives one line per measurement.
        mup: builds the contestant that is judged.
    """
    fewer = max(2, pairs // 2)
    against = [("stock Megatron-Core", stock_contestant, STOCK_LIMIT, next(iter(sizes)), pairs)]
    against += [("plain PyTorch", plain_contestant, PLAIN_LIMIT, model, fewer) for model in sizes]
    comparisons = []
    for second, build, limit, model, count in against:
        echo(f"muP against {second}, {model}: {count} pairs of steps")
        run = sizes[model]
        # Both contestants live at once, so that every pair sees the same state of the machine; the
        # next comparison starts from fresh ones.
        with parallel_processes(run, Launch()):
            times = alternate(mup(run), build(run), random_batches(run, BATCHES), pairs=count)
        comparisons.append(
            Comparison(first="muP", second=second, model=model, limit=limit, ratio=ratio(times))
        )
    return comparisons
