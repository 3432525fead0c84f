"""The optimizer's part of a checkpoint: one form for every optimizer layout.

Moments and fp32 main weights are stored in the model's own space, under the key of the parameter:
``optimizer.state.exp_avg.<key>``, ``optimizer.state.fp32_param.<key>``. Whoever holds a part of a
tensor writes that part: the whole local tensor (plain optimizer), a whole matrix on one rank
(layer-wise), or a flat range of it (distributed optimizer), cut into boxes. So each rank writes no
more than its share, nothing is gathered, and every layout reads what another one wrote.

Learning rates, decays, betas and eps are not stored: configuration and schedule set them.
Upstream's own state dicts (megatron-core 0.19.2) are not used: the plain and the distributed
optimizer have different ones, groups are matched by their peak LR, and with torch's AdamW the
distributed optimizer loads one shared ``step`` tensor for all parameters, which each of them then
advances.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedBase
from megatron.core.dist_checkpointing.optimizer import make_sharded_optimizer_tensor
from torch import Tensor

from megatron_mup import platform
from megatron_mup.errors import CheckpointError
from megatron_mup.optimizer.main_weights import main_weights, single_optimizers
from megatron_mup.training.state import TrainState

STEP, TENSORS = "step", "tensors"
_PREFIX, _MAIN = "optimizer.state", "fp32_param"

Box = tuple[tuple[int, ...], tuple[int, ...]]
"""Offset and size of a block of a tensor."""


@dataclass(frozen=True)
class _Holding:
    """What this rank's optimizer keeps of one parameter.

    Attributes:
        name: unique among the parameters of this rank.
        parameter: the model's parameter.
        tensors: by kind, a moment or ``fp32_param``; of the parameter's shape or flat.
        start: first element of the flat range that is held; None for a whole parameter.
        alone: whether no other data-parallel rank holds the same.
    """

    name: str
    parameter: Tensor
    tensors: dict[str, Tensor]
    start: int | None
    alone: bool


def optimizer_tree(
    state: TrainState, model_tree: Mapping[str, Any], *, loading: bool
) -> dict[str, Any]:
    """The optimizer as a sharded state dict; every rank must call it.

    Args:
        state: model and optimizer; moments that do not exist yet are made, zero.
        model_tree: sharded state dict of ``state.model_chunks``, freshly made, any nesting.
        loading: whether the tree says what to read; its tensors are then overwritten.

    Returns:
        ``tensors``, which share memory with the optimizer, nested as parameter, kind, position of
        the first element; and unless loading ``step``, the number of updates.
    """
    places: dict[int, ShardedBase] = {
        id(place.data): place
        for place in nested_values(dict(model_tree))
        if isinstance(place, ShardedBase)
    }
    tensors: dict[str, dict[str, dict[str, ShardedBase]]] = {}
    for holding in _holdings(state):
        place = places[id(holding.parameter)]
        tensors[holding.name] = {
            kind: _placed(holding, place, kind, tensor) for kind, tensor in holding.tensors.items()
        }
    tree: dict[str, Any] = {TENSORS: tensors}
    if not loading:
        tree[STEP] = _common_step(state)
    return tree


def load_optimizer_tree(state: TrainState, loaded: Mapping[str, Any]) -> None:
    """Take over moments, main weights and the step count.

    The model's weights must be loaded already: in fp32 they are the main weights.

    Args:
        state: as given to ``optimizer_tree``.
        loaded: what was read for its tree, with the ``step`` that was saved.

    Raises:
        CheckpointError: the step count is missing.
    """
    step = loaded.get(STEP)
    if not isinstance(step, int):
        raise CheckpointError(
            f"the optimizer state in the checkpoint has no step count (found {step!r}); load only "
            "the weights with checkpoint.finetune=true"
        )
    with torch.no_grad():
        for holding in _holdings(state):
            for kind, tensor in holding.tensors.items():
                for first, value in loaded[TENSORS][holding.name][kind].items():
                    target = tensor.view(-1)[int(first) : int(first) + value.numel()]
                    # A box was read in place; what a factory cut was put together elsewhere.
                    if target.data_ptr() != value.data_ptr():
                        target.copy_(value.reshape(-1))
    for part, _ in single_optimizers(state.optimizer):
        _set_step(part.optimizer, step)


def _holdings(state: TrainState) -> Iterator[_Holding]:
    """Everything that this rank's optimizers keep; makes moments that do not exist yet."""
    names = {
        id(parameter): f"{index}.{name}"
        for index, chunk in enumerate(state.model_chunks)
        for name, parameter in chunk.named_parameters()
    }
    for part, alone in single_optimizers(state.optimizer):
        _make_moments(part)
        for parameter, main, start, _group in main_weights(part, state.model_chunks):
            tensors = {k: v for k, v in part.optimizer.state[main].items() if k != STEP}
            if parameter.dtype != torch.float32:
                tensors[_MAIN] = main
            yield _Holding(names[id(parameter)], parameter, tensors, start, alone)


