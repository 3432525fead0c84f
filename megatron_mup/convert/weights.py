"""What a conversion reads from: weights as logical tensors, one at a time."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from megatron_mup.config import ModelConfig
from megatron_mup.parameterization.evaluation import Multipliers


class WeightSource(Protocol):
    """Weights of a model, whatever they are stored in.

    Attributes:
        model: the architecture; its logical tensors (``logical_tensors(model.shape)``) are what
            can be read.
        multipliers: the forward multipliers under which the weights are the model's function.
        where: the file or folder, for messages.
        provenance: plain data about where the weights come from: iteration, revision, data.
    """

    model: ModelConfig
    multipliers: Multipliers
    where: str
    provenance: Mapping[str, Any]

    def read(self, name: str) -> Tensor:
        """Read one logical tensor.

        Args:
            name: ``LogicalTensor.name``, one of ``logical_tensors(model.shape)``.

        Returns:
            The whole tensor, of ``LogicalTensor.shape``, contiguous, on the CPU; the caller owns
            it. The fp32 main weight where there is one. In float32, or in the bfloat16 or float16
            that it is stored in: the same values in half of the memory.

        Raises:
            CheckpointError: it is missing, damaged or of another shape; names file and tensor.
        """
        ...


def all_finite(values: Tensor) -> bool:
    """Whether no element is NaN or infinite; makes no second tensor, for NaN is its own extreme."""
    return not values.numel() or bool(torch.stack(torch.aminmax(values)).isfinite().all())
