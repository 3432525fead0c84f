"""The metrics of a log interval: what each rank adds up, and what all ranks make of it.

Every metric's formula and the ranks it is taken over stand in docs/metrics.md. Names are Megatron's
where it has the metric. Closing an interval communicates twice, whatever the number of metrics: the
losses are summed, and what each rank measured of itself is gathered.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from megatron_mup import platform
from megatron_mup.config import RunConfig
from megatron_mup.optimizer.schedule import ExtraFactor
from megatron_mup.training.meters import memory_bytes
from megatron_mup.training.processes import sum_over_data_parallel
from megatron_mup.training.role_metrics import learning_rates
from megatron_mup.training.step import StepReport

MAX_EXPONENT = 20.0
"""Largest loss that is turned into a perplexity; Megatron's cap."""


def perplexity(loss: float) -> float:
    """exp(loss), with the loss capped as in Megatron."""
    # In this order min keeps NaN.
    return math.exp(min(loss, MAX_EXPONENT))


class Interval:
    """Sums over the steps since the last log line.

    Its clock runs from construction and from each ``close``; what happens inside ``paused`` is not
    counted.

    Args:
        run: the run's configuration.
        flops_per_sample: model FLOPs of one sequence, forward and backward.
        peak_flops: FLOP/s that one device can do at most; None if unknown: no MFU then.
        clock: seconds that never go back.
    """

    def __init__(
        self,
        run: RunConfig,
        *,
        flops_per_sample: float,
        peak_flops: float | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._run = run
        self._flops_per_sample = flops_per_sample
        self._peak_flops = peak_flops
        self._clock = clock
        self._began = clock()
        self._reset()

    def _reset(self) -> None:
        # float64, so that the mean over a long interval does not depend on its length.
        self._loss_and_tokens = torch.zeros(2, dtype=torch.float64, device=platform.device())
        self._paused = 0.0
        self._steps = self._samples = self._batch_size = self._clipped = self._skipped = 0
        self._trained_samples = 0
        self._grad_norm = self._factor = math.nan
        self._extra: ExtraFactor | None = None

    def add(self, report: StepReport, *, batch_size: int) -> None:
        """Add one step; no communication, and no waiting for the device.

        A skipped step counts as a step and its samples as read. Its loss and gradient norm, which
        are the reason that it was skipped, are left out.

        Args:
            report: what the step said.
            batch_size: sequences of the step over all ranks.
        """
        self._steps += 1
        self._samples += batch_size
        self._batch_size = batch_size
        self._factor, self._extra = report.factor, report.extra
        if not report.updated:
            self._skipped += 1
            return
        self._trained_samples += batch_size
        self._loss_and_tokens += report.loss_sum_and_tokens
        self._grad_norm = report.grad_norm
        clip = self._run.optimizer.clip_grad
        self._clipped += int(clip > 0 and report.grad_norm > clip)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Time that belongs to no iteration: evaluation, saving."""
        start = self._clock()
        try:
            yield
        finally:
            self._paused += self._clock() - start

    def close(self, *, consumed_samples: int, busy_seconds: float = 0.0) -> dict[str, float]:
        """Metrics of the interval, and begin the next one; every rank must call it.

        Args:
            consumed_samples: sequences read since the start of the run, over all ranks.
            busy_seconds: this rank's ``BusyClock.take``.

        Returns:
            Name -> value, the same on every rank; empty if no step was added.
        """
        if self._steps == 0:
            return {}
        now = self._clock()
        seconds, self._began = now - self._began - self._paused, now
        loss_sum, tokens = sum_over_data_parallel(self._loss_and_tokens).tolist()
        ranks = _gathered(
            {"seconds": seconds, "busy": busy_seconds, "stage": _stage(), **memory_bytes()}
        )
        loss = loss_sum / tokens if tokens else math.nan
        steps, seq_length = self._steps, self._run.model.seq_length
        trained = self._trained_samples * seq_length
        metrics = {
            "lm loss": loss,
            "lm loss ppl": perplexity(loss),
            "unmasked-fraction": tokens / trained if trained else math.nan,
            "learning-rate": self._factor * self._run.optimizer_numbers.lr,
            **learning_rates(self._run, self._factor, self._extra),
            "grad-norm": self._grad_norm,
            "clipped-fraction": self._clipped / steps,
            "skipped-fraction": self._skipped / steps,
            "batch-size": float(self._batch_size),
            "consumed-samples": float(consumed_samples),
            "consumed-tokens": float(consumed_samples * seq_length),
            **step_times(ranks, steps=steps, replicas=_replicas()),
            **self._speed(max(ranks["seconds"]), devices=len(ranks["seconds"])),
            **{name: max(values) for name, values in ranks.items() if name.startswith("mem-")},
        }
        self._reset()
        return metrics

    def _speed(self, seconds: float, *, devices: int) -> dict[str, float]:
        samples_per_second = self._samples / seconds
        tokens_per_second = samples_per_second * self._run.model.seq_length
        flops_per_device = samples_per_second * self._flops_per_sample / devices
        speed = {
            "tokens/sec": tokens_per_second,
            "tokens/sec/device": tokens_per_second / devices,
            "tflops/device": flops_per_device / 1e12,
        }
        if self._peak_flops is not None:
            speed["mfu"] = flops_per_device / self._peak_flops
        return speed


def step_times(ranks: dict[str, list[float]], *, steps: int, replicas: int) -> dict[str, float]:
    """Step time and its spread over ranks.

    Args:
        ranks: by name, one value for each rank: ``seconds`` of the interval, ``busy`` of them, and
            pipeline ``stage``.
        steps: steps of the interval.
        replicas: data-parallel size.

    Returns:
        Seconds per step; with several replicas also the rank that is slowest, compared with the
        mean of its stage (stages differ by design: the first one also waits for all others), and
        by what fraction of that mean it is slower. What needs ``busy`` is left out if it is 0.
    """
    seconds, busy = ranks["seconds"], ranks["busy"]
    times = {
        "iteration-time": max(seconds) / steps,
        "iteration-time-min": min(seconds) / steps,
        "iteration-time-max": max(seconds) / steps,
    }
    if min(busy) > 0:
        times |= {"busy-time-min": min(busy) / steps, "busy-time-max": max(busy) / steps}
        times |= _slowest(busy, ranks["stage"]) if replicas > 1 else {}
    return times


def _slowest(busy: list[float], stages: list[float]) -> dict[str, float]:
    """The rank that is slowest compared with its stage, and by what fraction."""
    by_stage: dict[float, list[float]] = {}
    for own, stage in zip(busy, stages, strict=True):
        by_stage.setdefault(stage, []).append(own)
    means = {stage: sum(values) / len(values) for stage, values in by_stage.items()}
    excess = [own / means[stage] - 1 for own, stage in zip(busy, stages, strict=True)]
    slowest = max(range(len(excess)), key=excess.__getitem__)
    return {"slowest-rank": float(slowest), "slowest-rank-excess": excess[slowest]}


def _gathered(own: dict[str, float]) -> dict[str, list[float]]:
    """Every rank's values, by name and in the order of ranks."""
    row = torch.tensor([list(own.values())], dtype=torch.float64, device=platform.device())
    rows = row.new_empty(dist.get_world_size(), len(own))
    dist.all_gather_into_tensor(rows, row)
    return dict(zip(own, rows.T.tolist(), strict=True))


def _stage() -> float:
    return float(parallel_state.get_pipeline_model_parallel_rank())


def _replicas() -> int:
    return int(parallel_state.get_data_parallel_world_size())