def _make_moments(part: Any) -> None:
    """Zero moments where no step was taken yet, as the first step would make them."""
    inner = part.optimizer
    part.init_state_fn(inner, part.config)
    if isinstance(inner, torch.optim.Adam):
        # Upstream's function leaves out what torch's Adam then misses in its first step.
        for main in part.get_parameters():
            inner.state[main].setdefault(STEP, torch.tensor(0.0))


def _common_step(state: TrainState) -> int:
    """Updates taken, the same on all ranks; ranks (and Lion, and Muon) may not count them."""
    steps = [0.0]
    for part, _ in single_optimizers(state.optimizer):
        steps += [float(moments.get(STEP, 0)) for moments in part.optimizer.state.values()]
        # The fused Adam of TransformerEngine and apex counts in its groups.
        steps += [float(group.get(STEP, 0)) for group in part.optimizer.param_groups]
    common = torch.tensor(max(steps), device=platform.device())
    dist.all_reduce(common, op=dist.ReduceOp.MAX)
    return int(common.item())


def _set_step(inner: Any, step: int) -> None:
    """Set the count where the optimizer keeps one: with each parameter, or with each group."""
    own = [moments for moments in inner.state.values() if STEP in moments]
    for moments in own:
        # A tensor for each: shared ones are advanced by every parameter that shares them.
        moments[STEP] = torch.full_like(moments[STEP], step)
    counted = any("exp_avg_sq" in moments for moments in inner.state.values())
    for group in inner.param_groups if counted and not own else ():
        group[STEP] = step


def _placed(
    holding: _Holding, place: ShardedBase, kind: str, tensor: Tensor
) -> dict[str, ShardedBase]:
    """One tensor of the optimizer as pieces of the global one, by their first element's position.

    The last part of a replica id is the data-parallel rank; the replica with zeros alone writes.
    """
    if holding.start is None:
        whole = make_sharded_optimizer_tensor(place, tensor, prefix=f"{_PREFIX}.{kind}")
        return {"0": _written_here(whole) if holding.alone else whole}
    pieces: dict[str, ShardedBase] = {}
    stop = holding.start + tensor.numel()
    for region, first in _regions(place, holding.parameter):
        last = first + math.prod(region.local_shape)
        position = max(holding.start, first)
        for box in boxes(region.local_shape, position - first, min(stop, last) - first):
            flat = position - holding.start
            size = math.prod(box[1])
            pieces[str(flat)] = _piece(region, box, kind, tensor[flat : flat + size])
            position += size
    return pieces


def _written_here(place: Any) -> Any:
    return replace(place, replica_id=(*place.replica_id[:2], 0))


def _regions(place: ShardedBase, parameter: Tensor) -> Iterator[tuple[ShardedTensor, int]]:
    """The regular blocks that a parameter is stored as, and their first elements in it."""
    if isinstance(place, ShardedTensor):
        yield place, 0
        return
    # A factory (gate and up of a gated FFN) cuts what it is given: views of a tensor without data
    # tell where it cuts.
    blank = torch.empty(parameter.shape, dtype=parameter.dtype, device="meta")
    for block in nested_values(place.build_fn(place.key, blank, place.replica_id, None)):
        if not block.data.is_contiguous():
            raise RuntimeError(f"{place.key} is stored in blocks that are no ranges of it")
        yield block, block.data.storage_offset()


def boxes(shape: tuple[int, ...], start: int, stop: int) -> list[Box]:
    """Cut a range of a tensor's elements, in row-major order, into as few blocks as possible.

    Args:
        shape: of the tensor.
        start: first element.
        stop: element after the last one; the range is empty unless it exceeds ``start``.

    Returns:
        Offset and size of each block, in the order of their elements.
    """
    if start >= stop:
        return []
    if len(shape) == 1:
        return [((start,), (stop - start,))]
    row = math.prod(shape[1:])
    top, bottom = -(-start // row), stop // row
    if top > bottom:
        return _within_row(shape, bottom, start, stop)
    head = _within_row(shape, top - 1, start, top * row)
    body = [((top, *(0,) * (len(shape) - 1)), (bottom - top, *shape[1:]))] if top < bottom else []
    return head + body + _within_row(shape, bottom, bottom * row, stop)


def _within_row(shape: tuple[int, ...], index: int, start: int, stop: int) -> list[Box]:
    first = index * math.prod(shape[1:])
    inner = boxes(shape[1:], start - first, stop - first)
    return [((index, *offset), (1, *size)) for offset, size in inner]


def _piece(region: ShardedTensor, box: Box, kind: str, data: Tensor) -> ShardedTensor:
    """One box of a stored block, with the axes that stack the layers written out."""
    stacked = region.prepend_axis_num
    offset = (*(0,) * stacked, *box[0])
    size = (*(1,) * stacked, *box[1])
    return ShardedTensor(
        key=f"{_PREFIX}.{kind}.{region.key}",
        data=data.view(size),
        dtype=data.dtype,
        local_shape=size,
        global_shape=region.global_shape,
        global_offset=tuple(map(sum, zip(region.global_offset, offset, strict=True))),
        # Boxes lie on no regular grid.
        axis_fragmentations=None,
        replica_id=(*region.replica_id[:2], 0),
    )
