"""Profile chosen steps with torch.profiler and write Chrome traces."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Protocol

import torch
import torch.distributed as dist

from megatron_mup.config import TrainingConfig


class StepProfiler(Protocol):
    """Is told after each optimizer step."""

    def step(self) -> None:
        """One step has ended."""
        ...


class _Off:
    """Profiles nothing."""

    def step(self) -> None:
        """Nothing to do."""


def step_profiler(training: TrainingConfig, iteration: int, stack: ExitStack) -> StepProfiler:
    """Profiler of the iterations [profile_step_start, profile_step_end).

    Args:
        training: options; ``profile_dir`` receives ``trace_rank<r>.json``.
        iteration: iterations already done (a resumed run).
        stack: closes the profiler.

    Returns:
        An object whose ``step`` must be called after each iteration.
    """
    start = training.profile_step_start - iteration
    if not training.profile or training.profile_dir is None or start < 0:
        return _Off()
    folder = Path(training.profile_dir)
    folder.mkdir(parents=True, exist_ok=True)
    trace = folder / f"trace_rank{dist.get_rank()}.json"

    def export(profiler: torch.profiler.profile) -> None:
        profiler.export_chrome_trace(str(trace))

    active = training.profile_step_end - training.profile_step_start
    # torch's schedule runs `wait` steps without profiling and one to warm up.
    warmup = min(1, start)
    plan = torch.profiler.schedule(wait=start - warmup, warmup=warmup, active=active, repeat=1)
    profiler = torch.profiler.profile(schedule=plan, on_trace_ready=export)
    stack.enter_context(profiler)
    return profiler
