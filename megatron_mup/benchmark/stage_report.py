"""Measured stages beside what a plan says of them, before and after calibration."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

import torch

from megatron_mup import platform
from megatron_mup.benchmark.gpu_models import Precision
from megatron_mup.benchmark.report import circumstances
from megatron_mup.benchmark.stage_measure import (
    StageMeasurement,
    StageParts,
    predict,
    stage_flops,
)
from megatron_mup.config import RunConfig
from megatron_mup.memory import GIB
from megatron_mup.planning.assumptions import DEFAULTS, Assumption, ends
from megatron_mup.planning.gpus import Gpu

_COMMAND = "python -m megatron_mup.benchmark.stage"


@dataclass(frozen=True, kw_only=True)
class Planned:
    """The plan's milliseconds of forward and backward pass together."""

    fast: float
    slow: float

    @property
    def middle(self) -> float:
        """By which layouts are ranked: the geometric mean."""
        return math.sqrt(self.fast * self.slow)


@dataclass(frozen=True, kw_only=True)
class _Row:
    precision: Precision
    parts: StageParts
    run: RunConfig
    found: StageMeasurement

    @property
    def compute(self) -> float:
        """Measured seconds of forward and backward pass."""
        return self.found.forward + self.found.backward

    @property
    def tflops(self) -> float:
        """Measured model TFLOP/s of them."""
        return stage_flops(self.run, self.parts) / self.compute / 1e12


class StageReport:
    """Collects measurements; the first stage of each precision calibrates.

    Args:
        gpu: whose peak, bandwidth and memory the plan uses.

    Attributes:
        failed: errors by stages that could not be measured.
    """

    def __init__(self, gpu: Gpu) -> None:
        self.gpu = gpu
        self.rows: list[_Row] = []
        self.failed: dict[str, str] = {}

    def add(
        self, precision: Precision, parts: StageParts, run: RunConfig, found: StageMeasurement
    ) -> None:
        """Add a measured stage."""
        self.rows.append(_Row(precision=precision, parts=parts, run=run, found=found))

    def calibration(self) -> dict[str, Any]:
        """What ``megatron-mup plan --calibration`` reads, as plain data."""
        where = circumstances(_COMMAND)
        device = torch.cuda.get_device_name() if platform.has_cuda() else "CPU"
        head: dict[str, Any] = {
            "source": f"{_COMMAND} on {device}, {where.date}, commit {where.commit}",
            "gpu": self.gpu.name.value,
        }
        return head | self._measured_rates()

    def _measured_rates(self) -> dict[str, float]:
        rates = {
            f"compute_tflops_{row.precision}": _four_digits(row.tflops)
            for row in self.rows
            if self._calibrates(row)
        }
        context = max((row.found.context_bytes for row in self.rows), default=0)
        return rates | ({"context_gigabytes": _four_digits(context / 1e9)} if context else {})

    def _calibrates(self, row: _Row) -> bool:
        return row is next(each for each in self.rows if each.precision == row.precision)

    def _assumptions(self) -> dict[str, Assumption]:
        """The defaults with the measured rates in their places."""
        return DEFAULTS | {
            name: dataclasses.replace(DEFAULTS[name], slow=value, fast=value)
            for name, value in self._measured_rates().items()
        }

    def _planned(self, row: _Row, assumptions: dict[str, Assumption]) -> Planned:
        slow, fast = (
            predict(row.run, row.parts, gpu=self.gpu, rates=rates).compute * 1e3
            for rates in ends(assumptions)
        )
        return Planned(fast=fast, slow=slow)

    def plain(self) -> dict[str, Any]:
        """Everything, as plain data."""
        return {
            "circumstances": dataclasses.asdict(circumstances(_COMMAND)),
            "calibration": self.calibration(),
            "stages": [self._plain_row(row) for row in self.rows],
            "failed": self.failed,
        }

    def _plain_row(self, row: _Row) -> dict[str, Any]:
        before, after = self._planned(row, DEFAULTS), self._planned(row, self._assumptions())
        slow, _ = ends(DEFAULTS)
        planned = predict(row.run, row.parts, gpu=self.gpu, rates=slow)
        milliseconds, peak = row.compute * 1e3, row.found.peak_bytes
        return {
            "precision": row.precision,
            "stage": row.parts.label,
            "tokens": row.run.training.micro_batch_size * row.run.model.seq_length,
            "forward_ms": row.found.forward * 1e3,
            "backward_ms": row.found.backward * 1e3,
            "update_ms": row.found.update * 1e3,
            "planned_update_ms": planned.update * 1e3,
            "tflops": row.tflops,
            "calibrates": self._calibrates(row),
            "before_fast_ms": before.fast,
            "before_slow_ms": before.slow,
            "inside_before": before.fast <= milliseconds <= before.slow,
            "error_before": before.middle / milliseconds - 1,
            "after_ms": after.middle,
            "error_after": after.middle / milliseconds - 1,
            "peak_gib": peak / GIB,
            "planned_gib": planned.peak_bytes / GIB,
            "memory_error": planned.peak_bytes / peak - 1 if peak else None,
        }

    def table(self) -> str:
        """The stages for a person; errors are the plan's, above 0 if it says too much."""
        lines = [
            f"{'stage':<24}{'':<6}{'fwd ms':>8}{'bwd ms':>8}{'upd ms':>8}{'TFLOP/s':>9}"
            f"{'plan ms':>16}{'error':>8}{'after':>8}{'GiB':>7}{'plan':>7}{'error':>8}"
        ]
        for row in map(self._plain_row, self.rows):
            memory = "-" if row["memory_error"] is None else f"{row['memory_error']:+.1%}"
            after = "calibr." if row["calibrates"] else f"{row['error_after']:+.1%}"
            interval = f"{row['before_fast_ms']:.1f}-{row['before_slow_ms']:.1f}"
            lines.append(
                f"{row['stage']:<24}{row['precision']:<6}{row['forward_ms']:>8.2f}"
                f"{row['backward_ms']:>8.2f}{row['update_ms']:>8.2f}{row['tflops']:>9.1f}"
                f"{interval:>16}{row['error_before']:>+8.1%}{after:>8}{row['peak_gib']:>7.1f}"
                f"{row['planned_gib']:>7.1f}{memory:>8}"
            )
        return "\n".join(lines)


def _four_digits(value: float) -> float:
    return float(f"{value:.4g}")
