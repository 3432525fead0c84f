"""Forward multipliers on the embedding and on the readout of a built GPT.

The attention scale enters through ``TransformerConfig.softmax_scale`` and the residual multiplier
through the layer spec; these two act on modules that GPTModel builds itself, so they are forward
hooks. A multiplier of 1 registers nothing. The logit multiplier acts on the final hidden state
[S, B, M], which is V/M times smaller than the logits and leaves a readout bias outside.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron_mup.parameterization.evaluation import Multipliers


def register_multipliers(model: torch.nn.Module, multipliers: Multipliers) -> None:
    """Attach the embedding and logit multipliers to one pipeline stage.

    Args:
        model: a GPTModel; stages without embedding or readout get nothing.
        multipliers: from the parameter table.
    """
    embedding = getattr(model, "embedding", None)
    if embedding is not None and multipliers.embedding != 1.0:
        embedding.register_forward_hook(_OutputMultiplier(multipliers.embedding))
    # Scaling the readout's input leaves a tied matrix, and so the embedding's output, alone.
    output_layer = getattr(model, "output_layer", None)
    if output_layer is not None and multipliers.logit != 1.0:
        output_layer.register_forward_pre_hook(_InputMultiplier(multipliers.logit))


def registered_multipliers(model: torch.nn.Module) -> tuple[float, float]:
    """The embedding and logit multipliers that a stage was given; 1 where there is none."""
    return (
        _product(getattr(model, "embedding", None), _OutputMultiplier),
        _product(getattr(model, "output_layer", None), _InputMultiplier),
    )


@dataclass(frozen=True)
class _OutputMultiplier:
    """Forward hook: multiplies what a module returns."""

    multiplier: float

    def __call__(self, _module: torch.nn.Module, _inputs: Any, output: Tensor) -> Tensor:
        return output * self.multiplier


@dataclass(frozen=True)
class _InputMultiplier:
    """Forward pre-hook: multiplies a module's first input."""

    multiplier: float

    def __call__(self, _module: torch.nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        # A tied weight arrives as a keyword argument, which such a hook neither sees nor drops.
        return (inputs[0] * self.multiplier, *inputs[1:])


def _product(
    module: torch.nn.Module | None, kind: type[_OutputMultiplier] | type[_InputMultiplier]
) -> float:
    if module is None:
        return 1.0
    # PyTorch has no public list of a module's hooks.
    hooks = (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
    return math.prod((hook.multiplier for hook in hooks if isinstance(hook, kind)), start=1.0)
