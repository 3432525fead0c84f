"""The fp32 weights that an optimizer updates, around one update, whoever holds which part.

Copies are made of what this rank holds and put together one tensor at a time. bf16 weights are not
looked at: most updates are smaller than their rounding. Changes nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from megatron_mup.optimizer.main_weights import main_weights, single_optimizers
from megatron_mup.training.state import TrainState


@dataclass(frozen=True)
class _Held:
    """One parameter's main weights on this rank.

    Attributes:
        main: fp32, flat or of the parameter's shape.
        start: first element of a flat range; 0 for a whole parameter.
        before: copy of ``main`` from before the update.
        decay: LR x weight decay of its group.
    """

    main: Tensor
    start: int
    before: Tensor
    decay: float


class WeightUpdate:
    """Main weights before and after an update; made right before it.

    Args:
        state: model and optimizer; the groups' LR and decay are those of the coming update.
    """

    def __init__(self, state: TrainState) -> None:
        self._sharded = state.run.parallel.use_distributed_optimizer
        self._held = {
            id(parameter): _Held(
                main,
                start or 0,
                main.detach().clone().view(-1),
                group["lr"] * group["weight_decay"],
            )
            for part, _ in single_optimizers(state.optimizer)
            for parameter, main, start, group in main_weights(part, state.model_chunks)
        }

    def decay(self, parameter: Tensor) -> float | None:
        """LR x weight decay of the parameter's group; None if this rank holds nothing of it."""
        held = self._held.get(id(parameter))
        return None if held is None else held.decay

    def before_and_change(self, parameter: Tensor) -> tuple[Tensor, Tensor]:
        """A parameter's local shard before the update, and what the update added.

        With a distributed optimizer all ranks of a data- and context-parallel group must call it,
        in the same order.

        Args:
            parameter: of the model.

        Returns:
            Two fp32 tensors of its shape; not to be written to.
        """
        held = self._held.get(id(parameter))
        if not self._sharded:
            assert held is not None, "a plain optimizer holds every trainable parameter"
            before = held.before
            return before.view(parameter.shape), (held.main.view(-1) - before).view(parameter.shape)
        both = torch.zeros(2, parameter.numel(), device=parameter.device)
        if held is not None:
            part = both[:, held.start : held.start + held.main.numel()]
            part[0] = held.before
            part[1] = held.main.view(-1) - held.before
        # Each element is held by one rank: the sum puts the tensor together.
        dist.all_reduce(
            both, group=parallel_state.get_data_parallel_group(with_context_parallel=True)
        )
        return both[0].view(parameter.shape), both[1].view(parameter.shape)
