"""The one function that builds the GPT; nothing else names ``GPTModel``.

``GPTModel`` is marked deprecated in megatron-core 0.19.2 in favour of ``HybridModel``; keeping its
name here makes that move a change of this file.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as functional
from megatron.core import parallel_state, tensor_parallel
from megatron.core.activations import squared_relu
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer import TransformerConfig
from torch import Tensor

from megatron_mup import platform
from megatron_mup.config import (
    Activation,
    ModelConfig,
    ParallelConfig,
    PrecisionConfig,
    RecomputeConfig,
    RunConfig,
    TransformerImpl,
)
from megatron_mup.errors import ParameterizationError
from megatron_mup.model.additions import add_embedding_norm, add_unembedding_bias
from megatron_mup.model.hooks import register_multipliers
from megatron_mup.model.initialization import Shard, initialize
from megatron_mup.model.layer_specs import block_spec
from megatron_mup.parameterization.evaluation import Multipliers
from megatron_mup.parameterization.roles import NormGain
from megatron_mup.parameterization.table import ParameterTable

ACTIVATIONS: dict[Activation, Callable[[Tensor], Tensor]] = {
    Activation.RELU: functional.relu,
    Activation.SQUARED_RELU: squared_relu,
    Activation.GELU: functional.gelu,
    Activation.SWIGLU: functional.silu,
}


_ALWAYS: dict[str, Any] = {
    # Initial weights are this package's own pass; upstream's drawing would be overwritten.
    "perform_initialization": False,
    "hidden_dropout": 0.0,
    "attention_dropout": 0.0,
    # The schedule then hands sum and token count through, and one division covers microbatches and
    # data-parallel ranks with different numbers of unmasked tokens.
    "calculate_per_token_loss": True,
    # Most fused kernels need CUDA or apex, and the fused bias and GELU of 0.19.2 is the tanh
    # approximation: another function.
    "gradient_accumulation_fusion": False,
    "masked_softmax_fusion": False,
    "persist_layer_norm": False,
    "bias_dropout_fusion": False,
    "bias_activation_fusion": False,
    # A stage's output is not needed once it has been sent.
    "deallocate_pipeline_outputs": True,
}
"""Megatron's switches that no run changes."""

_GAINS = (
    # Inside TransformerEngine's linear layers.
    "layer_norm_weight",
    "input_layernorm.weight",
    "pre_mlp_layernorm.weight",
    "decoder.final_layernorm.weight",
)


def transformer_config(run: RunConfig, multipliers: Multipliers) -> TransformerConfig:
    """Megatron's model configuration of a run.

    Megatron initialises nothing (``perform_initialization=False``): our pass does. Its own muP
    (``use_mup``) stays off.

    Args:
        run: the run's configuration.
        multipliers: forward multipliers from the table; the attention scale enters here.
    """
    model = run.model
    return TransformerConfig(
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        num_attention_heads=model.num_attention_heads,
        num_query_groups=model.query_groups,
        kv_channels=model.head_dim,
        ffn_hidden_size=model.ffn_width,
        activation_func=ACTIVATIONS[model.activation],
        gated_linear_unit=model.activation is Activation.SWIGLU,
        add_bias_linear=model.add_bias_linear,
        normalization="RMSNorm",
        layernorm_epsilon=model.norm_epsilon,
        softmax_scale=multipliers.attention,
        apply_rope_fusion=model.transformer_impl is TransformerImpl.TRANSFORMER_ENGINE,
        use_cpu_initialization=not platform.has_cuda(),
        **_layout(run.parallel),
        **_precision(run.precision),
        **_recompute(run.recompute),
        **_ALWAYS,
    )


def _layout(parallel: ParallelConfig) -> dict[str, Any]:
    virtual = parallel.virtual_stages is not None
    return {
        "tensor_model_parallel_size": parallel.tensor_model_parallel_size,
        "pipeline_model_parallel_size": parallel.pipeline_model_parallel_size,
        "virtual_pipeline_model_parallel_size": parallel.virtual_stages,
        "context_parallel_size": parallel.context_parallel_size,
        "sequence_parallel": parallel.sequence_parallel,
        # As Megatron-LM sets them: the interleaved schedule hides its many more transfers.
        "overlap_p2p_comm": virtual,
        "batch_p2p_comm": not virtual,
    }


def _precision(precision: PrecisionConfig) -> dict[str, Any]:
    dtype = torch.bfloat16 if precision.bf16 else torch.float32
    options: dict[str, Any] = {
        "pipeline_dtype": dtype,
        "params_dtype": dtype,
        "bf16": precision.bf16,
        "deterministic_mode": precision.deterministic_mode,
    }
    if precision.fp8_format is None:
        return options
    return options | {
        "fp8": precision.fp8_format.value,
        "fp8_recipe": precision.fp8_recipe.value,
        "fp8_param": precision.fp8_param_gather,
        "fp8_margin": precision.fp8_margin,
        "fp8_amax_history_len": precision.fp8_amax_history_len,
        "fp8_amax_compute_algo": precision.fp8_amax_compute_algo.value,
        "first_last_layers_bf16": precision.first_last_layers_bf16,
        "num_layers_at_start_in_bf16": precision.num_layers_at_start_in_bf16,
        "num_layers_at_end_in_bf16": precision.num_layers_at_end_in_bf16,
    }


