"""The values of one block that ``torch.save`` wrote, read row by row from their place in the file.

``torch.load`` would make a tensor of the whole block first, in fresh memory, and hold the
interpreter's lock meanwhile. Here torch only tells where the values lie. Proves nothing: checksums
are ``stored_tensors``'s.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

import torch
from torch import Tensor

from megatron_mup.convert.file_part import FilePart

_STAGING_BYTES = 1 << 20
"""Values that are cast or cut are read by so many; they stay near the processor."""

Sizes = tuple[int, ...]


@dataclass(frozen=True)
class StoredPart:
    """Bytes of a file that hold one block of a tensor, or one object.

    Attributes:
        file: name inside the folder.
        position: of the first byte.
        length: bytes.
        offset: of the block in its tensor; () for an object.
        size: of the block; () for an object.
    """

    file: str
    position: int
    length: int
    offset: Sizes = ()
    size: Sizes = ()


@dataclass(frozen=True)
class BlockValues:
    """Where the values of a block lie.

    Attributes:
        path: the file.
        part: the block in it.
        dtype: as stored.
        size: of the block, as the file says.
        position: of the first value's first byte, if they lie in row-major order.
    """

    path: Path
    part: StoredPart
    dtype: torch.dtype
    size: Sizes
    position: int | None

    def read_into(self, target: Tensor, first: Sizes) -> None:
        """Read a box of the block.

        Args:
            target: any CPU view of the box's size and any dtype; takes the values, cast.
            first: offset of the box in the block.

        Raises:
            OSError: the file cannot be read, or ends before.
        """
        if self.position is None:
            block = _loaded(self.path, self.part, "cpu")
            for axis, (start, count) in enumerate(zip(first, target.shape, strict=True)):
                block = block.narrow(axis, start, count)
            target.copy_(block)
            return
        with self.path.open("rb", buffering=0) as stream:
            _Reader(stream.fileno(), self.dtype).read(self.position, self.size, first, target)


def find_values(folder: Path, part: StoredPart) -> BlockValues:
    """Find the values of a block.

    Args:
        folder: of the file.
        part: the block.

    Raises:
        ValueError: the part holds something else.
        Exception: whatever torch makes of a damaged part.
    """
    path = folder / part.file
    found = _loaded(path, part, "meta")
    if type(found) is not Tensor:
        raise ValueError(f"no tensor but {type(found).__name__}")
    position = None
    if found.is_contiguous():
        # torch 2.11 notes it for whoever reads the values later.
        start = int(found.untyped_storage()._checkpoint_offset or 0)
        start += int(found.storage_offset()) * found.dtype.itemsize
        if start + found.nbytes > part.length:
            raise ValueError("its values end outside of it")
        position = part.position + start
    return BlockValues(path, part, found.dtype, tuple(found.shape), position)


def _loaded(path: Path, part: StoredPart, device: str) -> Any:
    with FilePart(path, part.position, part.length) as view:
        return torch.load(cast(IO[bytes], view), map_location=device, weights_only=True)


class _Reader:
    """Reads boxes from an open file."""

    def __init__(self, descriptor: int, dtype: torch.dtype) -> None:
        self._descriptor, self._dtype = descriptor, dtype
        self._staging: Tensor | None = None

    def read(self, position: int, size: Sizes, first: Sizes, target: Tensor) -> None:
        """Read the box at ``first`` of the block at ``position`` into a target of its size."""
        if not target.numel():
            return
        row_bytes = math.prod(size[1:]) * self._dtype.itemsize
        if len(size) > 1 and (size[0] == 1 or row_bytes > _STAGING_BYTES):
            for index, rows in enumerate(target):
                start = position + (first[0] + index) * row_bytes
                self.read(start, size[1:], first[1:], rows)
            return
        position += (first[0] if size else 0) * row_bytes
        whole = tuple(target.shape[1:]) == size[1:]
        if whole and target.dtype == self._dtype and target.is_contiguous():
            self._fill(position, target)
            return
        count = max(1, _STAGING_BYTES // row_bytes)
        for part in torch.split(target, count) if size else (target,):
            rows = self._rows((len(part), *size[1:]) if size else ())
            self._fill(position, rows)
            position += rows.nbytes
            for axis, (start, width) in enumerate(zip(first, part.shape, strict=True)):
                rows = rows if axis == 0 else rows.narrow(axis, start, width)
            part.copy_(rows)

    def _rows(self, size: Sizes) -> Tensor:
        count = math.prod(size)
        if self._staging is None or self._staging.numel() < count:
            self._staging = torch.empty(count, dtype=self._dtype)
        return self._staging[:count].view(size)

    def _fill(self, position: int, target: Tensor) -> None:
        rest = memoryview(target.view(-1).view(torch.uint8).numpy())
        while rest:
            count = os.preadv(self._descriptor, [rest], position)
            if not count:
                raise OSError("the file ends inside it")
            rest, position = rest[count:], position + count
