"""Writing a folder of format torch_dist one block at a time, without process groups.

The blocks of a tensor may be any boxes that together are the whole. Owns the files, their torch
description and, in the background, their checksums; a finished folder is a checkpoint of this
package. The caller decides what is in it and gives the folder its name.
"""

from __future__ import annotations

import contextlib
import io
import json
import pickle
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from torch import Tensor
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from megatron_mup.checkpoint.folders import METADATA, RECORD
from megatron_mup.checkpoint.integrity import FileDigest, digest_files, write_checksums
from megatron_mup.convert.stored_blocks import Sizes, StoredPart
from megatron_mup.convert.stored_tensors import METADATA as TENSORS

FILE_BYTES = 1 << 28
"""A file is closed when it exceeds this, and digested while the next one is written."""

_WORKERS = 2
"""Threads: one waits for the disk while the other digests."""

Inspect = Callable[[Mapping[str, Sequence[StoredPart]]], None]
"""Told which blocks of tensors a file holds, by key, once it is on the disk."""


@dataclass
class _OpenFile:
    """The file that a rank's blocks go to, and the blocks of tensors in it, by key."""

    name: str
    stream: BinaryIO
    parts: dict[str, list[StoredPart]]


class TensorFiles:
    """A torch_dist folder that is being written; use it in a ``with`` block.

    Args:
        folder: an empty folder.
        file_bytes: see ``FILE_BYTES``.
        inspect: called for each file that is finished, in several threads; what it raises,
            ``finish`` raises.
    """

    def __init__(
        self, folder: Path, *, file_bytes: int = FILE_BYTES, inspect: Inspect | None = None
    ) -> None:
        self._folder, self._file_bytes, self._inspect = folder, file_bytes, inspect
        self._tensors: dict[str, TensorStorageMetadata] = {}
        self._objects: dict[str, BytesStorageMetadata] = {}
        self._places: dict[MetadataIndex, _StorageInfo] = {}
        self._open: dict[int, _OpenFile] = {}
        self._numbers: dict[int, int] = {}
        self._digests: list[Future[dict[str, FileDigest]]] = []
        self._digester = ThreadPoolExecutor(_WORKERS, thread_name_prefix="digest")

    def __enter__(self) -> TensorFiles:
        return self

    def __exit__(self, *_error: object) -> None:
        for opened in self._open.values():
            with contextlib.suppress(OSError):
                opened.stream.close()
        self._digester.shutdown(cancel_futures=True)

    def add(self, key: str, shape: Sizes, offset: Sizes, block: Tensor, *, rank: int = 0) -> None:
        """Write one block of a tensor.

        Args:
            key: name of the tensor.
            shape: of the whole tensor.
            offset: of the block in it.
            block: values on the CPU, with as many axes as ``shape``.
            rank: whose file it goes to.

        Raises:
            OSError: the disk is full or broken.
        """
        if key not in self._tensors:
            properties = TensorProperties(dtype=block.dtype)
            self._tensors[key] = TensorStorageMetadata(properties, torch.Size(shape), [])
        place = torch.Size(offset)
        self._tensors[key].chunks.append(ChunkStorageMetadata(place, torch.Size(block.shape)))
        # torch.save would write all of what a view is a part of.
        if block.untyped_storage().nbytes() != block.nbytes or not block.is_contiguous():
            block = block.clone(memory_format=torch.contiguous_format)
        self._write(MetadataIndex(key, place), block, rank)

    def add_object(self, key: str, value: Any, *, rank: int = 0) -> None:
        """Write plain data, as Megatron's sharded objects are stored."""
        content = io.BytesIO()
        torch.save([value], content)
        self.add_bytes(key, content.getvalue(), rank=rank)

    def add_bytes(self, key: str, content: bytes, *, rank: int = 0) -> None:
        """Write an object as another folder stored it."""
        self._objects[key] = BytesStorageMetadata()
        self._write(MetadataIndex(key), content, rank)

    def finish(self, record: Mapping[str, Any]) -> None:
        """Close the files and add what describes them; waits for the checksums.

        Args:
            record: the parameterization record.

        Raises:
            OSError: the disk is full or broken.
            Exception: what ``inspect`` raises.
        """
        for rank in list(self._open):
            self._close(rank)
        entries: dict[str, TensorStorageMetadata | BytesStorageMetadata] = {
            **self._tensors,
            **self._objects,
        }
        metadata = Metadata(entries, storage_data=self._places, storage_meta=StorageMeta())
        (self._folder / TENSORS).write_bytes(pickle.dumps(metadata))
        save_config(CheckpointingConfig("torch_dist", 1), str(self._folder))
        (self._folder / RECORD).write_text(json.dumps(dict(record), indent=1), encoding="utf-8")
        digests = digest_files(self._folder, [TENSORS, METADATA, RECORD])
        for digest in self._digests:
            digests.update(digest.result())
        write_checksums(self._folder, digests)

    def _write(self, index: MetadataIndex, data: Tensor | bytes, rank: int) -> None:
        if rank not in self._open:
            number = self._numbers.get(rank, 0)
            self._numbers[rank] = number + 1
            name = f"__{rank}_{number}.distcp"
            self._open[rank] = _OpenFile(name, (self._folder / name).open("wb"), {})
        opened = self._open[rank]
        first = opened.stream.tell()
        if isinstance(data, Tensor):
            _save(data, opened.stream)
        else:
            opened.stream.write(data)
        length = opened.stream.tell() - first
        self._places[index] = _StorageInfo(opened.name, first, length)
        if index.offset is not None and isinstance(data, Tensor):
            part = StoredPart(opened.name, first, length, tuple(index.offset), tuple(data.shape))
            opened.parts.setdefault(index.fqn, []).append(part)
        if first + length > self._file_bytes:
            self._close(rank)

    def _close(self, rank: int) -> None:
        opened = self._open.pop(rank)
        opened.stream.close()
        self._digests.append(self._digester.submit(self._digest, opened))

    def _digest(self, opened: _OpenFile) -> dict[str, FileDigest]:
        digests = digest_files(self._folder, [opened.name])
        if self._inspect is not None:
            self._inspect(opened.parts)
        return digests


def _save(block: Tensor, stream: BinaryIO) -> None:
    try:
        torch.save(block, stream)
    except RuntimeError as error:
        # torch ends with a complaint of its own about the unfinished file.
        cause: BaseException | None = error
        while cause is not None:
            if isinstance(cause, OSError):
                raise cause from None
            cause = cause.__cause__ or cause.__context__
        raise