def _recompute(recompute: RecomputeConfig) -> dict[str, Any]:
    if recompute.recompute_granularity is None:
        return {}
    method = recompute.recompute_method
    return {
        "recompute_granularity": recompute.recompute_granularity.value,
        "recompute_method": None if method is None else method.value,
        "recompute_num_layers": recompute.recompute_num_layers,
    }


def build_model(run: RunConfig, table: ParameterTable, *, chunk: int = 0) -> torch.nn.Module:
    """Build one model chunk of this process's pipeline stage with its hooks and initial weights.

    Needs Megatron's parallel state. DDP and the optimizer must be built after it, because fp32
    main parameters are copies.

    Args:
        run: the run's configuration.
        table: its resolved parameter table.
        chunk: number of the chunk on this rank; 0 unless the pipeline is virtual.

    Returns:
        GPTModel of this chunk, on this process's device.

    Raises:
        ParameterizationError: a parameter has no role in the table.
        InstallationError: TransformerEngine is asked for but absent.
    """
    config = transformer_config(run, table.multipliers)
    model = construct(run.model, config, table.multipliers, chunk=chunk)
    shard = Shard(
        parallel_state.get_tensor_model_parallel_rank(),
        parallel_state.get_tensor_model_parallel_world_size(),
    )
    initialize(model, table, run.model.shape, seed=run.training.seed, shard=shard)
    return model


def construct(
    model: ModelConfig,
    config: TransformerConfig,
    multipliers: Multipliers,
    *,
    chunk: int = 0,
    ends: tuple[bool, bool] | None = None,
) -> torch.nn.Module:
    """Build one chunk with hooks but without initial weights; see ``build_model``.

    Args:
        model: architecture.
        config: from ``transformer_config``.
        multipliers: from the table.
        chunk: number of the chunk on this rank.
        ends: whether it has the embedding, and the readout; unset: as its place in the pipeline.
    """
    virtual = config.virtual_pipeline_model_parallel_size is not None
    place: dict[str, Any] = {"vp_stage": chunk} if virtual else {}
    if ends is None:
        ends = (
            parallel_state.is_pipeline_first_stage(ignore_virtual=not virtual, **place),
            parallel_state.is_pipeline_last_stage(ignore_virtual=not virtual, **place),
        )
    gpt: torch.nn.Module = GPTModel(
        config,
        block_spec(model, config, multipliers.residual, **place),
        model.padded_vocab_size,
        model.seq_length,
        pre_process=ends[0],
        post_process=ends[1],
        share_embeddings_and_output_weights=not model.untie_embeddings_and_output_weights,
        position_embedding_type="rope",
        rotary_percent=model.rotary_percent,
        rotary_base=model.rotary_base,
        **place,
    )
    return _complete(gpt, model, multipliers)


def _complete(
    gpt: torch.nn.Module, model: ModelConfig, multipliers: Multipliers
) -> torch.nn.Module:
    """Give a GPTModel what it is not built with, check its scale, and move it to the device."""
    for parameter in gpt.parameters():
        # The CPU initialization path of 0.19.2 leaves replicated parameters without attributes.
        tensor_parallel.set_defaults_if_not_set_tensor_model_parallel_attributes(parameter)
    if model.transformer_impl is TransformerImpl.TRANSFORMER_ENGINE:
        freeze_unused_gains(gpt, model.norm_gain)
    if model.unembedding_bias:
        add_unembedding_bias(gpt)
    if model.embedding_norm:
        add_embedding_norm(gpt, gain=model.norm_gain)
    # After the norm, which would undo a multiplier before it.
    register_multipliers(gpt, multipliers)
    check_attention_scale(gpt, multipliers.attention)
    # A dry run builds on the meta device, from which nothing can be moved.
    if any(parameter.is_meta for parameter in gpt.parameters()):
        return gpt
    # Our own norms are made on the CPU whatever the machine.
    return gpt.to(platform.device())


@torch.no_grad()
def freeze_unused_gains(gpt: torch.nn.Module, gain: NormGain) -> None:
    """Freeze the gains of a model without learned ones at 1.

    TransformerEngine's norms and upstream's local one always have a gain.

    Args:
        gpt: a GPTModel, one pipeline stage.
        gain: which gain is learned; anything but none leaves the model alone.
    """
    if gain is not NormGain.NONE:
        return
    for name, parameter in gpt.named_parameters():
        if name.endswith(_GAINS):
            parameter.fill_(1.0)
            parameter.requires_grad_(False)


def check_attention_scale(gpt: torch.nn.Module, scale: float) -> None:
    """Check that every attention backend of a built model holds the table's scale.

    A backend that keeps its own 1/sqrt(D) trains without complaint; TransformerEngine's module has
    three backends, each with its copy.

    Args:
        gpt: a GPTModel, one pipeline stage.
        scale: the attention multiplier of the table.

    Raises:
        ParameterizationError: a backend has another scale, or shows none.
    """
    for name, core in gpt.named_modules():
        # Names and not classes: a spec may bring a core attention that this file has never seen.
        if not name.endswith(".core_attention"):
            continue
        scales = {
            part or "itself": module.softmax_scale
            for part, module in core.named_modules()
            if hasattr(module, "softmax_scale")
        }
        if not scales or set(scales.values()) != {scale}:
            raise ParameterizationError(
                f"{name} ({type(core).__name__}) scales attention scores by {scales}, the table "
                f"says {scale}; set softmax_scale in the TransformerConfig before the model is "
                "built, or use an attention module that does not ignore it"
            )
