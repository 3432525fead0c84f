"""The tensors of a torch_dist folder, read box by box without process groups.

Owns how a stored tensor is found in the files and proved whole: every block was written by
``torch.save``, whose zip holds a CRC-32 that torch itself does not compare. Knows neither models
nor records. Nothing of a file is run: the description goes through ``safe_pickle``, blocks through
torch's restricted unpickler.

A *box* is a block of a stored tensor, its offset and its size on each axis.
"""

from __future__ import annotations

import argparse
import math
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata

from megatron_mup.checkpoint.safe_pickle import safe_reading
from megatron_mup.convert.file_part import FilePart
from megatron_mup.convert.stored_blocks import BlockValues, Sizes, StoredPart, find_values
from megatron_mup.errors import CheckpointError

METADATA = ".metadata"
_BLOCK_BYTES = 1 << 20
_DAMAGES_NAMED = 3

Box = tuple[Sizes, Sizes]
"""Offset and size."""


@dataclass(frozen=True)
class StoredTensor:
    """What the folder says of one tensor.

    Attributes:
        key: its name.
        shape: of the whole tensor; the tensors of all layers are stacked on the first axis.
        dtype: as stored.
        parts: its blocks, in any order.
    """

    key: str
    shape: Sizes
    dtype: torch.dtype
    parts: tuple[StoredPart, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of the values."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class Piece:
    """A box that is wanted, and where it goes.

    Attributes:
        offset: of the box in the stored tensor.
        target: view of the box's size; takes the values, cast to its dtype.
    """

    offset: Sizes
    target: Tensor


class StoredTensors:
    """Random access to one folder of format torch_dist.

    Args:
        folder: holds ``.metadata`` and the files that it names.
        trusted: leave out the checksums of the blocks: those of the files were compared.

    Attributes:
        tensors: by key.
        objects: other items by key, as ``torch.save`` wrote them.
        trusted: as given; may change.

    Raises:
        CheckpointError: the description is missing, damaged or wants to run code.
    """

    def __init__(self, folder: Path, *, trusted: bool = False) -> None:
        self.folder, self.trusted = folder, trusted
        metadata = _read_metadata(folder)
        try:
            self.tensors, self.objects = _index(metadata)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise CheckpointError(
                f"{folder / METADATA} does not describe its own files ({error}); copy it again or "
                "use another checkpoint"
            ) from error
        self._proved: set[StoredPart] = set()
        self._by_box: dict[str, dict[Box, StoredPart]] = {}
        self._found: dict[StoredPart, BlockValues] = {}

    def read(
        self,
        key: str,
        offset: Sizes | None = None,
        size: Sizes | None = None,
        *,
        dtype: torch.dtype | None = None,
    ) -> Tensor:
        """Read one box.

        Args:
            key: name of the tensor.
            offset: of the box; unset means zeros.
            size: of the box; unset means all that follows the offset.
            dtype: of the result; unset means as stored.

        Returns:
            Contiguous CPU tensor of the box's size, owned by the caller.

        Raises:
            CheckpointError: missing, incomplete or damaged; names file and tensor.
        """
        stored = self._stored(key)
        offset = (0,) * len(stored.shape) if offset is None else offset
        if size is None:
            size = tuple(whole - first for whole, first in zip(stored.shape, offset, strict=True))
        target = torch.empty(size, dtype=dtype or stored.dtype)
        self.read_pieces(key, [Piece(offset, target)])
        return target

    def read_pieces(self, key: str, pieces: Iterable[Piece]) -> None:
        """Read several boxes of one tensor; each of its blocks is read once.

        Args:
            key: name of the tensor.
            pieces: boxes that do not overlap.

        Raises:
            CheckpointError: as ``read``.
        """
        stored, pieces = self._stored(key), list(pieces)
        missing = sum(piece.target.numel() for piece in pieces)
        for part, wanted in self._parts_for(stored, pieces):
            values = self._values(stored, part)
            for piece, box in wanted:
                target = _window(piece.target, piece.offset, box)
                first = tuple(at - start for at, start in zip(box[0], part.offset, strict=True))
                self._fill(stored, part, values, (target, first))
                missing -= target.numel()
        if missing:
            raise CheckpointError(
                f"{self.folder / METADATA} names no file for {missing} elements of {key}; the "
                "checkpoint is incomplete: copy it again or use another one"
            )

    def read_object(self, key: str) -> Any:
        """One object, plain data and tensors only.

        Raises:
            CheckpointError: missing, damaged or wanting to run code.
        """
        part = self._object(key)
        values = self._unpickled(part, key)
        # Megatron writes each object as a list of one.
        return values[0] if isinstance(values, list) and len(values) == 1 else values

    def read_bytes(self, key: str) -> bytes:
        """One object as it is stored.

        Raises:
            CheckpointError: missing or damaged.
        """
        part = self._object(key)
        self._prove(part, key)
        with self._open(part, key) as view:
            return view.read(part.length)

    def damages(self, file: str) -> list[str]:
        """Keys of tensors and objects with a damaged part in a file; reads all of it."""
        found = []
        for key, parts in self._parts_by_key().items():
            try:
                for part in parts:
                    if part.file == file:
                        self._prove(part, key)
            except CheckpointError:
                found.append(key)
        return found

    def explain(self, problem: str) -> str:
        """A problem of ``integrity.check_files`` with the tensors that it concerns."""
        named = [name for name in self._files() if str(self.folder / name) in problem]
        damaged = [key for name in named for key in self.damages(name)]
        if not damaged:
            return problem
        more = len(damaged) - _DAMAGES_NAMED
        listed = ", ".join(damaged[:_DAMAGES_NAMED]) + (f" and {more} more" if more > 0 else "")
        return f"{problem} Damaged in it: {listed}."

    def _files(self) -> set[str]:
        return {part.file for parts in self._parts_by_key().values() for part in parts}

    def _parts_by_key(self) -> dict[str, tuple[StoredPart, ...]]:
        parts = {key: stored.parts for key, stored in self.tensors.items()}
        return parts | {key: (part,) for key, part in self.objects.items()}

    def _stored(self, key: str) -> StoredTensor:
        try:
            return self.tensors[key]
        except KeyError:
            raise CheckpointError(f"{self.folder / METADATA} has no tensor {key}") from None

    def _object(self, key: str) -> StoredPart:
        try:
            return self.objects[key]
        except KeyError:
            raise CheckpointError(f"{self.folder / METADATA} has no item {key}") from None

    def _parts_for(
        self, stored: StoredTensor, pieces: list[Piece]
    ) -> Iterator[tuple[StoredPart, list[tuple[Piece, Box]]]]:
        """The parts that meet pieces, each with those pieces and the boxes where they meet."""
        # Thousands of heads are parts of their own, and most pieces are one of them.
        if stored.key not in self._by_box:
            self._by_box[stored.key] = {(part.offset, part.size): part for part in stored.parts}
        others = []
        for piece in pieces:
            box = (piece.offset, tuple(piece.target.shape))
            same = self._by_box[stored.key].get(box)
            if same is None:
                others.append(piece)
            else:
                yield same, [(piece, box)]
        for part in stored.parts if others else ():
            wanted = [(piece, meet) for piece in others if (meet := _overlap(part, piece))]
            if wanted:
                yield part, wanted

    def _values(self, stored: StoredTensor, part: StoredPart) -> BlockValues:
        """Where a part's values are, after it was proved."""
        if part in self._found:
            return self._found[part]
        self._prove(part, stored.key)
        try:
            values = find_values(self.folder, part)
        # A damaged pickle can raise anything.
        except Exception as error:
            raise self._damage(part, stored.key, _first_line(error)) from error
        found, right = (values.dtype, values.size), (stored.dtype, part.size)
        if found != right:
            raise self._damage(part, stored.key, f"{found} instead of {right}")
        self._found[part] = values
        return values

    def _fill(
        self,
        stored: StoredTensor,
        part: StoredPart,
        values: BlockValues,
        wanted: tuple[Tensor, Sizes],
    ) -> None:
        try:
            values.read_into(*wanted)
        except OSError as error:
            reason = error.strerror or str(error)
            raise self._damage(part, stored.key, reason) from error

    def _unpickled(self, part: StoredPart, key: str) -> Any:
        self._prove(part, key)
        try:
            with self._open(part, key) as view:
                stream = cast(IO[bytes], view)
                # The common state holds upstream's arguments. Importing megatron allows their class
                # as well, and leaving the context would take that back.
                allowed = torch.serialization.get_safe_globals()
                extra: list[Any] = [] if argparse.Namespace in allowed else [argparse.Namespace]
                with torch.serialization.safe_globals(extra):
                    return torch.load(stream, map_location="cpu", weights_only=True)
        # A damaged pickle can raise anything.
        except Exception as error:
            raise self._damage(part, key, _first_line(error)) from error

    def _prove(self, part: StoredPart, key: str) -> None:
        """Compare the checksums inside a part's zip; once for each part."""
        if self.trusted or part in self._proved:
            return
        try:
            with self._open(part, key) as view, zipfile.ZipFile(view) as archive:
                for entry in archive.infolist():
                    with archive.open(entry) as record:
                        while record.read(_BLOCK_BYTES):
                            pass
        except (OSError, zipfile.BadZipFile, EOFError, ValueError, NotImplementedError) as error:
            raise self._damage(part, key, _first_line(error)) from error
        self._proved.add(part)

    def _open(self, part: StoredPart, key: str) -> FilePart:
        try:
            return FilePart(self.folder / part.file, part.position, part.length)
        except OSError as error:
            raise self._damage(part, key, error.strerror or str(error)) from error

    def _damage(self, part: StoredPart, key: str, reason: str) -> CheckpointError:
        return CheckpointError(
            f"{self.folder / part.file}: {key} is damaged ({reason}); copy the file again or use "
            "another checkpoint"
        )


def _read_metadata(folder: Path) -> Metadata:
    path = folder / METADATA
    try:
        with safe_reading(folder):
            return FileSystemReader(folder).read_metadata()
    except CheckpointError:
        raise
    except FileNotFoundError as error:
        raise CheckpointError(
            f"{path} is missing: {folder} is no checkpoint of format torch_dist"
        ) from error
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror or error}") from error


