"""Plans of whole runs: the 10B run's totals, refusals by reason, and what the dry run accepts."""

from __future__ import annotations

import dataclasses
from functools import cache
from pathlib import Path

import pytest

from megatron_mup.config import RunConfig
from megatron_mup.config_io import config_from_dict
from megatron_mup.dry_run import dry_run
from megatron_mup.errors import ConfigError
from megatron_mup.planning.assumptions import DEFAULTS
from megatron_mup.planning.command import load_without_rate
from megatron_mup.planning.gpus import GPUS, GpuName
from megatron_mup.planning.layouts import Refusals, Split, data_parallel_size, splits
from megatron_mup.planning.plan import Plan, make_plan
from megatron_mup.planning.report import as_arguments, render, to_json
from megatron_mup.run_source import RunSource
from tests.configurations import TINY
from tests.planning.machines import H100, planned

TEN_BILLION = Path(__file__).parents[2] / "launch" / "configs" / "mup_10b.yaml"
ELSEWHERE = "data.train_data_path=[elsewhere/train]"


def plan_of(run: RunConfig, gpus: int) -> Plan:
    return make_plan(run, gpu=H100, gpus=gpus, assumptions=DEFAULTS)


def ten_billion_run(*overrides: str) -> RunConfig:
    return load_without_rate(RunSource(config=TEN_BILLION), list(overrides))


@cache
def tiny_plan() -> Plan:
    return plan_of(planned("global_batch_size=8", ELSEWHERE), 4)


@cache
def ten_billion() -> Plan:
    # 16 sequences a GPU: the microbatch is not what these tests are about.
    return plan_of(ten_billion_run("global_batch_size=1024", "train_iters=720000"), 64)


def test_the_10b_run_has_its_published_size_and_compute() -> None:
    plan = ten_billion()
    # arXiv:2404.05728: 12 x 12 x 8192^2 and two matrices of 32,100 rows, padded to 32,128.
    assert plan.parameters == 12 * 12 * 8192**2 + 2 * 32128 * 8192 == 10_190_061_568
    tokens = 90_000 * 2**21
    per_token = 6 * (12 * 12 * 8192**2 + 12 * 2 * 256 * 8192 + 32128 * 8192)
    assert plan.samples * 256 == tokens
    assert plan.flops == pytest.approx(per_token * tokens) == pytest.approx(1.13e22, rel=0.001)


def test_the_10b_run_takes_the_gpu_hours_that_published_throughputs_give() -> None:
    # 480 to 744 TFLOP/s a GPU are 6,500 to 4,200 hours.
    fast, slow = ten_billion().best.gpu_hours(ten_billion().samples)
    assert fast < 4200 < 6500 < slow < 3 * fast


def test_the_10b_run_fits_when_its_state_is_shared() -> None:
    plan = ten_billion()
    for layout in plan.layouts:
        parallel = layout.run.parallel
        split = parallel.tensor_model_parallel_size * parallel.pipeline_model_parallel_size
        # Whole, 10.19e9 parameters take 2 + 4 + 8 bytes; shared out, the last 8 are few.
        assert split > 1 or parallel.use_distributed_optimizer
        assert layout.peak_memory <= 0.9 * 80e9
    reasons = " ".join(message for _, message in plan.refusals.lines())
    assert "num_layers 12 is not divisible by pipeline_model_parallel_size 8" in reasons
    assert "tensor_model_parallel_size 16 exceeds the 8 GPUs of a node" in reasons
    assert "weights, gradients and optimizer alone" in reasons
    assert "64 GPUs are no multiple of tensor 1 x pipeline 3" in reasons
    assert "selective saves nothing" in reasons


def test_layouts_are_ranked_by_the_middle_of_their_step_time() -> None:
    plan = tiny_plan()
    middles = [layout.slow.total * layout.fast.total for layout in plan.layouts]
    assert middles == sorted(middles)
    assert plan.best is plan.layouts[0]
    assert {one.run.precision.fp8_format for one in plan.layouts} > {None}
    assert {one.run.parallel.pipeline_model_parallel_size for one in plan.layouts} == {1, 2}


def test_every_layout_and_every_refusal_is_counted_once() -> None:
    plan = tiny_plan()
    options = [tuple(as_arguments(layout)) for layout in plan.layouts]
    assert len(set(options)) == len(options)
    # TP x PP of 1x1, 1x2, 2x1, 2x2, 4x1 with 4, 3, 3, 2, 2 microbatch sizes and as many ranks for
    # data: 2 precisions, 3 recomputations, sharded or not where there are copies.
    every = 6 * (2 * 2 + 2 * 3 + 2 * 3 + 1 * 4 + 1 * 4)
    assert len(plan.layouts) + sum(plan.refusals.counts.values()) == every


@pytest.mark.parametrize("position", [0, 1, -1])
def test_the_dry_run_accepts_what_a_plan_proposes(position: int) -> None:
    layout = tiny_plan().layouts[position]
    pasted = [
        *("bf16=true", "transformer_impl=transformer_engine", "global_batch_size=8", ELSEWHERE),
        *as_arguments(layout),
    ]
    run = config_from_dict(TINY, pasted)
    report = dry_run(run, world_size=4)
    assert report.microbatches == layout.microbatches
    assert report.data_parallel_size == layout.data_parallel_size
    counted = [stage.counted for stage in layout.memory]
    assert [stage.memory for stage in report.stages] == counted


