"""Layer specs: Megatron's local modules with our norm and fused attention, or TransformerEngine.

Everything enters through ``ModuleSpec``. Multipliers of 1 leave the stock submodule in place, so
they add no operation. Shape suffixes: S sequence, B batch, H heads, D head dim, M hidden size.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as functional
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.transformer import ModuleSpec, TransformerConfig
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_block import (
    TransformerBlockSubmodules,
    get_num_layers_to_build,
)
from torch import Tensor

from megatron_mup.config import AttentionBackend, ModelConfig, TransformerImpl
from megatron_mup.errors import InstallationError
from megatron_mup.model.rotary import CachedRotarySelfAttention, RotaryTables
from megatron_mup.parameterization.roles import NormGain

BiasDropoutAdd = Callable[[tuple[Tensor, Tensor | None], Tensor, float], Tensor]


class RMSNorm(torch.nn.Module):
    """RMSNorm with a vector gain, one scalar gain, or none.

    Upstream's local norm (``WrappedTorchNorm``, 0.19.2) always has a vector gain. A norm without
    learned gain keeps ones as a buffer, so that checkpoints have the same keys for every spec.

    Args:
        config: Megatron's model configuration (parameter dtype).
        hidden_size: M.
        eps: added to the mean square.
        gain: which gain is learned.
    """

    def __init__(
        self, config: TransformerConfig, hidden_size: int, eps: float, *, gain: NormGain
    ) -> None:
        super().__init__()
        self.eps = eps
        self.gain = gain
        self.hidden_size = hidden_size
        size = 1 if gain is NormGain.SCALAR else hidden_size
        ones = torch.ones(size, dtype=config.params_dtype)
        if gain is NormGain.NONE:
            self.register_buffer("weight", ones)
        else:
            self.weight = torch.nn.Parameter(ones)
            # Each tensor-parallel rank then norms its own positions: Megatron must sum the gains'
            # gradients, which upstream's own norm refuses (torch_norm.py:50, 0.19.2).
            setattr(self.weight, "sequence_parallel", config.sequence_parallel)  # noqa: B010

    def forward(self, hidden_SBM: Tensor) -> Tensor:
        """Normalize [S, B, M] over M; same shape and dtype."""
        # With a vector gain this is the very call of torch.nn.RMSNorm, upstream's local norm.
        if self.gain is NormGain.VECTOR:
            return functional.rms_norm(hidden_SBM, (self.hidden_size,), self.weight, self.eps)
        normed_SBM = functional.rms_norm(hidden_SBM, (self.hidden_size,), None, self.eps)
        return normed_SBM * self.weight if self.gain is NormGain.SCALAR else normed_SBM


class SdpaCoreAttention(MegatronModule):  # type: ignore[misc]  # untyped upstream base
    """Causal core attention by PyTorch's fused kernel.

    Replaces Megatron's unfused one, which costs a quarter more on a CPU. The scale handed over by
    the layer is used as it is; there is no fallback to 1/sqrt(D).
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        *,
        softmax_scale: float,
        **unused: Any,
    ) -> None:
        super().__init__(config=config)
        self.layer_number = layer_number
        self.softmax_scale = softmax_scale

    def forward(
        self,
        query_SBHD: Tensor,
        key_SBGD: Tensor,
        value_SBGD: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: Any = None,
    ) -> Tensor:
        """Attend causally from queries [S, B, H, D] to G key/value heads; returns [S, B, H * D]."""
        # The mask is not read: causality is the kernel's, and no dropout is ever configured.
        query, key, value = (
            widened_on_cpu(t).permute(1, 2, 0, 3) for t in (query_SBHD, key_SBGD, value_SBGD)
        )
        context_BHSD = functional.scaled_dot_product_attention(
            query,
            key,
            value,
            is_causal=True,
            scale=self.softmax_scale,
            enable_gqa=query.shape[1] != key.shape[1],
        )
        return context_BHSD.permute(2, 0, 1, 3).flatten(2).to(query_SBHD.dtype)


def widened_on_cpu(tensor: Tensor) -> Tensor:
    """The tensor in fp32 where the CPU's kernel is slow otherwise.

    torch (2.11.0) takes two to eight times as long for the backward pass of bf16 scores on CPUs as
    for fp32 ones, which was half of a small bf16 model's step.
    """
    narrow = tensor.device.type == "cpu" and tensor.dtype == torch.bfloat16
    return tensor.float() if narrow else tensor


