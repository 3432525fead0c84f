"""Where a logical tensor lies among the stored tensors of a Megatron checkpoint.

Megatron stacks the layers of one kind on a first axis, keeps query, key and value (and gate and up)
in one tensor, and stores the gain of a norm with the linear layer that follows it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from megatron_mup.convert.stored_blocks import Sizes
from megatron_mup.convert.stored_tensors import Piece, StoredTensors
from megatron_mup.model.initialization import part_view
from megatron_mup.parameterization.roles import (
    LogicalTensor,
    ModelShape,
    NormGain,
    Part,
    Role,
    logical_tensors,
)

OPTIMIZER_PREFIX = "optimizer.state."
MAIN_WEIGHT = OPTIMIZER_PREFIX + "fp32_param."
"""Before the key of a weight: its fp32 main weight, in checkpoints of bf16 runs."""
COMMON_STATE = "common_state/shard_0_1"
"""Key of the plain values: iteration, samples, steps of the optimizer."""

HALVES = (torch.bfloat16, torch.float16)
"""Dtypes in which tensors are handed on as they are stored."""

_LAYERS = "decoder.layers."
_WITH_NEXT = {
    "input_layernorm.weight": "self_attention.linear_qkv.layer_norm_weight",
    "pre_mlp_layernorm.weight": "mlp.linear_fc1.layer_norm_weight",
}
_LINEAR = ("self_attention.linear_qkv", "self_attention.linear_proj", "mlp.linear_fc1")
_EXTRA_STATES = (*_LINEAR, "mlp.linear_fc2", "self_attention.core_attention")


@dataclass(frozen=True)
class Rows:
    """Consecutive rows of a logical tensor that are one box of the stored tensor.

    Attributes:
        first: row of the logical tensor.
        count: rows.
        offset: of the box in the stored tensor, with the axis of the layers.
    """

    first: int
    count: int
    offset: Sizes


@dataclass(frozen=True)
class Place:
    """Where one logical tensor lies.

    Attributes:
        key: of the stored tensor.
        shape: of the whole stored tensor.
        layer: index on its first axis; None for tensors outside the layers.
        rows: the boxes, in the order of the logical tensor's rows.
    """

    key: str
    shape: Sizes
    layer: int | None
    rows: tuple[Rows, ...]


def place_of(tensor: LogicalTensor, shape: ModelShape) -> Place:
    """Where a logical tensor of a model lies."""
    total = _parameter_rows(tensor, shape)
    # What lies where in a fused parameter is known to the model; numbered rows tell it.
    numbers = part_view(torch.arange(total), tensor.part, shape)
    runs = numbers.reshape(-1, numbers.shape[-1])
    rest = tensor.shape[1:]
    key, layer = _key(tensor.parameter)
    lead = () if layer is None else (layer,)
    zeros = (0,) * len(rest)
    rows = tuple(
        Rows(index * len(run), len(run), (*lead, int(run[0]), *zeros))
        for index, run in enumerate(runs)
    )
    stack = () if layer is None else (shape.num_layers,)
    return Place(key, (*stack, total, *rest), layer, rows)


def read_rows(stored: StoredTensors, key: str, place: Place, shape: Sizes) -> Tensor:
    """Read a logical tensor from where it lies, as ``WeightSource.read``.

    Args:
        stored: the checkpoint.
        key: of the stored tensor; its own or that of its main weights.
        place: the rows in it.
        shape: of the logical tensor.

    Raises:
        CheckpointError: as ``StoredTensors.read``.
    """
    # A key that is not there is refused when its pieces are read.
    held = stored.tensors[key].dtype if key in stored.tensors else None
    values = torch.empty(shape, dtype=held if held in HALVES else torch.float32)
    pieces = []
    for rows in place.rows:
        target = values[rows.first : rows.first + rows.count]
        pieces.append(Piece(rows.offset, target if place.layer is None else target.unsqueeze(0)))
    stored.read_pieces(key, pieces)
    return values


def unlearned_gains(shape: ModelShape) -> Iterator[LogicalTensor]:
    """The gains of a model without learned ones, which Megatron stores all the same, as ones."""
    if shape.norm_gain is NormGain.NONE:
        full = logical_tensors(replace(shape, norm_gain=NormGain.VECTOR))
        yield from (tensor for tensor in full if tensor.role is Role.GAIN)


def extra_state_keys(shape: ModelShape) -> list[str]:
    """Keys of what TransformerEngine keeps beside its weights; empty objects without FP8."""
    layers = shape.num_layers
    return [
        f"{_LAYERS}{module}._extra_state/shard_{layer}_{layers}"
        for layer in range(layers)
        for module in _EXTRA_STATES
    ]


def _key(parameter: str) -> tuple[str, int | None]:
    if not parameter.startswith(_LAYERS):
        return parameter, None
    number, _, rest = parameter.removeprefix(_LAYERS).partition(".")
    return _LAYERS + _WITH_NEXT.get(rest, rest), int(number)


def _parameter_rows(tensor: LogicalTensor, shape: ModelShape) -> int:
    """Rows of the parameter that holds a logical tensor."""
    if tensor.part is Part.WHOLE:
        return tensor.shape[0]
    if tensor.part in (Part.GATE, Part.UP):
        return 2 * shape.ffn_hidden_size
    return shape.attention_width + 2 * shape.num_query_groups * shape.kv_channels
