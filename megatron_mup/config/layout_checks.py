"""Relations between layout, precision, recomputation and the model; each refusal names the cure."""

from __future__ import annotations

from typing import TYPE_CHECKING

from megatron_mup.config.checks import require
from megatron_mup.config.choices import (
    AttentionBackend,
    OptimizerName,
    RecomputeGranularity,
    TransformerImpl,
)

if TYPE_CHECKING:
    from megatron_mup.config.run import RunConfig


def check_layout_relations(run: RunConfig) -> None:
    """Check everything that a layout asks of the other sections.

    Raises:
        ConfigError: with both options and the cure.
    """
    _check_tensor_parallel(run)
    _check_pipeline(run)
    _check_context_parallel(run)
    _check_fp8(run)
    _check_recompute(run)
    _check_optimizer(run)


def _check_tensor_parallel(run: RunConfig) -> None:
    model, tensor = run.model, run.parallel.tensor_model_parallel_size
    for name, size in (
        ("hidden_size", model.hidden_size),
        ("num_attention_heads", model.num_attention_heads),
        ("ffn_hidden_size", model.ffn_width),
        ("vocab_size (with make_vocab_size_divisible_by)", model.padded_vocab_size),
    ):
        require(
            size % tensor == 0,
            f"model: {name} {size} is not divisible by tensor_model_parallel_size {tensor}; "
            "change one of them",
        )
    groups = model.query_groups
    require(
        groups % tensor == 0 or tensor % groups == 0,
        f"model: num_query_groups {groups} is neither a multiple nor a divisor of "
        f"tensor_model_parallel_size {tensor}; change one of them",
    )
    context = run.parallel.context_parallel_size
    require(
        not run.parallel.sequence_parallel or model.seq_length // context % tensor == 0,
        f"model.seq_length {model.seq_length}"
        + (f" / context_parallel_size {context}" if context > 1 else "")
        + f" is not divisible by tensor_model_parallel_size {tensor}, over which "
        "sequence_parallel splits it; change one of them",
    )


def _check_pipeline(run: RunConfig) -> None:
    layers, stages = run.model.num_layers, run.parallel.pipeline_model_parallel_size
    chunks = run.parallel.model_chunks
    require(
        layers % (stages * chunks) == 0,
        f"model.num_layers {layers} is not divisible by pipeline_model_parallel_size {stages}"
        + (f" x virtual_pipeline_model_parallel_size {chunks}" if chunks > 1 else "")
        + "; change one of them",
    )


def _check_context_parallel(run: RunConfig) -> None:
    size = run.parallel.context_parallel_size
    if size == 1:
        return
    require(
        run.model.transformer_impl is TransformerImpl.TRANSFORMER_ENGINE,
        f"parallel.context_parallel_size {size} needs TransformerEngine's attention; set "
        "model.transformer_impl=transformer_engine",
    )
    # Each rank takes one chunk from the front and one from the back: equal causal work.
    require(
        run.model.seq_length % (2 * size) == 0,
        f"model.seq_length {run.model.seq_length} is not divisible by 2 x context_parallel_size "
        f"{size}; change one of them",
    )


def _check_fp8(run: RunConfig) -> None:
    precision, model = run.precision, run.model
    if precision.fp8_format is None:
        return
    require(
        model.transformer_impl is TransformerImpl.TRANSFORMER_ENGINE,
        f"precision.fp8_format={precision.fp8_format} runs in TransformerEngine's kernels; set "
        "model.transformer_impl=transformer_engine",
    )
    require(
        not precision.fp8_param_gather or run.parallel.use_distributed_optimizer,
        "precision.fp8_param_gather gathers what the distributed optimizer updates; set "
        "parallel.use_distributed_optimizer=true",
    )
    split = run.parallel.tensor_model_parallel_size
    positions = model.seq_length * run.training.micro_batch_size
    positions //= run.parallel.context_parallel_size * (
        split if run.parallel.sequence_parallel else 1
    )
    # TransformerEngine's FP8 matrix products need multiples of 16.
    for name, size in (
        ("hidden_size", model.hidden_size),
        ("ffn_hidden_size / tensor_model_parallel_size", model.ffn_width // split),
        ("kv_channels x heads / tensor_model_parallel_size", _query_width(run) // split),
        ("tokens of a microbatch on one rank", positions),
    ):
        require(
            size % 16 == 0,
            f"FP8 needs {name} ({size}) to be divisible by 16; change it or leave "
            "precision.fp8_format out",
        )
    _check_bf16_layers(run)


def _check_bf16_layers(run: RunConfig) -> None:
    precision, model = run.precision, run.model
    if not precision.first_last_layers_bf16:
        return
    start, end = precision.num_layers_at_start_in_bf16, precision.num_layers_at_end_in_bf16
    per_stage = model.num_layers // run.parallel.pipeline_model_parallel_size
    require(
        max(start, end) <= per_stage,
        f"precision.num_layers_at_start_in_bf16 {start} and num_layers_at_end_in_bf16 {end} must "
        f"each fit into one pipeline stage of {per_stage} layers; lower them or "
        "parallel.pipeline_model_parallel_size",
    )
    kept = start + end
    require(
        kept < model.num_layers,
        f"precision.first_last_layers_bf16 keeps {kept} layers in bf16 of model.num_layers "
        f"{model.num_layers}: nothing is left for FP8; lower num_layers_at_start_in_bf16 or "
        "num_layers_at_end_in_bf16",
    )


def _query_width(run: RunConfig) -> int:
    return run.model.head_dim * run.model.num_attention_heads


def _check_recompute(run: RunConfig) -> None:
    selective = run.recompute.recompute_granularity is RecomputeGranularity.SELECTIVE
    local = run.model.transformer_impl is TransformerImpl.LOCAL
    require(
        not (selective and local and run.model.attention_backend is AttentionBackend.SDPA),
        "recompute.recompute_granularity=selective recomputes the core attention, which "
        "attention_backend=sdpa already does inside its kernel; use full, or leave it out",
    )
    layers = run.recompute.recompute_num_layers
    per_chunk = run.model.num_layers // (
        run.parallel.pipeline_model_parallel_size * run.parallel.model_chunks
    )
    require(
        layers is None or layers <= per_chunk,
        f"recompute.recompute_num_layers {layers} exceeds the {per_chunk} layers of a pipeline "
        "stage; lower it",
    )


def _check_optimizer(run: RunConfig) -> None:
    section = run.optimizer
    require(
        section.optimizer is not OptimizerName.MUON or not run.parallel.overlap_param_gather,
        "optimizer.optimizer=muon is layer-wise and cannot overlap the gathering of parameters; "
        "leave parallel.overlap_param_gather out",
    )
    groups, tensor = run.model.query_groups, run.parallel.tensor_model_parallel_size
    # Megatron cuts a query group's rows evenly, and Muon splits what a rank holds by groups.
    require(
        section.optimizer is not OptimizerName.MUON or groups % tensor == 0,
        f"optimizer.optimizer=muon needs whole query groups on every rank: num_query_groups "
        f"{groups} is not divisible by tensor_model_parallel_size {tensor}; change one of them",
    )
    require(
        section.optimizer is not OptimizerName.MUON or not run.precision.fp8_param_gather,
        "precision.fp8_param_gather gathers what the byte-wise distributed optimizer updates, and "
        "optimizer.optimizer=muon has a layer-wise one; leave fp8_param_gather out",
    )
