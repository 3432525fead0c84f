"""Forward multipliers on the embedding and on the readout of a built GPT.

The attention scale enters through ``TransformerConfig.softmax_scale`` and the residual multiplier
through the layer spec; these two act on modules that GPTModel builds itself, so they are forward
hooks. A multiplier of 1 registers nothing. The logit multiplier acts on the final hidden state
[S, B, M], which is V/M times smaller than the logits and leaves a readout bias outside.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megatron_mup.parameterization.rules import Multipliers


def register_multipliers(model: torch.nn.Module, multipliers: Multipliers) -> None:
    """Attach the embedding and logit multipliers to one pipeline stage.

    Args:
        model: a GPTModel; stages without embedding or readout get nothing.
        multipliers: from the parameter table.
    """
    embedding = getattr(model, "embedding", None)
    if embedding is not None and multipliers.embedding != 1.0:
        _multiply_output(embedding, multipliers.embedding)
    # Scaling the readout's input leaves a tied matrix, and so the embedding's output, alone.
    output_layer = getattr(model, "output_layer", None)
    if output_layer is not None and multipliers.logit != 1.0:
        _multiply_input(output_layer, multipliers.logit)


def _multiply_output(module: torch.nn.Module, multiplier: float) -> None:
    def hook(_module: torch.nn.Module, _inputs: Any, output: Tensor) -> Tensor:
        return output * multiplier

    module.register_forward_hook(hook)


def _multiply_input(module: torch.nn.Module, multiplier: float) -> None:
    def hook(_module: torch.nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        # A tied weight arrives as a keyword argument, which such a hook neither sees nor drops.
        return (inputs[0] * multiplier, *inputs[1:])

    module.register_forward_pre_hook(hook)
