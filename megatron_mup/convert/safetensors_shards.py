"""The safetensors file format, written and read one tensor at a time.

A file is the length of its header (8 bytes), the header (JSON: name -> dtype, shape, begin and end
of the data), and the data, all little-endian and without holes. The library's own writer wants the
tensors of a whole file in memory at once; here only one is. Knows nothing of models.
"""

from __future__ import annotations

import json
import math
import os
import zlib
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_mup.data.publication import sync_stream
from megatron_mup.errors import CheckpointError

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
"""Names of dtypes in the header."""

_ALIGNMENT = 8
_CHUNK = 4 * 2**20
"""Elements that are cast at a time: they stay in the processor's cache."""

_WRITEBACK_BYTES = 64 * 2**20
_LARGEST_HEADER = 100_000_000
"""Bytes; the library refuses longer ones."""


@dataclass(frozen=True)
class Entry:
    """A tensor to write: its name and shape."""

    name: str
    shape: tuple[int, ...]

    @property
    def elements(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


def plan_shards(
    entries: Sequence[Entry], *, itemsize: int, max_shard_bytes: int
) -> dict[str, list[Entry]]:
    """Divide tensors among files, in their order.

    Args:
        entries: what is to be written.
        itemsize: bytes an element.
        max_shard_bytes: data bytes of a file; a tensor larger than this has a file of its own.

    Returns:
        Entries by file name: ``model.safetensors``, or ``model-00001-of-00002.safetensors`` ...
    """
    shards: list[list[Entry]] = []
    room = 0
    for entry in entries:
        size = entry.elements * itemsize
        if not shards or size > room:
            shards.append([])
            room = max_shard_bytes
        shards[-1].append(entry)
        room -= size
    if len(shards) == 1:
        return {SINGLE_FILE: shards[0]}
    return {
        f"model-{number:05}-of-{len(shards):05}.safetensors": shard
        for number, shard in enumerate(shards, start=1)
    }


def index(shards: dict[str, list[Entry]], *, itemsize: int) -> dict[str, Any]:
    """The contents of ``model.safetensors.index.json``."""
    elements = sum(entry.elements for shard in shards.values() for entry in shard)
    return {
        "metadata": {"total_parameters": elements, "total_size": elements * itemsize},
        "weight_map": {entry.name: name for name, shard in shards.items() for entry in shard},
    }


def write_file(
    path: Path, entries: Sequence[Entry], dtype: torch.dtype, read: Callable[[str], Tensor]
) -> dict[str, int]:
    """Write one file and wait until the disk has it.

    Args:
        path: a new file.
        entries: its tensors.
        dtype: of all of them.
        read: returns a tensor by name, of the entry's shape, contiguous, on the CPU, cast here;
            called in order and in a thread of its own, for one tensor while the one before is
            written; nothing else that it returned is kept.

    Returns:
        CRC-32 of each tensor's bytes, by name.
    """
    sums = {}
    header = _header(entries, dtype)
    staging = torch.empty(_CHUNK, dtype=dtype)
    with path.open("wb", buffering=0) as stream, _Writeback(stream) as writeback:
        _write(stream, memoryview(header))
        for entry, values in _read_ahead(entries, read):
            if values.shape != entry.shape:
                raise ValueError(f"{entry.name} is {tuple(values.shape)}, not {entry.shape}")
            # Chunk by chunk: a cast of the whole would cost as much time as the disk.
            total = 0
            for chunk in torch.split(values.view(-1), _CHUNK):
                cast = staging[: len(chunk)].copy_(chunk)
                content = memoryview(cast.view(torch.uint8).numpy())
                total = zlib.crc32(content, total)
                _write(stream, content)
                writeback.start(cast.nbytes)
            sums[entry.name] = total
            # The next one but one is read as soon as this loop asks for the next.
            del values, chunk
        writeback.wait()
        sync_stream(stream)
    return sums


def _read_ahead(
    entries: Sequence[Entry], read: Callable[[str], Tensor]
) -> Iterator[tuple[Entry, Tensor]]:
    """Each entry with its tensor, while the next tensor is already being read."""
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="read") as pool:
        coming: deque[Future[Tensor]] = deque()
        for number, entry in enumerate(entries):
            if not coming:
                coming.append(pool.submit(read, entry.name))
            # A future keeps its tensor, so none may outlive this line.
            values = [coming.popleft().result()]
            if number + 1 < len(entries):
                coming.append(pool.submit(read, entries[number + 1].name))
            yield entry, values.pop()


def _header(entries: Sequence[Entry], dtype: torch.dtype) -> bytes:
    code = {kind: name for name, kind in DTYPES.items()}[dtype]
    # transformers refuses files that do not say which library's tensors they hold.
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    for entry in entries:
        end = position + entry.elements * dtype.itemsize
        header[entry.name] = {
            "dtype": code,
            "shape": list(entry.shape),
            "data_offsets": [position, end],
        }
        position = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    return len(text).to_bytes(8, "little") + text


