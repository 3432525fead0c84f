"""Tensors of an output against what was written into them, bit for bit.

Streams: one tensor of each side is in memory at a time. A forward pass on text proves the formula,
this proves the values, also of those that no text reaches.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict

import torch
from torch import Tensor

from megatron_mup.convert.formats import hf_name
from megatron_mup.convert.huggingface_config import read_config
from megatron_mup.convert.huggingface_folder import CONFIG_FILE, read_json
from megatron_mup.convert.megatron_source import MegatronSource
from megatron_mup.convert.stored_places import MAIN_WEIGHT, place_of
from megatron_mup.convert.transformers_forward import ExportedFolder
from megatron_mup.convert.weights import WeightSource
from megatron_mup.parameterization.roles import LogicalTensor, logical_tensors

_COMPARED = 1 << 22
"""Elements that are compared at once, so that no second tensor of truth values is made."""

_ROUNDING = 1e-12
"""Of a multiplier that config.json keeps as its inverse."""

_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def different_files(exported: WeightSource, files: ExportedFolder) -> Iterator[str]:
    """Compare the files of a folder for transformers.

    Args:
        exported: what they were cast from, under the folder's gains and multipliers.
        files: the folder. Tensors that it lacks or that have another shape are passed over: see
            ``ExportedFolder.misfits``.

    Returns:
        A line for each tensor that is not the one cast of what was exported, and for each
        multiplier of config.json that is another: where queries are zero, no forward pass shows
        that of attention.

    Raises:
        CheckpointError: a tensor cannot be read on either side.
    """
    path = files.folder / CONFIG_FILE
    _, _, multipliers = read_config(read_json(path), str(path))
    for kind, right in asdict(exported.multipliers).items():
        found = getattr(multipliers, kind)
        if not math.isclose(found, right, rel_tol=_ROUNDING):
            yield f"{CONFIG_FILE}: {kind} multiplier {found} instead of {right}"
    for tensor in logical_tensors(exported.model.shape):
        name = hf_name(tensor)
        if name not in files.tensors or files.tensors[name].shape != tensor.shape:
            continue
        stored = files.read(name)
        wrong = _different(stored, exported.read(tensor.name))
        if wrong:
            yield (
                f"{name}: {wrong} of {stored.numel()} elements are not the cast of the source "
                f"({files.file_name(name)})"
            )


def different_weights(expected: WeightSource, written: WeightSource) -> Iterator[str]:
    """Compare a written checkpoint with what was written into it.

    In fp32, so that a bf16 checkpoint that should have main weights and has none differs. Where it
    has them, the rounded weights beside them must be their cast: a run may start from either.

    Args:
        expected: what it was written from, under its own gains and multipliers.
        written: the checkpoint.

    Returns:
        A line for each tensor that is not the expected one.

    Raises:
        CheckpointError: a tensor cannot be read on either side.
    """
    for tensor in logical_tensors(expected.model.shape):
        right, found = expected.read(tensor.name), written.read(tensor.name)
        if found.shape != right.shape:
            yield f"{tensor.name}: shape {list(found.shape)} instead of {list(right.shape)}"
            continue
        wrong = _different(found, right, dtype=torch.float32)
        del found
        if wrong:
            yield f"{tensor.name}: {wrong} of {right.numel()} elements are not what was converted"
        elif isinstance(written, MegatronSource):
            wrong = _differently_rounded(written, tensor, right)
            if wrong:
                yield f"{tensor.name}: {wrong} of {right.numel()} rounded weights are not its cast"


def _differently_rounded(written: MegatronSource, tensor: LogicalTensor, right: Tensor) -> int:
    """How many of the weights that a checkpoint keeps beside main weights are not their cast."""
    place = place_of(tensor, written.model.shape)
    if MAIN_WEIGHT + place.key not in written.stored.tensors:
        return 0
    wrong = 0
    for rows in place.rows:
        block = right[rows.first : rows.first + rows.count]
        size = block.shape if place.layer is None else (1, *block.shape)
        wrong += _different(written.read_stored(place.key, rows.offset, tuple(size)), block)
    return wrong


def _different(stored: Tensor, expected: Tensor, *, dtype: torch.dtype | None = None) -> int:
    """How many elements are not the expected ones, both cast; unset means to the stored dtype."""
    dtype = dtype or stored.dtype
    parts = (torch.split(values.reshape(-1), _COMPARED) for values in (stored, expected))
    pairs = zip(*parts, strict=True)
    return sum(int((_bits(one.to(dtype)) != _bits(other.to(dtype))).sum()) for one, other in pairs)


def _bits(values: Tensor) -> Tensor:
    return values.contiguous().view(_INTEGERS[values.element_size()])
