"""Random weights of small models for tests: a ``WeightSource`` in memory, and one drawn when read.

Nothing is at a value that would hide a mistake: gains are not 1, queries and biases not 0, all four
multipliers differ from 1 and the attention multiplier from 1/sqrt(D).
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from megatron_mup.config import Activation, ModelConfig
from megatron_mup.convert.weights import WeightSource
from megatron_mup.parameterization.evaluation import Multipliers
from megatron_mup.parameterization.roles import LogicalTensor, NormGain, Role, logical_tensors


class MemoryWeights:
    """Logical tensors in a dict, by name; see ``WeightSource``.

    Args:
        model: the architecture.
        multipliers: the forward multipliers.
        tensors: fp32 values by logical name; may be changed by the test.
    """

    def __init__(
        self, model: ModelConfig, multipliers: Multipliers, tensors: dict[str, Tensor]
    ) -> None:
        self.model, self.multipliers, self.tensors = model, multipliers, tensors
        self.where = "memory"
        self.provenance: Mapping[str, Any] = {"iteration": 7}

    def read(self, name: str) -> Tensor:
        """A copy of one tensor."""
        return self.tensors[name].clone()


class DrawnWeights:
    """Weights that exist only while somebody holds them: each tensor follows from its name.

    Args:
        model: the architecture.
        multipliers: the forward multipliers; unset means ``small_multipliers``.
    """

    def __init__(self, model: ModelConfig, multipliers: Multipliers | None = None) -> None:
        self.model, self.multipliers = model, multipliers or small_multipliers(model)
        self.where = "drawn"
        self.provenance: Mapping[str, Any] = {}
        self._shapes = {tensor.name: tensor.shape for tensor in logical_tensors(model.shape)}

    def read(self, name: str) -> Tensor:
        """One tensor, the same values each time."""
        generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        shape = self._shapes[name]
        return torch.randn(shape, generator=generator).mul_(shape[-1] ** -0.5)


def in_memory(source: WeightSource) -> MemoryWeights:
    """All tensors of a source, read once."""
    names = [tensor.name for tensor in logical_tensors(source.model.shape)]
    return MemoryWeights(
        source.model, source.multipliers, {name: source.read(name) for name in names}
    )


def small_model(**options: Any) -> ModelConfig:
    """A gated model of width 32 with vector gains and grouped queries; options override."""
    values: dict[str, Any] = {
        "num_layers": 2,
        "hidden_size": 32,
        "num_attention_heads": 4,
        "num_query_groups": 2,
        "ffn_hidden_size": 48,
        "vocab_size": 90,
        "make_vocab_size_divisible_by": 32,
        "seq_length": 24,
        "activation": Activation.SWIGLU,
        "norm_gain": NormGain.VECTOR,
        "rotary_base": 500,
    }
    return ModelConfig(**{**values, **options})


def small_multipliers(model: ModelConfig) -> Multipliers:
    """Four multipliers, none of them 1 or a power of two; attention 1.1/D."""
    return Multipliers(embedding=3.1, attention=1.1 / model.head_dim, residual=0.7, logit=0.3)


def random_weights(
    model: ModelConfig, multipliers: Multipliers | None = None, *, seed: int = 0
) -> MemoryWeights:
    """Random weights of a model; the defaults are ``small_multipliers``.

    Matrices have std 1/sqrt(fan_in), queries and keys twice that, gains lie in [0.5, 1.5] and
    biases have std 0.3: every part moves the logits.
    """
    generator = torch.Generator().manual_seed(seed)
    tensors = {tensor.name: _values(tensor, generator) for tensor in logical_tensors(model.shape)}
    return MemoryWeights(model, multipliers or small_multipliers(model), tensors)


def _values(tensor: LogicalTensor, generator: torch.Generator) -> Tensor:
    if tensor.role is Role.GAIN:
        return 0.5 + torch.rand(tensor.shape, generator=generator)
    values = torch.randn(tensor.shape, generator=generator)
    if tensor.role is Role.BIAS:
        return 0.3 * values
    if tensor.role is Role.EMBEDDING:
        return 0.5 * values
    sharper = 2.0 if tensor.role in (Role.QUERY, Role.KEY) else 1.0
    return values * (sharper / math.sqrt(tensor.fan_in))
