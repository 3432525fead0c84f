"""The same function under other forward multipliers: factors on the weights.

A GPT's function depends on weights and multipliers together: the embedding's output is a_e E, the
scores s q.k, a residual branch a_r W, the logits a_o W_U h. Whoever changes the multipliers must
change the weights by the inverse ratio; this is the only place that knows how. Folding into plain
Llama is the case where the new multipliers are (1, 1/sqrt(D), 1, 1).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import Tensor

from megatron_mup.config import ModelConfig
from megatron_mup.convert.weights import WeightSource, all_finite
from megatron_mup.errors import CheckpointError
from megatron_mup.parameterization.evaluation import Multipliers
from megatron_mup.parameterization.roles import NormGain, Part, Role, logical_tensors

_GAINS = {
    "decoder.final_layernorm.weight": "final_gain",
    "embedding.norm.weight": "embedding_gain",
}
"""Gains that take a multiplier, and their kinds."""

_WHY = {
    "final_gain": "embedding and readout are tied, so their multipliers go into the final norm's "
    "gain",
    "embedding_gain": "the embedding is normalized, so its multiplier goes into that norm's gain",
}
_RESIDUAL_OUTPUTS = (".self_attention.linear_proj.", ".mlp.linear_fc2.")
_FUNCTION_OPTIONS = ("activation", "norm_epsilon", "rotary_base", "rotary_percent")
"""Model options that are part of the function and not of the shape."""

_ROUNDING = 1e-12
"""Ratios this near to 1 are 1: a multiplier that a format keeps as its inverse comes back with its
last fp64 bit changed, and fp32 weights cannot tell."""


def plain_multipliers(model: ModelConfig) -> Multipliers:
    """The multipliers of a model that has none: 1, and 1/sqrt(D) in attention."""
    return Multipliers(embedding=1.0, attention=model.head_dim**-0.5, residual=1.0, logit=1.0)


def factors(model: ModelConfig, before: Multipliers, after: Multipliers) -> dict[str, float]:
    """What each kind of tensor is multiplied by.

    Args:
        model: the source's architecture.
        before: multipliers that the weights were made for.
        after: multipliers that they will be used with.

    Returns:
        Factors by ``kind_of``; kinds that are not named keep their values.
    """
    embedding = _ratio(before.embedding, after.embedding)
    logit = _ratio(before.logit, after.logit)
    tied = not model.untie_embeddings_and_output_weights
    # A norm on the embedding undoes a factor of its matrix, and has a gain that takes it instead.
    matrix, gain = (1.0, embedding) if model.embedding_norm else (embedding, 1.0)
    return {
        "embedding": matrix,
        "embedding_gain": gain,
        "query": _ratio(before.attention, after.attention),
        "residual_output": _ratio(before.residual, after.residual),
        "unembedding": 1.0 if tied else logit,
        # A tied matrix has taken the embedding's factor; the final gain makes up for it.
        "final_gain": _ratio(logit, matrix) if tied else 1.0,
    }


def _ratio(before: float, after: float) -> float:
    ratio = before / after
    return 1.0 if abs(ratio - 1.0) < _ROUNDING else ratio


def kind_of(name: str, role: Role, part: Part) -> str | None:
    """The key of a logical tensor in ``factors``; None for those that no multiplier touches."""
    if role is Role.EMBEDDING:
        return "embedding"
    if part is Part.QUERY:
        return "query"
    if role is Role.UNEMBEDDING:
        return "unembedding"
    if any(output in name for output in _RESIDUAL_OUTPUTS):
        return "residual_output"
    return _GAINS.get(name)


class RescaledWeights:
    """A source's function under other multipliers; itself a ``WeightSource``.

    Args:
        source: where the weights come from.
        model: the target's; may differ in the norms' gains (one that the source has not is made)
            and in options that are not part of the function, such as implementation and sequence
            length.
        multipliers: the target's.

    Raises:
        CheckpointError: the target cannot hold the function.
    """

    def __init__(self, source: WeightSource, model: ModelConfig, multipliers: Multipliers) -> None:
        self._source, self.model, self.multipliers = source, model, multipliers
        self.where = source.where
        self.provenance: Mapping[str, Any] = source.provenance
        _check_models(source.model, model)
        self._factors = factors(source.model, source.multipliers, multipliers)
        self._tensors = {tensor.name: tensor for tensor in logical_tensors(model.shape)}
        self._held = {tensor.name for tensor in logical_tensors(source.model.shape)}
        for name, kind in _GAINS.items():
            if self._factors[kind] != 1.0 and name not in self._tensors:
                raise CheckpointError(
                    f"{_WHY[kind]}, which the target has not: set model.norm_gain=vector in the "
                    "target"
                )

    def factor(self, name: str) -> float:
        """What a logical tensor is multiplied by."""
        tensor = self._tensors[name]
        kind = kind_of(name, tensor.role, tensor.part)
        return 1.0 if kind is None else self._factors[kind]

    def read(self, name: str) -> Tensor:
        """The tensor for the target's multipliers; see ``WeightSource.read``."""
        tensor = self._tensors[name]
        # Nothing but gains can be the target's alone.
        values = self._source.read(name) if name in self._held else torch.ones(tensor.shape)
        if values.shape != tensor.shape:
            # A scalar gain in a model of vector gains.
            values = values.expand(tensor.shape).contiguous()
        factor = self.factor(name)
        if factor == 1.0:
            return values
        values = values.float().mul_(factor)
        # A source that is not finite itself is its reader's to judge.
        if not all_finite(values) and all_finite(self._source.read(name)):
            raise CheckpointError(
                f"{self.where}: {name} times {factor:g}, which the target's multipliers ask for, "
                "is beyond fp32; choose multipliers nearer to the source's"
            )
        return values


def _check_models(before: ModelConfig, after: ModelConfig) -> None:
    old, new = _function(before), _function(after)
    differing = [
        f"{name} is {old[name]} in the source and {new[name]} in the target"
        for name in old
        if old[name] != new[name]
    ]
    if differing:
        raise CheckpointError(
            f"the target's model is another one: {'; '.join(differing)}; conversions keep the "
            "architecture, so leave these options out or set them to the source's"
        )
    order = [NormGain.NONE, NormGain.SCALAR, NormGain.VECTOR]
    if order.index(before.norm_gain) > order.index(after.norm_gain):
        raise CheckpointError(
            f"the target has model.norm_gain={after.norm_gain}, which cannot hold the learned "
            f"gains ({before.norm_gain}) of the source; set model.norm_gain={before.norm_gain}"
        )


def _function(model: ModelConfig) -> dict[str, Any]:
    """What two models of one function share: sizes, and options that no weight shows.

    Gains may be added. How the FFN width was said does not matter, nor what the vocabulary was
    before padding.
    """
    said = {f"model.{name}": getattr(model, name) for name in _FUNCTION_OPTIONS}
    shape = asdict(replace(model.shape, norm_gain=NormGain.NONE, ffn_multiplier=None))
    shape["padded vocabulary"] = shape.pop("vocab_size")
    return said | shape
