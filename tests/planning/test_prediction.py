"""Step times and memory of one layout: literals, published throughputs, and what never turns."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_mup.config import RunConfig
from megatron_mup.planning.assumptions import DEFAULTS, Rates, ends
from megatron_mup.planning.prediction import Prediction, contents, stage_memory, step_time
from tests.planning.machines import H100, PERFECT, planned, rates

SHARDED = (
    "use_distributed_optimizer=true",
    "overlap_grad_reduce=true",
    "overlap_param_gather=true",
)


def predicted(
    run: RunConfig, gpus: int, fast: Rates = PERFECT, slow: Rates = PERFECT
) -> Prediction:
    held = contents(run)
    data_size = gpus // run.parallel.model_parallel_size
    return Prediction(
        run=run,
        gpus=gpus,
        memory=stage_memory(run, held, data_parallel_size=data_size, rates=slow),
        slow=step_time(run, held, gpu=H100, gpus=gpus, rates=slow),
        fast=step_time(run, held, gpu=H100, gpus=gpus, rates=fast),
        peak=H100.peak_flops(fp8=run.precision.fp8_format is not None),
    )


def test_a_step_of_the_tiny_run_is_what_its_bytes_take() -> None:
    step = predicted(planned(), 1).fast
    # Two microbatches through two layers and the readout; see test_seconds.py for the bytes.
    layer, scores = 163840 + 90112, 2 * 32 * 16 * 64
    readout = 3 * 22528 + 147456
    assert step.compute == pytest.approx(
        2 * (2 * 3 * layer + readout) / 3.35e12 + 2 * 2 * 3.5 * scores / 989.4e12
    )
    # 110,592 parameters: 12 bytes of state read and written, 8 of gradients, 2 of weights, 4
    # cleared.
    assert step.update == pytest.approx(110592 * (24 + 8 + 2 + 4) / 3.35e12)
    assert (step.tensor, step.stages, step.bubble, step.data) == (0, 0, 0, 0)


def test_a_pipeline_waits_its_bubble_and_its_slowest_stage_sets_the_pace() -> None:
    run = planned("pipeline_model_parallel_size=2", "global_batch_size=8")
    step = predicted(run, 2).fast
    layer, scores, readout = 163840 + 90112, 2 * 32 * 16 * 64, 3 * 22528 + 147456
    last = (3 * layer + readout) / 3.35e12 + 3.5 * scores / 989.4e12
    assert step.compute == pytest.approx(4 * last)
    assert step.stages == pytest.approx(4 * 2 * 4096 / 450e9)
    # (P - 1) microbatches more.
    assert step.bubble == pytest.approx(last + 2 * 4096 / 450e9)


def test_the_optimizers_share_is_updated_by_each_rank() -> None:
    whole = predicted(planned("micro_batch_size=1"), 4).fast.update
    shared = predicted(planned("micro_batch_size=1", SHARDED[0]), 4).fast.update
    assert whole * 3.35e12 == pytest.approx(110592 * 38)
    assert shared * 3.35e12 == pytest.approx(110592 * (34 / 4 + 4))


def test_memory_has_workspace_and_context_on_top() -> None:
    run = planned("pipeline_model_parallel_size=2", "tensor_model_parallel_size=2")
    first, last = stage_memory(
        run, contents(run), data_parallel_size=1, rates=rates(context_gigabytes=3)
    )
    # Per token 2 x 128 of the FFN and 2 x 64 of the stream; half of a 64 x 256 matrix; 2 bytes.
    assert first.workspace == last.workspace == 2 * (32 * (256 + 128) + 8192)
    assert first.context == 3e9
    assert first.total == first.counted.total + first.workspace + 3e9
    assert (first.counted.logits, last.counted.logits) == (0, 32 * (2 * 128 + 6 * 48))
    wide = planned("vocab_size=9600", "pipeline_model_parallel_size=2")
    stages = stage_memory(wide, contents(wide), data_parallel_size=1, rates=PERFECT)
    assert stages[1].workspace == 2 * (32 + 64) * 9600


def test_throughput_is_tokens_and_model_flops_over_the_step() -> None:
    one = predicted(planned(), 1, slow=rates(memory_efficiency=0.5))
    assert one.slow.total > one.fast.total
    assert one.tokens_per_second == (64 / one.slow.total, 64 / one.fast.total)
    # 64 tokens; 6 FLOPs for each of 2 x (12 x 64 x 64 + 2 x 16 x 64) + 64 x 96.
    flops = 64 * 6 * (2 * (49152 + 2048) + 6144)
    assert one.tflops_per_gpu[1] == pytest.approx(flops / one.fast.total / 1e12)
    assert one.mfu[1] == pytest.approx(flops / one.fast.total / 989.4e12)
    assert one.gpu_hours(400) == pytest.approx(
        (100 * one.fast.total / 3600, 100 * one.slow.total / 3600)
    )


LLAMA_8B = (
    "num_layers=32",
    "hidden_size=4096",
    "num_attention_heads=32",
    "num_query_groups=8",
    "ffn_hidden_size=14336",
    "activation=swiglu",
    "vocab_size=128256",
    "seq_length=8192",
    "micro_batch_size=1",
    "global_batch_size=128",
)


@pytest.mark.parametrize(
    ("options", "gpus", "published"),
    [
        # Megatron-LM's README: 1.7B parameters in bf16; width, depth, sequence and vocabulary are
        # its own, microbatch and ranks are not given there.
        (
            (
                *("num_layers=24", "hidden_size=2048", "num_attention_heads=16"),
                *("vocab_size=131072", "seq_length=4096", "micro_batch_size=4"),
                "global_batch_size=256",
            ),
            8,
            408.8,
        ),
        # Megatron-Bridge 25.11: Llama 3 8B in FP8 on 8 H100.
        ((*LLAMA_8B, "fp8_format=hybrid"), 8, 744.0),
    ],
    ids=["1.7B", "8B FP8"],
)
def test_published_throughputs_lie_between_slow_and_fast(
    options: tuple[str, ...], gpus: int, published: float
) -> None:
    slow, fast = ends(DEFAULTS)
    run = planned(
        "parameterization.name=sp",
        "base_hidden_size=null",
        "base_ffn_hidden_size=null",
        "base_kv_channels=null",
        "base_num_layers=null",
        *SHARDED,
        *options,
    )
    low, high = predicted(run, gpus, fast=fast, slow=slow).tflops_per_gpu
    # The assumptions were set so; what is tested is that they stay so, and say something.
    assert low < published < high < 2.5 * low


layouts = st.fixed_dictionaries(
    {
        "tensor": st.sampled_from([1, 2, 4]),
        "stages": st.sampled_from([1, 2, 4]),
        "micro": st.sampled_from([1, 2, 4]),
        "fp8": st.booleans(),
        "sharded": st.booleans(),
        "recompute": st.sampled_from(["null", "full"]),
    }
)


def in_layout(chosen: dict[str, object]) -> RunConfig:
    options = [
        "num_layers=8",
        "base_num_layers=8",
        "hidden_size=128",
        "num_attention_heads=8",
        "seq_length=64",
        "global_batch_size=256",
        "norm_gain=vector",
        f"tensor_model_parallel_size={chosen['tensor']}",
        f"pipeline_model_parallel_size={chosen['stages']}",
        f"micro_batch_size={chosen['micro']}",
        f"use_distributed_optimizer={str(chosen['sharded']).lower()}",
    ]
    if chosen["fp8"]:
        options.append("fp8_format=hybrid")
    if chosen["recompute"] == "full":
        options += [
            "recompute_granularity=full",
            "recompute_method=uniform",
            "recompute_num_layers=1",
        ]
    return planned(*options)


def parts(one: Prediction) -> list[list[float]]:
    return [
        [
            s.counted.weights,
            s.counted.gradients,
            s.counted.optimizer,
            s.counted.activations,
            s.total,
        ]
        for s in one.memory
    ]


def largest(one: Prediction) -> list[float]:
    return [max(column) for column in zip(*parts(one), strict=True)]


def never_more(after: list[float], before: list[float]) -> bool:
    return all(left <= right * (1 + 1e-12) for left, right in zip(after, before, strict=True))


@settings(max_examples=12, deadline=None)
@given(chosen=layouts)
def test_more_ranks_never_need_more_memory_each(chosen: dict[str, object]) -> None:
    before = largest(predicted(in_layout(chosen), 16))
    twice_the_data = predicted(in_layout(chosen), 32)
    assert never_more(largest(twice_the_data), before)
    tensor = predicted(in_layout({**chosen, "tensor": 2 * int(str(chosen["tensor"]))}), 32)
    assert never_more(largest(tensor), before)
    # More stages hold more microbatches of fewer layers; their weights are fewer at any rate.
    stages = predicted(in_layout({**chosen, "stages": 2 * int(str(chosen["stages"]))}), 32)
    assert never_more(largest(stages)[:3], before[:3])


@settings(max_examples=12, deadline=None)
@given(chosen=layouts)
def test_larger_microbatches_never_need_less_memory(chosen: dict[str, object]) -> None:
    twice = in_layout({**chosen, "micro": 2 * int(str(chosen["micro"]))})
    assert never_more(largest(predicted(in_layout(chosen), 16)), largest(predicted(twice, 16)))


@settings(max_examples=12, deadline=None)
@given(chosen=layouts)
def test_recomputation_saves_memory_for_time(chosen: dict[str, object]) -> None:
    slow, fast = ends(DEFAULTS)
    none, full = (
        predicted(in_layout({**chosen, "recompute": kind}), 16, fast=fast, slow=slow)
        for kind in ("null", "full")
    )
    assert full.peak_memory <= none.peak_memory
    assert full.fast.total > none.fast.total
    assert none.fast.total < none.slow.total
    assert full.fast.total < full.slow.total