def test_arguments_undo_a_layout_that_the_configuration_has() -> None:
    given = planned(
        "recompute_granularity=full",
        "recompute_method=uniform",
        "recompute_num_layers=1",
        "fp8_format=hybrid",
        "fp8_recipe=tensorwise",
        "first_last_layers_bf16=true",
        "num_layers=4",
        "base_num_layers=4",
    )
    plan = plan_of(given, 1)
    plain = next(
        one
        for one in plan.layouts
        if one.run.precision.fp8_format is None and one.run.recompute.recompute_granularity is None
    )
    assert "fp8_format=null" in as_arguments(plain)
    assert "first_last_layers_bf16=false" in as_arguments(plain)
    assert "recompute_method=null" in as_arguments(plain)


def test_muon_gathers_late_and_splits_whole_query_groups_only() -> None:
    run = planned("optimizer.optimizer=muon", "num_query_groups=2", "global_batch_size=8")
    plan = plan_of(run, 4)
    sharded = [
        one.run.parallel for one in plan.layouts if one.run.parallel.use_distributed_optimizer
    ]
    assert {parallel.overlap_param_gather for parallel in sharded} == {False}
    adam = [one.run.parallel for one in tiny_plan().layouts]
    assert all(one.overlap_param_gather is one.use_distributed_optimizer for one in adam)
    reasons = " ".join(message for _, message in plan.refusals.lines())
    assert "muon needs whole query groups on every rank" in reasons


def test_context_parallel_ranks_are_kept() -> None:
    plan = plan_of(planned("context_parallel_size=2", "global_batch_size=8"), 4)
    assert {one.run.parallel.context_parallel_size for one in plan.layouts} == {2}
    assert {one.data_parallel_size for one in plan.layouts} == {1, 2}


def test_fp8_that_the_local_spec_cannot_run_is_refused_with_its_cure() -> None:
    plan = plan_of(planned("transformer_impl=local"), 1)
    assert {one.run.precision.fp8_format for one in plan.layouts} == {None}
    reasons = " ".join(message for _, message in plan.refusals.lines())
    assert "set model.transformer_impl=transformer_engine" in reasons


def test_refusals_that_differ_in_numbers_are_one() -> None:
    refusals = Refusals()
    refusals.add("12 heads on 8 ranks")
    refusals.add("no memory", 3)
    refusals.add("12 heads on 5,000.5 ranks")
    assert refusals.lines() == [(3, "no memory"), (2, "12 heads on 8 ranks")]


def test_splits_double_ranks_and_divide_layers() -> None:
    run = planned("num_layers=6", "base_num_layers=6")
    found = [(one.tensor, one.stages, one.chunks) for one in splits(run, 6)]
    assert found == [
        *((1, 1, 1), (1, 2, 1), (1, 2, 3), (1, 3, 1), (1, 3, 2), (1, 4, 1), (1, 6, 1)),
        *((2, 1, 1), (2, 2, 1), (2, 2, 3), (2, 3, 1), (2, 3, 2)),
        (4, 1, 1),
    ]


def test_tensor_parallel_ranks_stay_in_a_node() -> None:
    run = planned()
    split = Split(tensor=4, stages=1, chunks=1)
    assert data_parallel_size(run, split, 8, node_size=4) == 2
    with pytest.raises(ConfigError, match="size 4 exceeds the 2 GPUs of a node"):
        data_parallel_size(run, split, 8, node_size=2)


def test_a_run_that_fits_nowhere_is_refused_with_the_reasons() -> None:
    run = ten_billion_run()
    with pytest.raises(ConfigError) as caught:
        plan_of(run, 1)
    assert "no layout of this run fits 1 x h100" in str(caught.value)
    # 14 microbatch sizes up to 8,192, none and full recomputation, bf16 and FP8.
    assert "56 x out of memory" in str(caught.value)
    assert "weights, gradients and optimizer alone" in str(caught.value)
    assert "Raise --gpus" in str(caught.value)


def test_impossible_requests_are_refused() -> None:
    with pytest.raises(ConfigError, match="--gpus is 0"):
        plan_of(planned(), 0)
    with pytest.raises(ConfigError, match=r"set precision\.bf16=true"):
        plan_of(planned("bf16=false"), 1)


def test_a_calibrated_plan_gives_numbers_and_an_uncalibrated_one_intervals() -> None:
    exact = {
        name: dataclasses.replace(one, fast=one.slow) if one.known else one
        for name, one in DEFAULTS.items()
    }
    run = planned()
    measured = make_plan(run, gpu=H100, gpus=1, assumptions=exact)
    assert measured.best.slow == measured.best.fast
    assert "from the calibration's numbers" in render(measured, top=1)
    assert "not measured on h100: intervals from 9 assumptions" in render(tiny_plan(), top=1)


def test_a_gpu_with_more_memory_fits_more_layouts() -> None:
    run = ten_billion_run("global_batch_size=8", "micro_batch_size=1")
    counts = [
        len(make_plan(run, gpu=GPUS[name], gpus=8, assumptions=DEFAULTS).layouts)
        for name in (GpuName.H100, GpuName.H200)
    ]
    assert counts[0] < counts[1]


def test_json_has_every_part_unrounded() -> None:
    plan = tiny_plan()
    data = to_json(plan, top=2)
    assert len(data["layouts"]) == 2
    best = data["layouts"][0]
    assert best["memory_bytes"][0]["total"] == plan.best.memory[0].total
    assert best["step_seconds"]["slow"]["total"] == plan.best.slow.total
    assert best["gpu_hours"]["fast"] == plan.best.gpu_hours(plan.samples)[0]
    assert best["options"]["training"] == {"micro_batch_size": layout_size(plan)}
    assert data["assumptions"]["compute_tflops_fp8"]["slow"] is None
    assert sum(item["count"] for item in data["refused"]) == sum(plan.refusals.counts.values())


def layout_size(plan: Plan) -> int:
    return plan.best.run.training.micro_batch_size
