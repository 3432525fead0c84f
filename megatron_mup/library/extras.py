"""What a script says beside Megatron-Core's own configuration objects; what they say together."""

from __future__ import annotations

from dataclasses import dataclass, fields
from enum import StrEnum
from typing import Any, get_args, get_type_hints

from megatron.core.optimizer import OptimizerConfig
from megatron.core.transformer import TransformerConfig

from megatron_mup.errors import ParameterizationError
from megatron_mup.parameterization.options import DecayMask, DecayMode, OptimizerNumbers
from megatron_mup.parameterization.roles import ModelShape, NormGain


@dataclass(frozen=True, kw_only=True)
class Extras:
    """What neither ``TransformerConfig`` nor ``OptimizerConfig`` says of a run."""

    vocab_size: int
    """V: the padded vocabulary that ``GPTModel`` is given."""

    tied_embeddings: bool = False
    """``share_embeddings_and_output_weights`` of the model."""

    norm_gain: NormGain = NormGain.VECTOR
    """``vector``, or ``none`` to freeze the gains of upstream's norms at 1."""

    unembedding_bias: bool = False
    """Give the readout a bias."""

    embedding_norm: bool = False
    """Normalize the embedding's output."""

    weight_decay_mode: DecayMode = DecayMode.INDEPENDENT
    """What lambda is a fraction of."""

    weight_decay_mask: DecayMask = DecayMask.MATRICES
    """Which tensors decay."""


def members_of(options: Any) -> dict[str, Any]:
    """Enum members for the choices that a script gave by their values, as a YAML file does.

    Args:
        options: a dataclass of options.

    Raises:
        ParameterizationError: no such choice; names those that there are.
    """
    hints = get_type_hints(type(options))
    members: dict[str, StrEnum] = {}
    for field in fields(options):
        value, hint = getattr(options, field.name), hints[field.name]
        for kind in (hint, *get_args(hint)):
            if isinstance(value, str) and isinstance(kind, type) and issubclass(kind, StrEnum):
                members[field.name] = _member(kind, value, field.name)
    return members


def _member(kind: type[StrEnum], value: str, option: str) -> StrEnum:
    try:
        return kind(value)
    except ValueError as error:
        raise ParameterizationError(
            f"{option}='{value}' is no {kind.__name__}; use one of {', '.join(kind)}"
        ) from error


def shape_of(config: TransformerConfig, extras: Extras) -> ModelShape:
    """Global shape of the model that these will build."""
    return ModelShape(
        hidden_size=config.hidden_size,
        ffn_hidden_size=config.ffn_hidden_size,
        num_layers=config.num_layers,
        num_attention_heads=config.num_attention_heads,
        num_query_groups=config.num_query_groups,
        kv_channels=config.kv_channels,
        vocab_size=extras.vocab_size,
        gated_linear_unit=config.gated_linear_unit,
        norm_gain=extras.norm_gain,
        add_bias_linear=config.add_bias_linear,
        tied_embeddings=extras.tied_embeddings,
        unembedding_bias=extras.unembedding_bias,
        embedding_norm=extras.embedding_norm,
    )


def numbers_of(optimizer: OptimizerConfig, extras: Extras) -> OptimizerNumbers:
    """What the rules see of the optimizer."""
    return OptimizerNumbers(
        lr=optimizer.lr,
        weight_decay=optimizer.weight_decay,
        weight_decay_mode=extras.weight_decay_mode,
        weight_decay_mask=extras.weight_decay_mask,
        eps=optimizer.adam_eps,
        betas=(optimizer.adam_beta1, optimizer.adam_beta2),
    )
