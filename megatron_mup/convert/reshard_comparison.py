"""Proof that a rewritten checkpoint is its source, bit for bit, while it is still being written.

Each file is read back and compared when it is on the disk, and the next one is written meanwhile.
At the end the description that readers will use must name just the blocks that were compared.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch

from megatron_mup.convert.stored_blocks import Sizes, StoredPart, find_values
from megatron_mup.convert.stored_places import COMMON_STATE
from megatron_mup.convert.stored_tensors import StoredTensors
from megatron_mup.errors import CheckpointError

_COMPARED_BYTES = 1 << 20
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class ReshardComparison:
    """Compares the files of a copy with its source.

    Args:
        source: what is copied.
        folder: what is written.
    """

    def __init__(self, source: StoredTensors, folder: Path) -> None:
        self._source, self._folder = source, folder
        # Files are compared in several threads; adding to a set is one step of the interpreter.
        self._same: set[tuple[str, StoredPart]] = set()

    def compare_file(self, parts: Mapping[str, Sequence[StoredPart]]) -> None:
        """Compare what one file holds.

        Args:
            parts: of tensors, by key.

        Raises:
            CheckpointError: a bit differs, or something cannot be read.
        """
        for key, written in parts.items():
            for part in written:
                self._compare(key, part)
                self._same.add((key, part))

    def finish(self) -> None:
        """Compare all else once the folder is complete.

        Raises:
            CheckpointError: something differs, or the folder names a block that was not compared.
        """
        # Checksums of blocks that are compared themselves would add nothing.
        copied, source = StoredTensors(self._folder, trusted=True), self._source
        if copied.tensors.keys() != source.tensors.keys():
            raise self._differs("the names of its tensors")
        if copied.objects.keys() != source.objects.keys():
            raise self._differs("the names of its objects")
        for key, stored in source.tensors.items():
            other = copied.tensors[key]
            if (other.shape, other.dtype) != (stored.shape, stored.dtype):
                raise self._differs(f"shape or dtype of {key}")
            # No two blocks of a description overlap.
            found = sum(math.prod(part.size) for part in other.parts)
            compared = all((key, part) in self._same for part in other.parts)
            if found != math.prod(stored.shape) or not compared:
                raise self._differs(key)
        for key in source.objects:
            # The layout is in the common state.
            if key != COMMON_STATE and copied.read_bytes(key) != source.read_bytes(key):
                raise self._differs(key)

    def _compare(self, key: str, part: StoredPart) -> None:
        stored = self._source.tensors[key]
        try:
            values = find_values(self._folder, part)
        # What was damaged on its way to the disk can raise anything.
        except Exception as error:
            raise self._differs(key) from error
        if (values.dtype, values.size) != (stored.dtype, part.size):
            raise self._differs(f"shape or dtype of {key}")
        integers = _INTEGERS[stored.dtype.itemsize]
        for first, size in _slices(part.size, stored.dtype.itemsize):
            found = torch.empty(size, dtype=stored.dtype)
            values.read_into(found, first)
            offset = tuple(start + at for start, at in zip(part.offset, first, strict=True))
            right = self._source.read(key, offset, size)
            # As integers, NaN equals itself and zeros have a sign.
            if not torch.equal(found.view(integers), right.view(integers)):
                raise self._differs(key)

    def _differs(self, what: str) -> CheckpointError:
        return CheckpointError(
            f"the copy in {self._folder} differs from its source in {what}: memory or disk of this "
            "machine cannot be trusted, or the source was changed meanwhile; nothing was kept"
        )


def _slices(size: Sizes, itemsize: int) -> Iterator[tuple[Sizes, Sizes]]:
    """Offset and size of consecutive boxes of a block, each of few bytes."""
    axis = next((axis for axis, count in enumerate(size) if count > 1), None)
    if axis is None:
        yield (0,) * len(size), size
        return
    rows = max(1, _COMPARED_BYTES // (math.prod(size[axis + 1 :]) * itemsize))
    for first in range(0, size[axis], rows):
        count = min(rows, size[axis] - first)
        offset = tuple(first if other == axis else 0 for other in range(len(size)))
        yield offset, (*size[:axis], count, *size[axis + 1 :])
