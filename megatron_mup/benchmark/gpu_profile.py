"""Where the time of a step on a GPU goes: kernels, gaps between them, launching on the CPU."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from megatron_mup import platform
from megatron_mup.benchmark.contestants import TrainStep
from megatron_mup.benchmark.measure import WARMUP_STEPS
from megatron_mup.training.batches import Batch

_LAUNCHES = (
    "cudaLaunchKernel",
    "cudaLaunchKernelExC",
    "cuLaunchKernel",
    "cuLaunchKernelEx",
    "cudaMemcpyAsync",
    "cudaMemsetAsync",
    "cudaGraphLaunch",
)
"""CUDA's calls that give the GPU work, as the profiler names them."""

_NAME_LENGTH = 100
"""Characters of a kernel's name that are kept; template arguments follow."""


@dataclass(frozen=True, kw_only=True)
class KernelTime:
    """All calls of one kernel.

    Attributes:
        name: its beginning.
        calls: per step.
        milliseconds: per step.
        share: of the time in which the GPU was busy.
    """

    name: str
    calls: float
    milliseconds: float
    share: float


@dataclass(frozen=True, kw_only=True)
class Profile:
    """A step on a GPU, means over the profiled steps.

    Attributes:
        step_milliseconds: wall time, the profiler's own included.
        busy: share of it in which at least one kernel or copy ran.
        launch_milliseconds: CPU time in CUDA's launching calls.
        launches: number of those calls.
        kernels: those that take longest, the first ones.
    """

    step_milliseconds: float
    busy: float
    launch_milliseconds: float
    launches: float
    kernels: tuple[KernelTime, ...]

    @property
    def gaps(self) -> float:
        """Share of the wall time in which the GPU had nothing to do."""
        return 1.0 - self.busy


def profile(step: TrainStep, batches: Sequence[Batch], *, steps: int = 3, top: int = 25) -> Profile:
    """Profile a contestant after its warmup.

    Args:
        step: the contestant.
        batches: used in turn.
        steps: how many are profiled.
        top: kernels to keep.
    """
    for _ in range(WARMUP_STEPS):
        step(batches[0])
    activities = [torch.profiler.ProfilerActivity.CPU]
    if platform.has_cuda():
        activities.append(torch.profiler.ProfilerActivity.CUDA)
        torch.cuda.synchronize()
    profiler: Any = torch.profiler.profile(activities=activities)
    with profiler:
        start = time.perf_counter()
        for number in range(steps):
            step(batches[number % len(batches)])
        if platform.has_cuda():
            torch.cuda.synchronize()
        seconds = time.perf_counter() - start
    return summarize(profiler.events() or [], seconds=seconds, steps=steps, top=top)


def summarize(events: Iterable[Any], *, seconds: float, steps: int, top: int) -> Profile:
    """Add up a profiler's events.

    Args:
        events: of ``torch.profiler``, times in microseconds.
        seconds: wall time of all steps.
        steps: how many there were.
        top: kernels to keep.
    """
    spans: list[tuple[float, float]] = []
    kernels: dict[str, list[float]] = {}
    launches: list[float] = []
    for event in events:
        span = (event.time_range.start, event.time_range.end)
        if event.device_type.name == "CUDA":
            # Ranges that code marks on the GPU's time line are no work.
            if not getattr(event, "is_user_annotation", False):
                spans.append(span)
                kernels.setdefault(event.name[:_NAME_LENGTH], []).append(span[1] - span[0])
        elif event.name in _LAUNCHES:
            launches.append(span[1] - span[0])
    total = sum(map(sum, kernels.values()))
    longest = sorted(kernels.items(), key=lambda item: -sum(item[1]))[:top]
    return Profile(
        step_milliseconds=seconds * 1e3 / steps,
        busy=_covered(spans) / (seconds * 1e6),
        launch_milliseconds=sum(launches) / 1e3 / steps,
        launches=len(launches) / steps,
        kernels=tuple(
            KernelTime(
                name=name,
                calls=len(times) / steps,
                milliseconds=sum(times) / 1e3 / steps,
                share=sum(times) / total,
            )
            for name, times in longest
        ),
    )


def _covered(spans: list[tuple[float, float]]) -> float:
    """Length of the union of spans: kernels of several streams overlap."""
    covered, end = 0.0, float("-inf")
    for start, stop in sorted(spans):
        covered += max(0.0, stop - max(start, end))
        end = max(end, stop)
    return covered


def render(found: Profile) -> str:
    """A table for a person."""
    lines = [
        f"step {found.step_milliseconds:.1f} ms under the profiler; GPU busy {found.busy:.1%}, "
        f"gaps {found.gaps:.1%}; {found.launches:.0f} launches take the CPU "
        f"{found.launch_milliseconds:.1f} ms",
        f"{'share':>6} {'ms/step':>9} {'calls':>7}  kernel",
    ]
    lines += [
        f"{kernel.share:>6.1%} {kernel.milliseconds:>9.2f} {kernel.calls:>7.0f}  {kernel.name}"
        for kernel in found.kernels
    ]
    return "\n".join(lines)
