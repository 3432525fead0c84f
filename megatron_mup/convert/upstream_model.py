"""What the arguments in a checkpoint of ``megatron.training`` say of its model.

Owns the way back from upstream's names (megatron-core 0.19.2, ``training/argument_utils.py``:
``core_transformer_config_from_args``, and ``TransformerConfig.__post_init__`` for its muP) to an
architecture and its multipliers. What this package's GPT cannot compute is refused by the
argument's name. Reads no file.
"""

from __future__ import annotations

from argparse import Namespace
from typing import Any

from megatron_mup.config import Activation, ModelConfig
from megatron_mup.convert.rescaling import plain_multipliers
from megatron_mup.errors import CheckpointError
from megatron_mup.parameterization.evaluation import Multipliers
from megatron_mup.parameterization.roles import NormGain

_OFF = (None, False, 0)
_ALLOWED: dict[str, tuple[tuple[object, ...], str]] = {
    "normalization": (("RMSNorm",), "only RMSNorm is available"),
    "position_embedding_type": (("rope",), "only plain RoPE is available"),
    "rope_type": ((None, "rope"), "only plain RoPE is available"),
    "use_rope_scaling": (_OFF, "only plain RoPE is available"),
    "rotary_interleaved": (_OFF, "queries and keys are rotated in halves"),
    "rotary_seq_len_interpolation_factor": ((*_OFF, 1), "only plain RoPE is available"),
    "no_rope_freq": (_OFF, "every layer rotates"),
    "num_experts": (_OFF, "mixture of experts is not available"),
    "multi_latent_attention": (_OFF, "latent attention is not available"),
    "experimental_attention_variant": (_OFF, "only softmax attention is available"),
    "attention_output_gate": (_OFF, "attention has no gate on its output"),
    "softmax_type": ((None, "vanilla"), "the softmax has no offset"),
    "window_size": (_OFF, "attention is to all earlier tokens"),
    "qk_layernorm": (_OFF, "norms on queries and keys are not available"),
    "qk_l2_norm": (_OFF, "norms on queries and keys are not available"),
    "layernorm_zero_centered_gamma": (_OFF, "gains are stored as they are, not minus 1"),
    "apply_layernorm_1p": (_OFF, "gains are stored as they are, not minus 1"),
    "apply_residual_connection_post_layernorm": (_OFF, "layers are pre-norm"),
    "quick_geglu": (_OFF, "the gated activation is SiLU"),
    "openai_gelu": (_OFF, "GELU is the exact one"),
    "glu_linear_offset": (_OFF, "the gated activation is plain SwiGLU"),
    "activation_func_clamp_value": (_OFF, "activations are not clamped"),
    "mtp_num_layers": (_OFF, "multi-token prediction is not available"),
    "hybrid_layer_pattern": (_OFF, "only transformer layers are available"),
    "hybrid_override_pattern": (_OFF, "only transformer layers are available"),
    "heterogeneous_layers_config_path": (_OFF, "all layers have one shape"),
}
"""Arguments that change the function: the values with a counterpart here, and why no other."""

_REQUIRED = ("num_layers", "hidden_size", "num_attention_heads", "ffn_hidden_size", "seq_length")


def upstream_model(args: Namespace, *, vocabulary: int, where: str) -> ModelConfig:
    """The architecture of upstream's GPT.

    Args:
        args: from the common state of its checkpoint.
        vocabulary: rows of the stored embedding.
        where: the checkpoint; for messages.

    Returns:
        A model of vector gains, whose padded vocabulary is ``vocabulary``.

    Raises:
        CheckpointError: an argument is missing, or builds what this package's GPT has not.
        ConfigError: the sizes contradict each other.
    """
    _check_present(args, where)
    _refuse(args, where)
    grouped = getattr(args, "group_query_attention", False)
    size, multiple = _vocabulary(args, vocabulary)
    return ModelConfig(
        num_layers=args.num_layers,
        hidden_size=args.hidden_size,
        num_attention_heads=args.num_attention_heads,
        num_query_groups=args.num_query_groups if grouped else None,
        kv_channels=getattr(args, "kv_channels", None),
        ffn_hidden_size=args.ffn_hidden_size,
        vocab_size=size,
        make_vocab_size_divisible_by=multiple,
        seq_length=args.seq_length,
        activation=_activation(args),
        norm_gain=NormGain.VECTOR,
        norm_epsilon=_norm_epsilon(args, where),
        add_bias_linear=bool(getattr(args, "add_bias_linear", True)),
        untie_embeddings_and_output_weights=bool(
            getattr(args, "untie_embeddings_and_output_weights", False)
        ),
        rotary_base=int(getattr(args, "rotary_base", 10000)),
        rotary_percent=getattr(args, "rotary_percent", 1.0),
    )


