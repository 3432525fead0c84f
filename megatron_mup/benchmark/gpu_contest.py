"""Who is timed against whom on a GPU, and the memory that each needs.

muP in one precision is compared with every other contestant: two live at a time and alternate step
by step, or, where memory holds only one, each runs alone, in the order A B B A.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from megatron_mup import platform
from megatron_mup.benchmark.contestants import (
    TrainStep,
    mup_contestant,
    plain_contestant,
    random_batches,
    stock_contestant,
)
from megatron_mup.benchmark.gpu_models import Precision, SpeedModel, speed_run
from megatron_mup.benchmark.measure import (
    Pairs,
    Ratio,
    alone,
    alternate,
    idle_gpu_seconds,
    ratio,
    unpaired_ratio,
)
from megatron_mup.benchmark.plain_gpt import require_plain
from megatron_mup.config import RunConfig
from megatron_mup.errors import ConfigError
from megatron_mup.training.batches import Batch
from megatron_mup.training.processes import Launch, parallel_processes

MUP, SP, STOCK, PLAIN = "muP", "SP", "stock Megatron-Core", "plain PyTorch"

OTHERS = {"sp": SP, "stock": STOCK, "plain": PLAIN}
"""What ``--against`` takes."""

BATCHES = 4
"""Distinct batches, used in turn."""


@dataclass(frozen=True, kw_only=True)
class Contestant:
    """One way of training a model.

    Attributes:
        name: ``MUP``, ``SP``, ``STOCK`` or ``PLAIN``.
        precision: of its products.
        run: its configuration; sizes and precision alone count for stock and plain.
        build: makes its step; needs the parallel state.
    """

    name: str
    precision: Precision
    run: RunConfig
    build: Callable[[RunConfig], TrainStep]

    @property
    def label(self) -> str:
        """Name and precision."""
        return f"{self.name} {self.precision}"


@dataclass(frozen=True, kw_only=True)
class Timed:
    """Measured steps of one contestant.

    Attributes:
        contestant: who.
        seconds: of each step.
        peak_bytes: the allocator's largest use in a step, its weights and state included.
    """

    contestant: Contestant
    seconds: tuple[float, ...]
    peak_bytes: int


@dataclass(frozen=True, kw_only=True)
class Contest:
    """Two contestants, measured together.

    Attributes:
        first: muP.
        second: the other.
        ratio: of the first's time to the second's.
        paired: whether they alternated step by step.
    """

    first: Timed
    second: Timed
    ratio: Ratio
    paired: bool


def contestant(
    name: str,
    model: SpeedModel,
    precision: Precision,
    *,
    overrides: Sequence[str] = (),
    compiled: bool = False,
) -> Contestant:
    """A contestant by its name.

    Args:
        name: ``MUP``, ``SP``, ``STOCK`` or ``PLAIN``.
        model: sizes.
        precision: of its products.
        overrides: ``key=value``, for all alike.
        compiled: use ``torch.compile``; plain PyTorch only.

    Raises:
        MupError: the run cannot be configured so, or plain PyTorch does not have it.
    """
    builds: dict[str, Callable[[RunConfig], TrainStep]] = {
        MUP: mup_contestant,
        SP: mup_contestant,
        STOCK: stock_contestant,
        PLAIN: partial(plain_contestant, compiled=compiled),
    }
    run = speed_run(model, precision, sp=name == SP, overrides=overrides)
    if name == PLAIN:
        require_plain(run.model)
    return Contestant(name=name, precision=precision, run=run, build=builds[name])


def chosen(against: str, precisions: str) -> tuple[list[str], list[Precision]]:
    """What the command line says.

    Raises:
        ConfigError: an unknown name, or nothing to compare.
    """
    others, kinds = against.split(",") if against else [], precisions.split(",")
    for option, names, known in (
        ("--against", others, list(OTHERS)),
        ("--precision", kinds, [kind.value for kind in Precision]),
    ):
        wrong = [name for name in names if name not in known]
        if wrong or len(names) != len(set(names)):
            raise ConfigError(f"{option} is '{','.join(names)}'; use some of {','.join(known)}")
    return [OTHERS[name] for name in others], [Precision(kind) for kind in kinds]


def pairings(
    others: Sequence[str], precisions: Sequence[Precision]
) -> list[list[tuple[str, Precision]]]:
    """Pairs of (name, precision), muP first: each other in each precision, then FP8 against bf16.

    Plain PyTorch has no FP8, and is compared in bf16 alone.
    """
    found = [
        [(MUP, precision), (other, precision)]
        for precision in precisions
        for other in others
        if other != PLAIN or precision is Precision.BF16
    ]
    if len(precisions) > 1:
        found.append([(MUP, Precision.FP8), (MUP, Precision.BF16)])
    return found


def clock() -> Callable[[], float]:
    """Seconds of work: the GPU's on a machine that has one, the CPU's elsewhere."""
    return idle_gpu_seconds if platform.has_cuda() else time.process_time


def side_by_side(first: Contestant, second: Contestant, *, pairs: int) -> Contest:
    """Time both in one process, turn by turn."""
    with parallel_processes(first.run, Launch()):
        batches = random_batches(first.run, BATCHES)
        one, one_bytes = _built(first, batches)
        two, two_bytes = _built(second, batches)
        times = alternate(one, two, batches, pairs=pairs, clock=clock())
        del one, two
    release_memory()
    return Contest(
        first=Timed(contestant=first, seconds=times.first, peak_bytes=one_bytes),
        second=Timed(contestant=second, seconds=times.second, peak_bytes=two_bytes),
        ratio=ratio(times),
        paired=True,
    )


def one_by_one(first: Contestant, second: Contestant, *, pairs: int) -> Contest:
    """Time each alone, half of the steps before and half after the other's."""
    seconds: dict[str, list[float]] = {first.label: [], second.label: []}
    peaks = dict.fromkeys(seconds, 0)
    for each in (first, second, second, first):
        found = by_itself(each, steps=max(1, pairs // 2))
        seconds[each.label] += found.seconds
        peaks[each.label] = max(peaks[each.label], found.peak_bytes)
    one, two = (
        Timed(contestant=each, seconds=tuple(seconds[each.label]), peak_bytes=peaks[each.label])
        for each in (first, second)
    )
    times = Pairs(one.seconds, two.seconds)
    return Contest(first=one, second=two, ratio=unpaired_ratio(times), paired=False)


def by_itself(contestant: Contestant, *, steps: int) -> Timed:
    """Time one contestant, with the device to itself."""
    with parallel_processes(contestant.run, Launch()):
        batches = random_batches(contestant.run, BATCHES)
        step, peak = _built(contestant, batches)
        seconds = alone(step, batches, steps=steps, clock=clock())
        del step
    release_memory()
    return Timed(contestant=contestant, seconds=seconds, peak_bytes=peak)


def _built(contestant: Contestant, batches: Sequence[Batch]) -> tuple[TrainStep, int]:
    """A contestant's step, and the most memory that it needed so far beyond what was in use."""
    if not platform.has_cuda():
        return contestant.build(contestant.run), 0
    before = torch.cuda.memory_allocated()
    step = contestant.build(contestant.run)
    # The first step makes the optimizer's state and compiles what is to be compiled.
    step(batches[0])
    torch.cuda.reset_peak_memory_stats()
    step(batches[0])
    return step, torch.cuda.max_memory_allocated() - before


def release_memory() -> None:
    """Give freed blocks back, so that the next contestants find the memory whole."""
    if platform.has_cuda():
        gc.collect()
        torch.cuda.empty_cache()
