"""Time that the loop spends outside schedule and optimizer is seen, and only that."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from megatron.core.distributed import DistributedDataParallel
from torch import Tensor

from megatron_mup.benchmark import loop_cost as module
from megatron_mup.benchmark.contestants import benchmark_run
from megatron_mup.benchmark.loop_cost import (
    BATCHES,
    ENGINE,
    GUARDS,
    METRICS,
    PARTS,
    REST,
    SIGNALS,
    ZEROING,
    LoopCost,
    RandomTokens,
    loop_cost,
)
from megatron_mup.training.bad_steps import BadSteps, Verdict

TINY = benchmark_run(hidden_size=64, num_layers=1, seq_length=16, batch_size=2)


def work_for(seconds: float) -> None:
    until = time.perf_counter() + seconds
    while time.perf_counter() < until:
        pass


class SlowRandomTokens(RandomTokens):
    """As slow to read as several whole steps."""

    def __getitem__(self, index: int) -> Mapping[str, Tensor]:
        work_for(0.05)
        return super().__getitem__(index)


def test_slow_reading_is_the_loops_and_not_the_engines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fast = loop_cost(TINY, "fast", tmp_path, steps=4)
    monkeypatch.setattr(module, "RandomTokens", SlowRandomTokens)
    slow = loop_cost(TINY, "slow", tmp_path, steps=4)
    assert fast.steps == slow.steps == 4
    # Two samples of 50 ms a step; more on a busy machine, never less.
    assert slow.seconds[BATCHES] >= 0.1
    assert slow.step_seconds - slow.engine_seconds >= 0.1
    assert fast.step_seconds - fast.engine_seconds < 0.1
    assert slow.share > fast.share > 0
    # Every part of the loop has its clock.
    assert all(fast.seconds[part] > 0 for part in PARTS)


def test_a_slow_judge_inside_of_the_optimizer_step_is_the_loops(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    judge = BadSteps.judge

    def slow_judge(self: BadSteps, *arguments: Any) -> Verdict:
        work_for(0.2)
        return judge(self, *arguments)

    monkeypatch.setattr(BadSteps, "judge", slow_judge)
    cost = loop_cost(TINY, "slow", tmp_path, steps=4)
    assert cost.seconds[GUARDS] >= 0.2
    assert cost.step_seconds - cost.engine_seconds >= 0.2
    assert cost.engine_seconds < 0.2


def test_slow_zeroing_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    zero = DistributedDataParallel.zero_grad_buffer

    def slow_zero(self: Any) -> None:
        work_for(0.2)
        zero(self)

    monkeypatch.setattr(DistributedDataParallel, "zero_grad_buffer", slow_zero)
    assert loop_cost(TINY, "slow", tmp_path, steps=2).seconds[ZEROING] >= 0.2


def test_the_share_is_everything_but_schedule_and_optimizer() -> None:
    loop = {ZEROING: 0.01, BATCHES: 0.02, METRICS: 0.03, GUARDS: 0.04, SIGNALS: 0.05, REST: 0.1}
    cost = LoopCost("3M", {ENGINE: 0.75, **loop}, steps=4, limit=0.3)
    assert cost.step_seconds == pytest.approx(1.0)
    assert cost.share == pytest.approx(0.25)


def test_a_share_above_the_limit_is_not_met() -> None:
    seconds = {ENGINE: 0.75, BATCHES: 0.25}
    assert not LoopCost("3M", seconds, steps=4, limit=0.24).met
    assert LoopCost("3M", seconds, steps=4, limit=0.25).met
