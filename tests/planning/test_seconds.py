"""Seconds of kernels and transfers, computed by hand with perfect rates."""

from __future__ import annotations

import pytest

from megatron_mup.planning.communication import (
    data_seconds,
    stage_transfer_seconds,
    tensor_seconds,
)
from megatron_mup.planning.compute import Seconds, Speed, layer_seconds, stage_seconds
from megatron_mup.planning.contents import chunk_contents
from tests.planning.machines import H100, links, planned, rates

MEMORY, PEAK, NVLINK = 3.35e12, 989.4e12, 450e9
# A layer of width 64 for 32 tokens, bytes of its forward pass: four products (inputs, weights and
# outputs in 2 bytes), and 10 x 64 + 2 x 8 x 16 + 2 x 256 elements of a token beside them.
PRODUCTS = 40960 + 16384 + 53248 + 53248
REST = 32 * 1408 * 2
SCORES = 2 * 32 * 16 * 64 / PEAK
TWO_TO_THREE = Seconds(forward=2.0, backward=3.0)


def speed(**changes: float) -> Speed:
    return Speed(gpu=H100, rates=rates(**changes))


def test_a_small_layer_takes_the_seconds_of_its_bytes() -> None:
    layer = layer_seconds(planned(), speed(), fp8=False)
    assert layer.forward == pytest.approx((PRODUCTS + REST) / MEMORY + SCORES)
    assert layer.backward == pytest.approx(2 * (PRODUCTS + REST) / MEMORY + 2.5 * SCORES)


def test_a_large_product_takes_the_seconds_of_its_flops() -> None:
    half = speed(matrix_efficiency_bf16=0.5)
    assert half.product(8192, 8192, 8192, fp8=False) == 4 * 8192**3 / PEAK
    assert speed(launch_seconds=1e-3).product(8192, 8192, 8192, fp8=True) == pytest.approx(
        2 * 8192**3 / 1978.9e12 + 1e-3
    )


def test_casts_make_small_fp8_products_slower_and_leave_large_ones_faster() -> None:
    # torchao's table has 0.80 and 1.39.
    for sizes, low, high in (((1024, 2048, 1024), 0.4, 1.0), ((4096, 8192, 16384), 1.2, 1.5)):
        rows, inner, columns = sizes
        card = speed(matrix_efficiency_bf16=0.75, matrix_efficiency_fp8=0.65, launch_seconds=1e-6)
        casts = card.cast(rows * inner) + card.cast(inner * columns)
        gain = card.product(*sizes, fp8=False) / (card.product(*sizes, fp8=True) + casts)
        assert low < gain < high


def test_fp8_layers_cast_inputs_forward_and_gradients_backward() -> None:
    bf16, fp8 = (layer_seconds(planned(), speed(), fp8=fp8) for fp8 in (False, True))
    # One-byte operands save a byte of each input and weight, 2 casts of 4 bytes are added.
    saved = 3 * (2048 + 8192 / 3) + 12288 + 4096 + 16384 + 16384
    inputs, outputs = 4 * (3 * 2048 + 8192), 4 * (6144 + 2048 + 8192 + 2048)
    assert (fp8.forward - bf16.forward) * MEMORY == pytest.approx(inputs - saved)
    assert (fp8.backward - bf16.backward) * MEMORY == pytest.approx(outputs - 2 * saved)


def test_the_last_stage_adds_logits_and_loss() -> None:
    run = planned()
    layer = layer_seconds(run, speed(), fp8=False)
    stage = stage_seconds(run, chunk_contents(run, 0), speed())
    product, loss = 2 * (2048 + 6144 + 3072), 48 * 32 * 96
    assert stage.forward - 2 * layer.forward == pytest.approx((product + loss / 2) / MEMORY)
    assert stage.backward - 2 * layer.backward == pytest.approx((2 * product + loss / 2) / MEMORY)


@pytest.mark.parametrize(
    ("options", "layers", "attentions"),
    [
        (("recompute_granularity=selective",), 0, 4),
        (
            (
                "recompute_granularity=full",
                "recompute_method=uniform",
                "recompute_num_layers=2",
            ),
            4,
            0,
        ),
        (("recompute_granularity=full", "recompute_method=block", "recompute_num_layers=3"), 3, 0),
    ],
)
def test_recomputation_repeats_forward_passes_in_the_backward_pass(
    options: tuple[str, ...], layers: int, attentions: int
) -> None:
    deep = ("num_layers=4", "base_num_layers=4")
    plain, again = planned(*deep), planned(*deep, *options)
    contents = chunk_contents(plain, 0)
    without, with_it = (stage_seconds(run, contents, speed()) for run in (plain, again))
    assert with_it.forward == without.forward
    one = layer_seconds(plain, speed(), fp8=False).forward
    assert with_it.backward - without.backward == pytest.approx(layers * one + attentions * SCORES)


