"""Memory per rank: literal bytes, published formulas, and what autograd really keeps."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from megatron.core import tensor_parallel

from megatron_mup.config import RunConfig
from megatron_mup.dry_run import pretended_rank
from megatron_mup.memory import (
    ChunkContents,
    bubble_fraction,
    checkpoint_bytes,
    layer_activation_bytes,
    passes_in_flight,
    rank_memory,
)
from megatron_mup.model.gpt import build_model
from tests.configurations import tiny

FP8 = ("bf16=true", "fp8_format=hybrid", "transformer_impl=transformer_engine")


def chunk(
    *, layers: int = 2, matrices: int = 1000, others: int = 0, first: int = 0, readout: bool = False
) -> ChunkContents:
    return ChunkContents(
        layers=tuple(range(first, first + layers)),
        matrix_elements=matrices,
        other_elements=others,
        readout=readout,
    )


def state_bytes(run: RunConfig, *, data: int = 1, matrices: int = 1000, others: int = 0) -> float:
    """Weights, gradients and optimizer state."""
    memory = rank_memory(
        run, [chunk(matrices=matrices, others=others)], stage=0, data_parallel_size=data
    )
    assert memory.total == sum(
        (memory.weights, memory.gradients, memory.optimizer, memory.activations)
    )
    return memory.total - memory.activations


@pytest.mark.parametrize(
    ("options", "data", "per_parameter"),
    [
        # Megatron-LM's table of its distributed optimizer: 16 (fp32) and 18 (bf16 with fp32
        # gradients) bytes per parameter without it, 8 + 8/d and 6 + 12/d with it.
        ((), 4, 16),
        (("bf16=true",), 4, 18),
        (("use_distributed_optimizer=true",), 4, 8 + 8 / 4),
        (("bf16=true", "use_distributed_optimizer=true"), 4, 6 + 12 / 4),
        (("optimizer.optimizer=lion",), 1, 12),
        (("optimizer.optimizer=lion", "bf16=true"), 1, 14),
    ],
)
def test_state_of_a_parameter_takes_the_published_bytes(
    options: tuple[str, ...], data: int, per_parameter: float
) -> None:
    assert state_bytes(tiny(*options), data=data, matrices=700, others=300) == 1000 * per_parameter


def test_context_parallel_ranks_share_the_distributed_optimizer() -> None:
    options = ("use_distributed_optimizer=true", "context_parallel_size=2")
    run = tiny(*options, "transformer_impl=transformer_engine")
    assert state_bytes(run, data=2) == 1000 * (8 + 8 / 4)


def test_muon_keeps_one_moment_of_matrices_and_two_of_the_rest() -> None:
    run = tiny("optimizer.optimizer=muon")
    assert state_bytes(run, matrices=1000, others=0) == 1000 * 12
    assert state_bytes(run, matrices=0, others=1000) == 1000 * 16


def weight_bytes(*options: str, layers: int = 2, first: int = 0) -> float:
    run = tiny("num_layers=4", "base_num_layers=4", *options)
    contents = chunk(layers=layers, first=first, matrices=1000, others=100)
    return rank_memory(run, [contents], stage=0, data_parallel_size=1).weights


def test_fp8_weights_are_kept_beside_or_instead_of_bf16() -> None:
    assert weight_bytes("bf16=true") == 2 * 1100
    assert weight_bytes(*FP8) == 4 * 1000 + 2 * 100
    gathered = (*FP8, "fp8_param_gather=true", "use_distributed_optimizer=true")
    assert weight_bytes(*gathered) == 2 * 1000 + 2 * 100


def test_first_and_last_layers_in_bf16_have_no_fp8_copy() -> None:
    # Of layers 0 and 1, one is kept in bf16; of all four, two.
    options = (*FP8, "fp8_recipe=tensorwise", "first_last_layers_bf16=true")
    assert weight_bytes(*options) == 3 * 1000 + 2 * 100
    assert weight_bytes(*options, layers=2, first=1) == 4200
    assert weight_bytes(*options, layers=1, first=3) == 2200


def test_checkpoint_holds_weights_main_weights_and_moments() -> None:
    assert checkpoint_bytes(tiny(), 700, 300) == 12 * 1000
    assert checkpoint_bytes(tiny("bf16=true"), 700, 300) == 14 * 1000
    assert checkpoint_bytes(tiny("optimizer.optimizer=muon"), 700, 300) == 8 * 700 + 12 * 300


def test_a_bf16_layer_keeps_korthikantis_bytes_without_dropout() -> None:
    # arXiv:2205.05198, Section 4.1: 34 s b h without the scores' 5 a s^2 b; two dropout masks
    # less is 32. The query and key before rotation live on with the value: 4 more.
    run = tiny("bf16=true", "activation=gelu")
    assert layer_activation_bytes(run) == 36 * 16 * 2 * 64


def test_tensor_and_sequence_parallel_divide_what_they_split() -> None:
    # Per token: norms 4 x 64, attention 6 x 64, FFN 2 x 256, 4 bytes each; 32 tokens.
    assert layer_activation_bytes(tiny()) == 32 * 4 * (256 + 384 + 512)
    split = tiny("tensor_model_parallel_size=2")
    assert layer_activation_bytes(split) == 32 * 4 * (256 + 192 + 256)
    sequence = tiny("tensor_model_parallel_size=2", "sequence_parallel=true")
    assert layer_activation_bytes(sequence) == 32 * 4 * (128 + 192 + 256)


def test_context_parallel_divides_the_tokens() -> None:
    run = tiny("context_parallel_size=2", "transformer_impl=transformer_engine")
    assert layer_activation_bytes(run) == layer_activation_bytes(tiny()) / 2


def test_fp8_layers_keep_one_byte_inputs() -> None:
    # Wide, 2 bytes: norm inputs 2 x 64, attention 6 x 64, FFN input 256; narrow: norm outputs
    # 2 x 64, attention's output 64, second FFN input 256.
    run = tiny(*FP8, "activation=gelu")
    assert layer_activation_bytes(run, fp8=True) == 32 * (2 * (128 + 384 + 256) + 448)
    relu = tiny(*FP8, "activation=relu")
    assert layer_activation_bytes(relu, fp8=True) == 32 * (2 * (128 + 384 + 256) + 448)


def kept_bytes(run: RunConfig) -> int:
    """What autograd keeps of one forward pass, each storage once, without weights and buffers."""
    with pretended_rank(run, 0):
        tensor_parallel.model_parallel_cuda_manual_seed(run.training.seed)
        model = build_model(run, run.table)
        held = {t.untyped_storage().data_ptr() for t in [*model.parameters(), *model.buffers()]}
        kept: dict[int, torch.Tensor] = {}

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            if tensor.untyped_storage().data_ptr() not in held:
                kept[tensor.untyped_storage().data_ptr()] = tensor
            return tensor

        shape = (run.training.micro_batch_size, run.model.seq_length)
        ids = torch.zeros(shape, dtype=torch.int64)
        forward: Any = model
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            forward(ids, torch.arange(shape[1]).expand(shape), None, labels=ids)
        return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


WIDE = ("hidden_size=128", "base_hidden_size=128", "micro_batch_size=4", "seq_length=64")


@pytest.mark.parametrize(
    "options",
    [
        ("activation=relu",),
        ("activation=squared_relu",),
        ("activation=gelu",),
        ("activation=swiglu",),
        ("num_query_groups=2",),
        ("norm_gain=scalar",),
        ("attention_backend=local", "num_attention_heads=8", "base_kv_channels=16"),
        ("tensor_model_parallel_size=2",),
        ("tensor_model_parallel_size=2", "sequence_parallel=true"),
        (
            "recompute_granularity=selective",
            "attention_backend=local",
            "num_attention_heads=8",
            "base_kv_channels=16",
        ),
    ],
    ids=" ".join,
)
def test_a_layer_keeps_what_is_estimated(options: tuple[str, ...]) -> None:
    two = kept_bytes(tiny(*WIDE, "num_layers=2", *options))
    four = kept_bytes(tiny(*WIDE, "num_layers=4", *options))
    estimate = layer_activation_bytes(tiny(*WIDE, *options))
    # Row statistics and unshared rotary tables are not in the formula.
    assert (four - two) / 2 == pytest.approx(estimate, rel=0.01)


@pytest.mark.parametrize(
    "options",
    [
        (),
        ("tensor_model_parallel_size=2", "sequence_parallel=true"),
        ("vocab_size=4000", "num_layers=1"),
    ],
    ids=" ".join,
)
def test_a_whole_rank_keeps_what_is_estimated(options: tuple[str, ...]) -> None:
    run = tiny(*WIDE, *options)
    contents = [chunk(layers=run.model.num_layers, readout=True)]
    estimate = rank_memory(run, contents, stage=0, data_parallel_size=1).activations
    # Of so small a model, token ids and masks are another percent or two.
    assert kept_bytes(run) == pytest.approx(estimate, rel=0.03)


@pytest.mark.parametrize(
    ("options", "inputs", "again"),
    [
        (("recompute_method=uniform", "recompute_num_layers=1"), 4, 1),
        (("recompute_method=uniform", "recompute_num_layers=2"), 2, 2),
        (("recompute_method=block", "recompute_num_layers=4"), 4, 1),
    ],
)
def test_full_recomputation_keeps_inputs_and_works_on_one_group(
    options: tuple[str, ...], inputs: int, again: int
) -> None:
    base = (*WIDE, "num_layers=4", "recompute_granularity=full")
    run = tiny(*base, *options)
    estimate = rank_memory(run, [chunk(layers=4)], stage=0, data_parallel_size=1).activations
    layer = layer_activation_bytes(run)
    stream = 4 * 64 * 4 * 128
    assert estimate == inputs * stream + again * layer
    # What the forward pass keeps: inputs, and of the readout as without recomputation.
    readout = 2 * stream + 4 * 64 * 4 * 96
    assert kept_bytes(run) == pytest.approx(inputs * stream + readout, rel=0.03)


def test_block_recomputation_keeps_the_other_layers_whole() -> None:
    options = ("recompute_granularity=full", "recompute_method=block", "recompute_num_layers=3")
    run = tiny(*WIDE, "num_layers=4", *options)
    estimate = rank_memory(run, [chunk(layers=4)], stage=0, data_parallel_size=1).activations
    # The layer that is kept is free again before the first one is recomputed.
    assert estimate == 3 * (4 * 64 * 4 * 128) + layer_activation_bytes(run)


def pipeline(stages: int, chunks: int | None = None) -> RunConfig:
    options = ["num_layers=16", f"pipeline_model_parallel_size={stages}"]
    if chunks is not None:
        options.append(f"virtual_pipeline_model_parallel_size={chunks}")
    return tiny(*options)


def test_early_stages_hold_more_microbatches() -> None:
    assert [passes_in_flight(pipeline(4), stage, 8) for stage in range(4)] == [4, 3, 2, 1]
    assert [passes_in_flight(pipeline(4), stage, 2) for stage in range(4)] == [2, 2, 2, 1]
    assert passes_in_flight(tiny(), 0, 8) == 1


def test_interleaving_holds_more_by_korthikantis_factor() -> None:
    # arXiv:2205.05198, Section 4.2.3: L (1 + (p - 1)/(p m)) layers on the first stage.
    stages, chunks = 4, 2
    passes = passes_in_flight(pipeline(stages, chunks), 0, 64)
    layers = passes * 16 / (stages * chunks)
    assert layers == pytest.approx(16 * (1 + (stages - 1) / (stages * chunks)))
    assert passes_in_flight(pipeline(stages, chunks), 3, 64) == 5
    assert passes_in_flight(pipeline(stages, chunks), 0, 4) == 8


def test_activations_of_a_stage_are_those_of_the_passes_that_it_holds() -> None:
    plain, virtual = pipeline(4), pipeline(4, 2)
    layer = layer_activation_bytes(plain)
    memory = rank_memory(plain, [chunk(layers=4)], stage=1, data_parallel_size=1)
    # Global batch 4, microbatch 2: two microbatches, though the schedule would hold three.
    assert memory.activations == 2 * 4 * layer
    halves = [chunk(layers=2), chunk(layers=2, first=8)]
    memory = rank_memory(virtual, halves, stage=3, data_parallel_size=1)
    assert memory.activations == 4 * 2 * layer


def test_bubble_is_its_share_of_the_whole_step() -> None:
    assert bubble_fraction(tiny(), 8) == 0.0
    assert bubble_fraction(pipeline(4), 9) == 3 / 12
    assert math.isclose(bubble_fraction(pipeline(4, 2), 8), 3 / 19)
