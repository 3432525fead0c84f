"""Roles and logical tensors: which parameters a GPT has, whatever Megatron fuses them into.

A *logical tensor* is one matrix or vector of the mathematics (the query projection of layer 3). A
Megatron *parameter* may hold several of them: ``linear_qkv`` holds query, key and value interleaved
by query group, a gated ``linear_fc1`` holds gate and up. Everything here is computed from the
model's global shape; nothing is read from a tensor, so a shard can never be taken for the whole.

Notation: M hidden size, D head dim (kv_channels), H heads, G query groups, F FFN width, L layers,
V padded vocabulary. Shapes are Megatron's [fan_out, fan_in]. Must not import torch or megatron.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum

from megatron_mup.errors import ParameterizationError


class Role(StrEnum):
    """What a logical tensor does; the rule table has one row for each."""

    EMBEDDING = "embedding"
    QUERY = "query"
    KEY = "key"
    VALUE = "value"
    ATTENTION_OUT = "attention_out"
    FFN_IN = "ffn_in"
    FFN_OUT = "ffn_out"
    UNEMBEDDING = "unembedding"
    GAIN = "gain"
    BIAS = "bias"


class NormGain(StrEnum):
    """Learned gain of RMSNorm: none, one scalar, or a vector of M."""

    NONE = "none"
    SCALAR = "scalar"
    VECTOR = "vector"


class Part(StrEnum):
    """Which rows of a (possibly fused) Megatron parameter a logical tensor is."""

    WHOLE = "whole"
    QUERY = "query"
    KEY = "key"
    VALUE = "value"
    GATE = "gate"
    UP = "up"


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """Global shape of a GPT: everything the rules may depend on.

    Sizes are elements. ``vocab_size`` is the padded one, which is what the weights have.
    """

    hidden_size: int
    ffn_hidden_size: int
    num_layers: int
    num_attention_heads: int
    num_query_groups: int
    kv_channels: int
    vocab_size: int
    gated_linear_unit: bool
    norm_gain: NormGain
    add_bias_linear: bool
    tied_embeddings: bool
    ffn_multiplier: float | None = None
    """F as a multiple of M before rounding, when the FFN width was given so (2.67 for SwiGLU)."""

    unembedding_bias: bool = False
    embedding_norm: bool = False

    @property
    def attention_width(self) -> int:
        """H * D: fan-in of the attention output projection."""
        return self.num_attention_heads * self.kv_channels


@dataclass(frozen=True, kw_only=True)
class LogicalTensor:
    """One tensor of the mathematics.

    Attributes:
        name: unique name, ``parameter`` plus the part for fused parameters.
        parameter: Megatron's parameter name with the layer number counted over all stages.
        part: which rows of ``parameter`` it is.
        role: its row in the rule table.
        shape: global shape, [fan_out, fan_in] for matrices.
        fan_in: global fan-in; V for the embedding (one-hot input), 1 for gains and biases.
        partition_axis: axis that tensor parallelism splits, None for replicated tensors.
    """

    name: str
    parameter: str
    part: Part
    role: Role
    shape: tuple[int, ...]
    fan_in: int
    partition_axis: int | None


def _tensor(
    parameter: str, role: Role, shape: tuple[int, ...], axis: int | None, part: Part = Part.WHOLE
) -> LogicalTensor:
    """Build one logical tensor; fan-in follows from the role and the global shape."""
    # A one-hot input has V terms of which one counts: no rule divides by this fan-in.
    if role is Role.EMBEDDING:
        fan_in = shape[0]
    elif role in (Role.GAIN, Role.BIAS):
        fan_in = 1
    else:
        fan_in = shape[1]
    name = parameter if part is Part.WHOLE else f"{parameter}.{part.value}"
    return LogicalTensor(
        name=name,
        parameter=parameter,
        part=part,
        role=role,
        shape=shape,
        fan_in=fan_in,
        partition_axis=axis,
    )


def _gain(parameter: str, shape: ModelShape) -> Iterator[LogicalTensor]:
    """The gain of one norm, if it has one."""
    if shape.norm_gain is not NormGain.NONE:
        size = 1 if shape.norm_gain is NormGain.SCALAR else shape.hidden_size
        yield _tensor(parameter, Role.GAIN, (size,), None)


def _fused(
    parameter: str,
    parts: list[tuple[Part, Role, int]],
    *,
    fan_in: int,
    bias: bool,
) -> Iterator[LogicalTensor]:
    """The parts of one column-parallel parameter, then the parts of its bias."""
    for part, role, rows in parts:
        yield _tensor(f"{parameter}.weight", role, (rows, fan_in), 0, part)
    if bias:
        for part, _, rows in parts:
            yield _tensor(f"{parameter}.bias", Role.BIAS, (rows,), 0, part)


def _layer(shape: ModelShape, index: int) -> Iterator[LogicalTensor]:
    """Logical tensors of layer ``index`` (from 0, counted over all pipeline stages)."""
    prefix = f"decoder.layers.{index}"
    hidden, bias = shape.hidden_size, shape.add_bias_linear
    # Fewer key heads (GQA, MQA) change the fan-out only; the rules read fan-in, which stays M.
    key_rows = shape.num_query_groups * shape.kv_channels
    yield from _gain(f"{prefix}.input_layernorm.weight", shape)
    qkv = [
        (Part.QUERY, Role.QUERY, shape.attention_width),
        (Part.KEY, Role.KEY, key_rows),
        (Part.VALUE, Role.VALUE, key_rows),
    ]
    yield from _fused(f"{prefix}.self_attention.linear_qkv", qkv, fan_in=hidden, bias=bias)
    out = f"{prefix}.self_attention.linear_proj"
    yield _tensor(f"{out}.weight", Role.ATTENTION_OUT, (hidden, shape.attention_width), 1)
    # A row-parallel bias is replicated: it is added once, after the partial sums are reduced.
    if bias:
        yield _tensor(f"{out}.bias", Role.BIAS, (hidden,), None)
    yield from _gain(f"{prefix}.pre_mlp_layernorm.weight", shape)
    # Gate and up are both ffn_in: each sums over M inputs, and their product is elementwise.
    parts = (Part.GATE, Part.UP) if shape.gated_linear_unit else (Part.WHOLE,)
    ffn_in = [(part, Role.FFN_IN, shape.ffn_hidden_size) for part in parts]
    yield from _fused(f"{prefix}.mlp.linear_fc1", ffn_in, fan_in=hidden, bias=bias)
    ffn_out = f"{prefix}.mlp.linear_fc2"
    yield _tensor(f"{ffn_out}.weight", Role.FFN_OUT, (hidden, shape.ffn_hidden_size), 1)
    if bias:
        yield _tensor(f"{ffn_out}.bias", Role.BIAS, (hidden,), None)


def logical_tensors(shape: ModelShape) -> tuple[LogicalTensor, ...]:
    """All logical tensors of the model, in the order of the forward pass.

    Args:
        shape: global shape of the model.

    Returns:
        One entry per logical tensor. A tied model has no separate unembedding.
    """
    # The padded vocabulary, which does not depend on the layout, so neither do the shapes.
    size = (shape.vocab_size, shape.hidden_size)
    tensors = [_tensor("embedding.word_embeddings.weight", Role.EMBEDDING, size, 0)]
    if shape.embedding_norm:
        tensors.extend(_gain("embedding.norm.weight", shape))
    for index in range(shape.num_layers):
        tensors.extend(_layer(shape, index))
    tensors.extend(_gain("decoder.final_layernorm.weight", shape))
    if not shape.tied_embeddings:
        tensors.append(_tensor("output_layer.weight", Role.UNEMBEDDING, size, 0))
    if shape.unembedding_bias:
        tensors.append(_tensor("output_layer.bias", Role.BIAS, (shape.vocab_size,), 0))
    return tuple(tensors)


def in_layers(tensor: LogicalTensor) -> bool:
    """Whether a tensor belongs to a transformer layer, and so follows rules for depth."""
    return tensor.parameter.startswith("decoder.layers.")


def by_parameter(tensors: tuple[LogicalTensor, ...]) -> dict[str, tuple[LogicalTensor, ...]]:
    """Group logical tensors by the Megatron parameter that holds them.

    Raises:
        ParameterizationError: if two logical tensors claim the same part of one parameter.
    """
    grouped: dict[str, list[LogicalTensor]] = {}
    for tensor in tensors:
        siblings = grouped.setdefault(tensor.parameter, [])
        # A part with two rows would be initialised twice and get one of two learning rates.
        if any(other.part is tensor.part for other in siblings):
            raise ParameterizationError(
                f"two roles claim part '{tensor.part}' of parameter '{tensor.parameter}'"
            )
        siblings.append(tensor)
    return {name: tuple(parts) for name, parts in grouped.items()}