def test_unfused_attention_moves_its_scores() -> None:
    run = planned("transformer_impl=local", "attention_backend=local")
    fused = layer_seconds(planned(), speed(), fp8=False)
    layer = layer_seconds(run, speed(), fp8=False)
    scores = 24 * 32 * 16 * 4 / MEMORY + SCORES
    assert layer.forward - fused.forward == pytest.approx(scores)


def test_a_measured_rate_replaces_the_kernels_estimate() -> None:
    run = planned("tensor_model_parallel_size=2")
    layer = layer_seconds(run, speed(compute_tflops_bf16=100), fp8=False)
    # Two sequences: 6 FLOPs for 12 x 64 x 64 elements and 2 x 16 x 64 scores of a token; 2 ranks.
    seconds = 2 * 16 * 6 * (12 * 64 * 64 + 2 * 16 * 64) / 100e12 / 2
    assert layer.forward == pytest.approx(seconds / 3)
    assert layer.total == pytest.approx(seconds)


def test_tensor_parallel_layers_reduce_twice_each_way() -> None:
    run = planned("tensor_model_parallel_size=2")
    # Half of 32 x 64 x 2 bytes out and in, two of these in each of 3 layers.
    one = 2 * 0.5 * 4096 / NVLINK
    assert tensor_seconds(run, 3, links(2)) == Seconds(forward=6 * one, backward=6 * one)
    assert tensor_seconds(planned(), 3, links(2)).total == 0.0
    late = tensor_seconds(run, 3, links(2, collective_seconds=1e-3))
    assert late.forward == pytest.approx(6 * (one + 1e-3))
    full = planned(
        "tensor_model_parallel_size=2",
        "recompute_granularity=full",
        "recompute_method=block",
        "recompute_num_layers=2",
    )
    assert tensor_seconds(full, 3, links(2)).backward == pytest.approx(10 * one)


def test_stages_hand_on_activations_inside_a_node_or_over_the_network() -> None:
    run = planned("pipeline_model_parallel_size=2")
    assert stage_transfer_seconds(run, links(8)) == pytest.approx(2 * 4096 / NVLINK)
    assert stage_transfer_seconds(run, links(16)) == pytest.approx(2 * 4096 / 50e9)
    assert stage_transfer_seconds(planned(), links(16)) == 0.0
    virtual = ("num_layers=4", "base_num_layers=4", "virtual_pipeline_model_parallel_size=2")
    chunks = planned("pipeline_model_parallel_size=2", *virtual)
    shown = stage_transfer_seconds(chunks, links(16, overlap=0.75))
    assert shown == pytest.approx(0.25 * 4 * 4096 / 50e9)


def waits(*options: str, gpus: int, elements: int = 10**9, **changes: float) -> float:
    """Seconds beside a microbatch of 2 and 3 seconds."""
    run = planned(*options)
    return data_seconds(run, elements, links(gpus, **changes), microbatch=TWO_TO_THREE)


def test_gradients_and_weights_of_a_node_go_over_nvlink() -> None:
    sharded = "use_distributed_optimizer=true"
    # 4 bytes scattered and 2 gathered, or 4 bytes reduced for all.
    assert waits(sharded, gpus=4) == pytest.approx(0.75 * 6e9 / NVLINK)
    assert waits(gpus=4) == pytest.approx(0.75 * 8e9 / NVLINK)
    assert waits(gpus=1) == 0.0
    assert waits("pipeline_model_parallel_size=2", gpus=2) == 0.0


def test_gradients_leave_a_node_by_the_adapters_of_the_groups_members() -> None:
    sharded = "use_distributed_optimizer=true"
    assert waits(sharded, gpus=16) == pytest.approx(15 / 16 * 6e9 / 400e9)
    # With 4 tensor-parallel ranks a group has 2 members in a node.
    split = ("tensor_model_parallel_size=4", sharded)
    assert waits(*split, gpus=64) == pytest.approx(15 / 16 * 6e9 / 100e9)


def test_overlap_hides_transfers_behind_one_microbatch_at_most() -> None:
    options = ("use_distributed_optimizer=true", "overlap_grad_reduce=true")
    gathers = (*options, "overlap_param_gather=true")
    # 8 s to scatter and 4 s to gather by 8 adapters of a node; 3 s and 2 s of work to hide behind.
    elements = 2 * 400 * 10**9 * 16 // 15
    whole = waits("use_distributed_optimizer=true", gpus=16, elements=elements)
    assert whole == pytest.approx(12.0)
    assert waits(*options, gpus=16, elements=elements) == pytest.approx(12.0 - 3)
    assert waits(*gathers, gpus=16, elements=elements) == pytest.approx(12.0 - 5)
    assert waits(*gathers, gpus=16, elements=elements, overlap=0.5) == pytest.approx(12.0 - 2.5)