def _write(stream: Any, rest: memoryview) -> None:
    # A call may write a part: the disk is nearly full, or there are more than 2 GiB.
    while rest:
        rest = rest[stream.write(rest) :]


class _Writeback:
    """Lets the disk work while the next tensors are read.

    The system alone begins with a tenth of the memory dirty, so that without this the whole time of
    the disk comes after that of the processor.
    """

    def __init__(self, stream: Any) -> None:
        self._descriptor = stream.fileno()
        self._pool = ThreadPoolExecutor(max_workers=1)
        self._running: Future[None] | None = None
        self._pending_bytes = 0

    def __enter__(self) -> _Writeback:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown()

    def start(self, written_bytes: int) -> None:
        """Write back what has been written, unless that is going on already."""
        self._pending_bytes += written_bytes
        if self._pending_bytes < _WRITEBACK_BYTES:
            return
        if self._running is None or self._running.done():
            self.wait()
            self._running = self._pool.submit(os.fdatasync, self._descriptor)
            self._pending_bytes = 0

    def wait(self) -> None:
        """Wait for the disk, and raise its error."""
        if self._running is not None:
            self._running.result()


@dataclass(frozen=True)
class FileTensor:
    """Where a tensor lies in a file, and what its header says of it."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


class SafetensorsFile:
    """A file's header, checked; reads its tensors one at a time.

    Args:
        path: the file.

    Raises:
        CheckpointError: it is missing, cut, or no safetensors file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            size = path.stat().st_size
            with path.open("rb") as stream:
                length = int.from_bytes(stream.read(8), "little")
                if length > min(size - 8, _LARGEST_HEADER):
                    raise ValueError("its header is cut or is none")
                header = json.loads(stream.read(length))
            header.pop("__metadata__", None)
            self.tensors = {name: _stored(name, fields) for name, fields in header.items()}
        except OSError as error:
            raise CheckpointError(f"cannot read {path}: {error.strerror or error}") from error
        # What a damaged header makes of JSON, of a dict's methods and of our own checks.
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise CheckpointError(
                f"{path} is damaged or no safetensors file: {error}; fetch or export it again"
            ) from error
        self._data = 8 + length
        self._check_extent(size)

    def _check_extent(self, size: int) -> None:
        position = 0
        # The end too: a tensor without elements lies where the next one begins.
        places = sorted(self.tensors.items(), key=lambda item: (item[1].begin, item[1].end))
        for name, tensor in places:
            if tensor.begin != position:
                raise CheckpointError(f"{self.path} is damaged: {name} is not where it should be")
            position = tensor.end
            if self._data + position > size:
                raise CheckpointError(
                    f"{self.path} is cut: tensor {name} ends at byte {self._data + position} of "
                    f"{size}; fetch or export it again"
                )
        surplus = size - self._data - position
        if surplus:
            raise CheckpointError(
                f"{self.path} is damaged: {surplus} bytes follow its last tensor; fetch or export "
                "it again"
            )

    def read(self, name: str) -> Tensor:
        """Read a tensor, in its own dtype.

        Args:
            name: one of ``tensors``.

        Raises:
            CheckpointError: its dtype is none of ``DTYPES``, or the file cannot be read.
        """
        stored = self.tensors[name]
        if stored.dtype not in DTYPES:
            raise CheckpointError(
                f"{self.path}: tensor {name} is {stored.dtype}; supported: {', '.join(DTYPES)} "
                "(save quantized weights dequantized first)"
            )
        values = torch.empty(stored.shape, dtype=DTYPES[stored.dtype])
        try:
            with self.path.open("rb", buffering=0) as stream:
                stream.seek(self._data + stored.begin)
                _read_into(stream, values)
        except OSError as error:
            raise CheckpointError(
                f"cannot read tensor {name} of {self.path}: {error.strerror or error}"
            ) from error
        return values

    def checksum(self, name: str) -> int:
        """CRC-32 of a tensor's bytes, as ``write_file`` returns it; errors as ``read``."""
        values = self.read(name)
        return zlib.crc32(memoryview(values.view(-1).view(torch.uint8).numpy()))


def _stored(name: str, fields: Any) -> FileTensor:
    begin, end = fields["data_offsets"]
    shape = tuple(fields["shape"])
    if not all(type(size) is int and size >= 0 for size in (begin, end, *shape)) or end < begin:
        raise ValueError(f"sizes and offsets of {name} must be numbers")
    kind = str(fields["dtype"])
    # Before anybody asks for memory of that shape. Dtypes that are not read have no size here.
    if kind in DTYPES and math.prod(shape) * DTYPES[kind].itemsize != end - begin:
        raise ValueError(f"{name}: {end - begin} bytes are no {kind} of shape {list(shape)}")
    return FileTensor(kind, shape, begin, end)


def _read_into(stream: Any, values: Tensor) -> None:
    rest = memoryview(values.view(-1).view(torch.uint8).numpy())
    while rest:
        count = stream.readinto(rest)
        if not count:
            raise OSError("the file ends inside it")
        rest = rest[count:]