def scaled_bias_dropout_add(multiplier: float) -> Callable[[bool, bool], BiasDropoutAdd]:
    """Bias-dropout-add whose branch is multiplied before it joins the residual stream.

    Args:
        multiplier: residual multiplier; acts on the branch's bias as well.

    Returns:
        A drop-in for Megatron's ``get_bias_dropout_add``; that very function for 1.
    """
    if multiplier == 1.0:
        return get_bias_dropout_add  # type: ignore[no-any-return]

    def get(training: bool, fused: bool) -> BiasDropoutAdd:
        def apply(
            branch_and_bias: tuple[Tensor, Tensor | None], residual: Tensor, prob: float
        ) -> Tensor:
            branch, bias = branch_and_bias
            branch = branch if bias is None else branch + bias
            branch = functional.dropout(branch, p=prob, training=training)
            # One pass over the stream: the multiplier costs no operation of its own.
            return torch.add(residual, branch, alpha=multiplier)

        return apply

    return get


def layer_spec(model: ModelConfig, residual_multiplier: float) -> ModuleSpec:
    """Spec of one transformer layer.

    Args:
        model: architecture and implementation choices.
        residual_multiplier: factor of the attention and FFN branches.

    Raises:
        InstallationError: TransformerEngine is asked for but not installed.
    """
    if model.transformer_impl is TransformerImpl.TRANSFORMER_ENGINE:
        check_implementation(model)
        spec = get_gpt_layer_with_transformer_engine_spec()
    else:
        spec = get_gpt_layer_local_spec(normalization="RMSNorm")
        attention = spec.submodules.self_attention.submodules
        sdpa = model.attention_backend is AttentionBackend.SDPA
        attention.core_attention = SdpaCoreAttention if sdpa else DotProductAttention
        if sdpa:
            _rotate_from_tables(spec.submodules.self_attention)
        # Unlike TransformerEngine's, the local spec's norms are modules of their own.
        norm = norm_builder(model.norm_gain)
        spec.submodules.input_layernorm = spec.submodules.pre_mlp_layernorm = norm
    add = scaled_bias_dropout_add(residual_multiplier)
    spec.submodules.self_attn_bda = spec.submodules.mlp_bda = add
    return spec


def _rotate_from_tables(self_attention: ModuleSpec) -> None:
    """Give the layers built from this spec one set of rotary tables."""
    self_attention.module = CachedRotarySelfAttention
    self_attention.params = {**self_attention.params, "rotary_tables": RotaryTables()}


def norm_builder(gain: NormGain) -> Callable[..., RMSNorm]:
    """What Megatron calls to build a norm; it passes config, hidden_size and eps."""

    def build(config: TransformerConfig, hidden_size: int, eps: float, **unused: Any) -> RMSNorm:
        return RMSNorm(config, hidden_size, eps, gain=gain)

    return build


def check_implementation(model: ModelConfig) -> None:
    """Check that the asked-for modules are installed, before anything is built.

    Raises:
        InstallationError: TransformerEngine is asked for but absent.
    """
    wanted = model.transformer_impl is TransformerImpl.TRANSFORMER_ENGINE
    if wanted and importlib.util.find_spec("transformer_engine") is None:
        raise InstallationError(
            "model.transformer_impl=transformer_engine needs TransformerEngine: "
            "pip install 'megatron_mup[gpu]' on a machine with a GPU, or use "
            "transformer_impl=local"
        )


def block_spec(
    model: ModelConfig,
    config: TransformerConfig,
    residual_multiplier: float,
    *,
    vp_stage: int | None = None,
) -> TransformerBlockSubmodules:
    """Spec of this pipeline stage's (or chunk's) layers and of the final norm."""
    # One spec object for all layers, so that they share its rotary tables.
    layers = [layer_spec(model, residual_multiplier)] * get_num_layers_to_build(config, vp_stage)
    if model.transformer_impl is TransformerImpl.TRANSFORMER_ENGINE:
        from megatron.core.extensions.transformer_engine import TENorm

        return TransformerBlockSubmodules(layer_specs=layers, layer_norm=TENorm)
    return TransformerBlockSubmodules(layer_specs=layers, layer_norm=norm_builder(model.norm_gain))
