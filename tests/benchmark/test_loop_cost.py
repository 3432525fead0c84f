"""Time that the loop spends outside schedule and optimizer is seen, and only that."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path

import pytest
from torch import Tensor

from megatron_mup.benchmark import loop_cost as module
from megatron_mup.benchmark.contestants import benchmark_run
from megatron_mup.benchmark.loop_cost import RandomTokens, loop_cost

TINY = benchmark_run(hidden_size=64, num_layers=1, seq_length=16, batch_size=2)


class SlowRandomTokens(RandomTokens):
    """As slow to read as several whole steps."""

    def __getitem__(self, index: int) -> Mapping[str, Tensor]:
        until = time.perf_counter() + 0.05
        while time.perf_counter() < until:
            pass
        return super().__getitem__(index)


def test_slow_reading_is_the_loops_and_not_the_engines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fast = loop_cost(TINY, "fast", tmp_path, steps=4)
    monkeypatch.setattr(module, "RandomTokens", SlowRandomTokens)
    slow = loop_cost(TINY, "slow", tmp_path, steps=4)
    assert fast.steps == slow.steps == 4
    # Two samples of 50 ms a step; more on a busy machine, never less.
    assert slow.step_seconds - slow.engine_seconds >= 0.1
    assert fast.step_seconds - fast.engine_seconds < 0.1
    assert slow.share > fast.share > 0


def test_a_share_above_the_limit_is_not_met() -> None:
    shared = {"model": "3M", "step_seconds": 1.0, "engine_seconds": 0.97, "steps": 4}
    assert not module.LoopCost(**shared, share=0.03, limit=0.02).met
    assert module.LoopCost(**shared, share=0.02, limit=0.02).met