def upstream_multipliers(args: Namespace, model: ModelConfig) -> Multipliers:
    """The forward multipliers of upstream's GPT: none without ``--use-mup``.

    Args:
        args: as given to ``upstream_model``.
        model: its result.
    """
    plain = plain_multipliers(model)
    if not getattr(args, "use_mup", False):
        return plain
    # The command line is saved as it was given; TransformerConfig derives the rest from it.
    width = model.hidden_size / (args.mup_base_hidden_size or model.hidden_size)
    base_head_dim = 1.0 if args.mup_base_head_dim is None else args.mup_base_head_dim
    logit = args.mup_output_mult
    return Multipliers(
        embedding=args.mup_embedding_mult,
        attention=base_head_dim**0.5 / model.head_dim**args.mup_attn_scale_power,
        residual=1.0,
        logit=1.0 / width if logit == 1.0 else logit,
    )


def _check_present(args: Namespace, where: str) -> None:
    absent = [name for name in _REQUIRED if getattr(args, name, None) is None]
    if absent:
        raise CheckpointError(
            f"the arguments in {where} lack {', '.join(absent)}, so its model is unknown; give "
            "a checkpoint that megatron.training saved"
        )


def _refuse(args: Namespace, where: str) -> None:
    problems = []
    for name, (allowed, reason) in _ALLOWED.items():
        # An argument that a version did not know was not there to change anything.
        value = getattr(args, name, allowed[0])
        if value not in allowed:
            problems.append(f"{name}={value} ({reason})")
    biased = getattr(args, "add_bias_linear", True)
    if getattr(args, "add_qkv_bias", False) and not biased:
        problems.append("add_qkv_bias=True without add_bias_linear (linear layers are alike)")
    if _activation(args) is Activation.GELU and biased and getattr(args, "bias_gelu_fusion", True):
        problems.append("bias_gelu_fusion=True (it is the tanh approximation; GELU is exact here)")
    base = getattr(args, "rotary_base", 10000)
    if base != int(base):
        problems.append(f"rotary_base={base} (it must be a whole number)")
    if problems:
        raise CheckpointError(
            f"{where} holds a model that this package's GPT cannot compute: {'; '.join(problems)}; "
            "it can only be used with megatron.training"
        )


def _activation(args: Namespace) -> Activation:
    if getattr(args, "swiglu", False):
        return Activation.SWIGLU
    return Activation.SQUARED_RELU if getattr(args, "squared_relu", False) else Activation.GELU


def _norm_epsilon(args: Namespace, where: str) -> float:
    # 0.19.2 saves the first name, versions before it the second.
    for name in ("layernorm_epsilon", "norm_epsilon"):
        value: Any = getattr(args, name, None)
        if value is not None:
            return float(value)
    raise CheckpointError(
        f"the arguments in {where} say no norm_epsilon, so its model is unknown; give a "
        "checkpoint that megatron.training saved"
    )


def _vocabulary(args: Namespace, rows: int) -> tuple[int, int]:
    """Tokens, and the multiple that pads them to ``rows``, which upstream takes times TP."""
    size = getattr(args, "vocab_size", None)
    multiple = getattr(args, "make_vocab_size_divisible_by", None) or 1
    multiple *= getattr(args, "tensor_model_parallel_size", 1)
    if size is not None and -(-size // multiple) * multiple == rows:
        return size, multiple
    return rows, 1
