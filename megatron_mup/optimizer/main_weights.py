"""Which main weights this rank's optimizer holds: whole tensors, or flat ranges of them.

A plain optimizer holds every tensor on each data-parallel rank, the distributed one a flat range
of it, the layer-wise one whole matrices on one rank. Reads upstream's bookkeeping (0.19.2); changes
nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.layer_wise_optimizer import LayerWiseDistributedOptimizer
from torch import Tensor


class MainWeight(NamedTuple):
    """What this rank's optimizer holds of one parameter.

    Attributes:
        parameter: the model's parameter.
        main: what is updated: its fp32 copy, a flat part of that, or the parameter itself.
        start: first element of the flat range that is held; None for a whole parameter.
        group: its optimizer group.
    """

    parameter: Tensor
    main: Tensor
    start: int | None
    group: dict[str, Any]


def single_optimizers(optimizer: Any, *, alone: bool = False) -> Iterator[tuple[Any, bool]]:
    """Megatron's single optimizers, and whether each rank holds parameters of its own.

    Args:
        optimizer: a ``MegatronOptimizer``, chained or not.
        alone: whether that is known of all of it.
    """
    alone = alone or isinstance(optimizer, LayerWiseDistributedOptimizer | DistributedOptimizer)
    if hasattr(optimizer, "chained_optimizers"):
        for part in optimizer.chained_optimizers:
            yield from single_optimizers(part, alone=alone)
    # A rank without trainable parameters has no inner optimizer.
    elif optimizer.optimizer is not None:
        yield optimizer, alone


def main_weights(part: Any, model_chunks: Sequence[torch.nn.Module]) -> Iterator[MainWeight]:
    """Everything that one optimizer holds on this rank.

    Args:
        part: from ``single_optimizers``.
        model_chunks: the models that it trains.
    """
    groups = part.optimizer.param_groups
    if isinstance(part, DistributedOptimizer):
        for parameter, (buffer, dtype, bucket) in part.model_param_gbuf_map.items():
            share = part.gbuf_ranges[buffer][dtype][bucket]["param_map"][parameter]["param"]
            number, order = part.model_param_group_index_map[parameter]
            group = groups[number]
            yield MainWeight(parameter, group["params"][order], share.start, group)
        return
    # A bf16 parameter knows its fp32 copy; an fp32 one is its own.
    originals = {
        id(getattr(parameter, "main_param", parameter)): parameter
        for chunk in model_chunks
        for parameter in chunk.parameters()
    }
    for group in groups:
        for main in group["params"]:
            yield MainWeight(originals[id(main)], main, None, group)
