"""What one rank measures of itself: the time it computes, and its memory.

``BusyClock`` finds stragglers. In synchronous training every rank's step takes the same time,
because the fast ones wait for the slow one; what differs is the time until a rank is ready for the
final gradient reduction. Tensor-, pipeline- and context-parallel ranks wait for each other before
that point too, so the measure tells replicas of the model apart, not the ranks inside of one. With
``overlap_param_gather`` it includes waiting for parameters from other replicas. Must not
communicate.
"""

from __future__ import annotations

import resource
import time
from typing import Any

import torch

from megatron_mup import platform


class BusyClock:
    """Seconds from the start of a step to its final gradient reduction, summed over steps.

    Args:
        config: TransformerConfig of the first model chunk, which the schedule reads; its
            ``finalize_model_grads_func`` is wrapped.
    """

    def __init__(self, config: Any) -> None:
        self._reduce = config.finalize_model_grads_func
        self._spans: list[tuple[Any, Any]] = []
        self._begun: Any = None
        config.finalize_model_grads_func = self._note_and_reduce

    def begin(self) -> None:
        """Note the start of a step."""
        self._begun = _mark()

    def take(self) -> float:
        """Seconds since the last call; on a GPU this waits for the noted kernels."""
        spans, self._spans = self._spans, []
        return sum(_seconds(start, end) for start, end in spans)

    def _note_and_reduce(self, *args: Any, **kwargs: Any) -> Any:
        if self._begun is not None:
            self._spans.append((self._begun, _mark()))
            self._begun = None
        return self._reduce(*args, **kwargs)


def _mark() -> Any:
    """A point in time: of the GPU's queue, which runs behind the program, or of the clock."""
    if not platform.has_cuda():
        return time.perf_counter()
    cuda: Any = torch.cuda
    event = cuda.Event(enable_timing=True)
    event.record()
    return event


def _seconds(start: Any, end: Any) -> float:
    if isinstance(start, float):
        return float(end - start)
    end.synchronize()
    return float(start.elapsed_time(end)) / 1000.0


def memory_bytes() -> dict[str, float]:
    """Memory of this process in bytes, by Megatron's names where it has one.

    Returns:
        On a GPU what PyTorch has allocated there now and at most; on a CPU the largest resident
        size of the process. The names are the same on every rank of a run.
    """
    if platform.has_cuda():
        return {
            "mem-allocated-bytes": float(torch.cuda.memory_allocated()),
            "mem-max-allocated-bytes": float(torch.cuda.max_memory_allocated()),
        }
    # Linux counts ru_maxrss in KiB.
    kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"mem-max-resident-bytes": 1024.0 * kib}