def _index(metadata: Metadata) -> tuple[Mapping[str, StoredTensor], Mapping[str, StoredPart]]:
    """Tensors and objects by key, from torch's description."""
    parts: dict[str, list[StoredPart]] = {}
    sizes = {
        (key, tuple(chunk.offsets)): tuple(chunk.sizes)
        for key, entry in metadata.state_dict_metadata.items()
        if not isinstance(entry, BytesStorageMetadata)
        for chunk in entry.chunks
    }
    for index, info in (metadata.storage_data or {}).items():
        offset = () if index.offset is None else tuple(index.offset)
        size = () if index.offset is None else sizes[index.fqn, offset]
        part = StoredPart(info.relative_path, info.offset, info.length, offset, size)
        parts.setdefault(index.fqn, []).append(part)
    tensors, objects = {}, {}
    for key, entry in metadata.state_dict_metadata.items():
        if isinstance(entry, BytesStorageMetadata):
            objects[key] = parts[key][0]
        else:
            found, shape = tuple(parts.get(key, ())), tuple(entry.size)
            _check_blocks(key, shape, found)
            tensors[key] = StoredTensor(key, shape, entry.properties.dtype, found)
    return tensors, objects


def _check_blocks(key: str, shape: Sizes, parts: Iterable[StoredPart]) -> None:
    """Refuse blocks that leave their tensor or share elements.

    Whether a box is whole is told by counting elements, and an element twice would hide a hole.
    """
    blocks = sorted((part.offset, part.size) for part in parts)
    for number, (first, size) in enumerate(blocks):
        axes = zip(shape, first, size, strict=True)
        if any(start < 0 or start + count > whole for whole, start, count in axes):
            raise ValueError(f"a block of {key} lies outside of it")
        for other, other_size in blocks[number + 1 :]:
            # Sorted by the first axis, along which most tensors are cut.
            if other and other[0] >= first[0] + size[0]:
                break
            sides = zip(first, size, other, other_size, strict=True)
            if all(a < b + n and b < a + m for a, m, b, n in sides):
                raise ValueError(f"two blocks of {key} overlap")


def _overlap(part: StoredPart, piece: Piece) -> Box | None:
    """Where a stored block and a wanted box meet: offset and size."""
    if len(part.offset) != len(piece.offset):
        return None
    axes = list(zip(part.offset, part.size, piece.offset, piece.target.shape, strict=True))
    first = tuple(max(a, b) for a, _, b, _ in axes)
    last = tuple(min(a + m, b + n) for a, m, b, n in axes)
    size = tuple(stop - start for start, stop in zip(first, last, strict=True))
    return (first, size) if all(count > 0 for count in size) else None


def _window(tensor: Tensor, origin: Sizes, box: Box) -> Tensor:
    """The part of a tensor that a box covers, when its first element lies at ``origin``."""
    for axis, (start, first, count) in enumerate(zip(origin, *box, strict=True)):
        tensor = tensor.narrow(axis, first - start, count)
    return tensor


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
