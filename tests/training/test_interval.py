"""Metrics of a log interval against numbers worked out by hand."""

from __future__ import annotations

import itertools
import json
import math
import resource
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from megatron_mup.config import RunConfig
from megatron_mup.config_io import config_from_dict
from megatron_mup.training import interval as module
from megatron_mup.training.batches import micro_batches
from megatron_mup.training.interval import Interval, perplexity, step_times
from megatron_mup.training.meters import BusyClock, memory_bytes
from megatron_mup.training.processes import Launch, parallel_processes
from megatron_mup.training.role_metrics import (
    decay_text,
    decay_timescales,
    learning_rates,
    rows_by_role,
)
from megatron_mup.training.state import build_state
from megatron_mup.training.step import StepReport, evaluate_batches, train_step
from tests.configurations import TINY, tiny
from tests.distributed.spawn import run_ranks
from tests.random_samples import RandomSamples


@pytest.fixture
def one_rank() -> Iterator[None]:
    with parallel_processes(tiny(), Launch()):
        yield


class Clock:
    """Seconds that a test sets."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


def step(
    loss_sum: float = 0.0,
    tokens: float = 1.0,
    *,
    norm: float = 0.5,
    factor: float = 1.0,
    updated: bool = True,
) -> StepReport:
    return StepReport(torch.tensor([loss_sum, tokens]), norm, factor, updated)


def three_steps(run: RunConfig, clock: Clock, **options: float) -> Interval:
    """Six seconds: steps of 4, 4 and 6 sequences, the second of them skipped."""
    interval = Interval(run, clock=clock, flops_per_sample=3e12, **options)
    interval.add(step(100.0, 40.0, norm=2.0), batch_size=4)
    interval.add(step(math.nan, 40.0, norm=math.inf, updated=False), batch_size=4)
    interval.add(step(20.0, 20.0, norm=0.5, factor=0.25), batch_size=6)
    clock.now += 6.0
    return interval


@pytest.mark.usefixtures("one_rank")
def test_metrics_of_an_interval_are_the_formulas_of_the_documentation() -> None:
    clock = Clock()
    interval = three_steps(tiny("lr=0.5", "clip_grad=1"), clock, peak_flops=28e12)
    metrics = interval.close(consumed_samples=50, busy_seconds=4.5)
    expected = {
        # 120 nats over the 60 tokens of the steps that were not skipped.
        "lm loss": 2.0,
        "lm loss ppl": 7.38905609893065,
        # 60 of 10 x 16 positions.
        "unmasked-fraction": 0.375,
        "learning-rate": 0.125,
        # Width 64 over base 32 halves the rate of hidden matrices and readout.
        "learning-rate/embedding": 0.125,
        "learning-rate/query": 0.0625,
        "learning-rate/key": 0.0625,
        "learning-rate/value": 0.0625,
        "learning-rate/attention_out": 0.0625,
        "learning-rate/ffn_in": 0.0625,
        "learning-rate/ffn_out": 0.03125 * 2,
        "learning-rate/unembedding": 0.0625,
        "grad-norm": 0.5,
        "clipped-fraction": 1 / 3,
        "skipped-fraction": 1 / 3,
        "batch-size": 6.0,
        "consumed-samples": 50.0,
        "consumed-tokens": 800.0,
        "iteration-time": 2.0,
        "iteration-time-min": 2.0,
        "iteration-time-max": 2.0,
        "busy-time-min": 1.5,
        "busy-time-max": 1.5,
        # 14 sequences of 16 tokens in 6 seconds; 14 x 3 TFLOP in 6 seconds; 7 of 28 TFLOP/s.
        "tokens/sec": 224 / 6,
        "tokens/sec/device": 224 / 6,
        "tflops/device": 7.0,
        "mfu": 0.25,
    }
    memory = metrics.pop("mem-max-resident-bytes")
    assert metrics == pytest.approx(expected)
    assert 0 < memory <= 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


@pytest.mark.usefixtures("one_rank")
def test_an_interval_begins_anew_where_the_last_one_ended() -> None:
    clock = Clock()
    interval = three_steps(tiny(), clock)
    interval.close(consumed_samples=14)
    assert interval.close(consumed_samples=14) == {}
    clock.now += 1.0
    interval.add(step(6.0, 2.0), batch_size=2)
    metrics = interval.close(consumed_samples=16)
    assert metrics["lm loss"] == 3.0
    assert metrics["iteration-time"] == 1.0
    assert metrics["skipped-fraction"] == metrics["clipped-fraction"] == 0.0
    # 2 sequences of 16 tokens.
    assert metrics["tokens/sec"] == 32.0


@pytest.mark.usefixtures("one_rank")
def test_time_of_evaluation_and_saving_belongs_to_no_iteration() -> None:
    clock = Clock()
    interval = three_steps(tiny(), clock)
    with interval.paused():
        clock.now += 1000.0
    clock.now += 3.0
    assert interval.close(consumed_samples=14)["iteration-time"] == 3.0


@pytest.mark.usefixtures("one_rank")
def test_without_a_peak_or_a_busy_clock_nothing_is_made_up() -> None:
    metrics = three_steps(tiny(), Clock()).close(consumed_samples=14)
    assert not {"mfu", "busy-time-max", "slowest-rank"} & set(metrics)


@pytest.mark.usefixtures("one_rank")
def test_an_interval_of_skipped_steps_has_no_loss_but_a_speed() -> None:
    clock = Clock()
    interval = Interval(tiny(), clock=clock, flops_per_sample=1.0)
    interval.add(step(5.0, updated=False), batch_size=4)
    clock.now += 1.0
    metrics = interval.close(consumed_samples=4)
    assert math.isnan(metrics["lm loss"])
    assert math.isnan(metrics["lm loss ppl"])
    assert math.isnan(metrics["grad-norm"])
    assert (metrics["skipped-fraction"], metrics["tokens/sec"]) == (1.0, 64.0)


@pytest.mark.usefixtures("one_rank")
def test_closing_communicates_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    real = torch.distributed.all_reduce, torch.distributed.all_gather_into_tensor

    def count(index: int):
        def call(*args: object, **kwargs: object) -> object:
            calls.append(index)
            return real[index](*args, **kwargs)

        return call

    monkeypatch.setattr(torch.distributed, "all_reduce", count(0))
    monkeypatch.setattr(torch.distributed, "all_gather_into_tensor", count(1))
    interval = three_steps(tiny(), Clock())
    assert calls == []
    interval.close(consumed_samples=14)
    assert calls == [0, 1]


@pytest.mark.usefixtures("one_rank")
def test_the_sums_of_long_intervals_are_exact() -> None:
    interval = Interval(
        tiny(), clock=(float(tick) for tick in itertools.count()).__next__, flops_per_sample=1.0
    )
    # In float32 the sum would stop growing at 2^24.
    for loss_sum in (2.0**24, 1.0, 1.0):
        interval.add(step(loss_sum, 1.0), batch_size=1)
    assert interval.close(consumed_samples=3)["lm loss"] * 3 == 2**24 + 2


def test_perplexity_is_capped_as_in_megatron_and_keeps_nan() -> None:
    assert perplexity(0.0) == 1.0
    assert perplexity(1000.0) == perplexity(20.0) == pytest.approx(485165195.4097903)
    assert math.isnan(perplexity(math.nan))


def test_spread_names_the_rank_that_is_slow_among_its_peers() -> None:
    # Ranks 0 to 2 are the first stage, which always waits longest; ranks 3 to 5 the second.
    ranks = {
        "seconds": [20.0, 20.0, 22.0, 20.0, 20.0, 20.0],
        "busy": [10.0, 10.0, 10.0, 4.0, 7.0, 4.0],
        "stage": [0.0, 0.0, 0.0, 1.0, 1.0, 1.0],
    }
    assert step_times(ranks, steps=10, replicas=3) == pytest.approx(
        {
            "iteration-time": 2.2,
            "iteration-time-min": 2.0,
            "iteration-time-max": 2.2,
            "busy-time-min": 0.4,
            "busy-time-max": 1.0,
            "slowest-rank": 4.0,
            # 7 against a mean of 5.
            "slowest-rank-excess": 0.4,
        }
    )


def test_a_single_replica_has_no_slowest_rank() -> None:
    ranks = {"seconds": [1.0, 1.0], "busy": [0.5, 0.9], "stage": [0.0, 1.0]}
    assert "slowest-rank" not in step_times(ranks, steps=1, replicas=1)


def test_slowest_and_largest_of_all_ranks_count(monkeypatch: pytest.MonkeyPatch) -> None:
    def two_ranks(own: dict[str, float]) -> dict[str, list[float]]:
        return {name: [value, 3.0 * value] for name, value in own.items()}

    monkeypatch.setattr(module, "_gathered", two_ranks)
    monkeypatch.setattr(module, "memory_bytes", lambda: {"mem-max-resident-bytes": 7.0})
    clock = Clock()
    with parallel_processes(tiny(), Launch()):
        metrics = three_steps(tiny(), clock).close(consumed_samples=14)
    assert (metrics["iteration-time-min"], metrics["iteration-time"]) == (2.0, 6.0)
    assert metrics["mem-max-resident-bytes"] == 21.0
    # 14 sequences of 16 tokens in the slowest rank's 18 seconds, over two devices.
    assert metrics["tokens/sec"] == pytest.approx(224 / 18)
    assert metrics["tokens/sec/device"] == pytest.approx(112 / 18)
    assert metrics["tflops/device"] == pytest.approx(14 * 3 / 18 / 2)


def test_busy_time_ends_where_the_gradient_reduction_begins() -> None:
    run = tiny()
    samples = RandomSamples(run.model.vocab_size, run.model.seq_length)

    def batches():
        return micro_batches(
            samples, first=0, batch_size=4, micro_batch_size=2, data_rank=0, data_size=1
        )

    ticks = []
    with parallel_processes(run, Launch()):
        state = build_state(run)
        config = state.model_chunks[0].config
        reduce = config.finalize_model_grads_func

        def slow_reduce(*args: object, **kwargs: object) -> None:
            ticks.append(len(ticks))
            reduce(*args, **kwargs)

        config.finalize_model_grads_func = slow_reduce
        busy = BusyClock(config)
        now = iter([1.0, 3.5, 10.0, 10.25])
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("megatron_mup.training.meters.time.perf_counter", now.__next__)
            for _ in range(2):
                busy.begin()
                train_step(state, batches(), 2)
            # Neither a step that was not announced nor an evaluation is timed.
            train_step(state, batches(), 2)
            evaluate_batches(state, batches(), 2)
    assert len(ticks) == 3
    assert busy.take() == 2.75
    assert busy.take() == 0.0


def test_memory_is_that_of_the_process_in_bytes() -> None:
    (name,) = memory_bytes()
    # Python with torch takes more than 100 MB and less than a terabyte.
    assert name == "mem-max-resident-bytes"
    assert 1e8 < memory_bytes()[name] < 1e12


@pytest.mark.parametrize("parameterization", ["sp", "mup", "abs_mup"])
@pytest.mark.parametrize("form", ["folded", "multiplier"])
def test_a_role_has_one_learning_rate_and_one_decay(parameterization: str, form: str) -> None:
    if (parameterization, form) == ("sp", "multiplier"):
        form = "folded"
    run = tiny(
        f"parameterization.name={parameterization}",
        f"output_form={form}",
        "norm_gain=vector",
        "add_bias_linear=true",
        "weight_decay=0.1",
        "weight_decay_mask=all",
        "num_layers=3",
    )
    for row in run.table.rows:
        shown = rows_by_role(run.table)[row.tensor.role.value]
        assert (row.lr, row.decay_per_step) == (shown.lr, shown.decay_per_step)


def test_learning_rates_are_the_factor_times_each_peak() -> None:
    rates = learning_rates(tiny("lr=1", "hidden_size=128"), 0.5)
    assert rates["learning-rate/embedding"] == 0.5
    assert rates["learning-rate/query"] == 0.125


@pytest.mark.parametrize(
    ("mode", "hidden", "embedding"),
    [
        # A step at peak removes 0.004 of every matrix: 250 steps, half of a run of 500.
        ("independent", 0.5, 0.5),
        # LR 0.5 (0.25 for hidden matrices) times 0.004 a step: 500 and 1000 steps.
        ("coupled", 2.0, 1.0),
        # alpha x lambda for every matrix.
        ("constant_product", 1.0, 1.0),
    ],
)
def test_decay_timescale_is_one_over_the_decay_of_a_run_at_peak(
    mode: str, hidden: float, embedding: float
) -> None:
    run = tiny(
        "lr=0.5",
        "weight_decay=0.004",
        f"weight_decay_mode={mode}",
        "train_iters=500",
        "norm_gain=vector",
    )
    taus = decay_timescales(run)
    assert taus["decay-timescale/query"] == pytest.approx(hidden)
    assert taus["decay-timescale/embedding"] == pytest.approx(embedding)
    # Gains do not decay under the mask "matrices".
    assert "decay-timescale/gain" not in taus


def test_decay_text_groups_roles_and_counts_tokens() -> None:
    text = decay_text(tiny("weight_decay=0.004", "train_iters=500", "norm_gain=vector"))
    # 250 steps of 4 sequences of 16 tokens.
    assert "embedding, " in text
    assert "unembedding: 0.5 of the run, 1.6e+04 tokens" in text
    assert "gain: no decay" in text


def test_without_decay_there_is_no_timescale() -> None:
    assert decay_timescales(config_from_dict(TINY, [])) == {}


@pytest.mark.dist
def test_every_rank_gets_the_metrics_of_all(tmp_path: Path) -> None:
    cells = {"data": [], "pipeline": ["pipeline_model_parallel_size=2"]}
    job = {"world_size": 2, "cells": cells}
    run_ranks("tests.training.interval_worker", job, tmp_path)
    first, second = (json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in (0, 1))
    assert first == second
    for name, metrics in first.items():
        # Two steps in 10 and 11 seconds, 8 sequences of 16 tokens.
        # (6 + 24) nats over (1 + 2) tokens; only the last stage has the loss, 24 over 2.
        assert metrics["lm loss"] == (10.0 if name == "data" else 12.0)
        assert (metrics["iteration-time-min"], metrics["iteration-time"]) == (5.0, 5.5)
        assert (metrics["busy-time-min"], metrics["busy-time-max"]) == (0.5, 1.0)
        assert metrics["tokens/sec/device"] == pytest.approx(128 / 11 / 2)
        # Two stages are not compared with each other.
        assert metrics.get("slowest-rank") == (1.0 if name == "data" else None)
    # 2 seconds against a mean of 1.5.
    assert first["data"]["slowest-rank-excess"] == pytest.approx(1 / 3)
