"""Writing one shard from the unit files: ``.bin``, ``.idx`` and ``.json``.

Owns the selection of a shard's documents out of its units, and the writing of the format that
``shards`` describes. Ids and index stream through: memory depends neither on the shard's size nor
on the longest document. Which documents belong to which shard is decided elsewhere
(``shard_plan``), and nothing is published here: a shard is made in the work folder.
"""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from megatron_mup.data.duplicates import read_marks
from megatron_mup.data.manifest import (
    FORMAT_VERSION,
    InputRange,
    ShardEntry,
    ShardManifest,
    manifest_text,
    read_shard_manifest,
)
from megatron_mup.data.publication import publish_text, published
from megatron_mup.data.shards import DTYPE_CODES, INDEX_HEADER, INDEX_MAGIC
from megatron_mup.data.unit_files import Unit, UnitKey, read_unit
from megatron_mup.errors import DataError

UINT16_VOCAB_LIMIT = 65500
"""Vocabularies below it are stored as uint16, others as int32 (Megatron's DType.optimal_dtype)."""

# 8 or 16 MB of ids at a time.
_WINDOW_TOKENS = 1 << 22
_REMAKE = "delete the work folder and run the same command again"


@dataclass(frozen=True, kw_only=True)
class TokenizerFacts:
    """What shards say about the tokenizer that made their ids."""

    sha256: str
    """Hex digest of the tokenizer model file."""

    vocab_size: int
    """Number of ids."""

    eod: int
    """Id of the end-of-document token."""

    append_eod: bool
    """Whether each document ends with ``eod``."""

    @property
    def dtype(self) -> np.dtype[np.integer]:
        """Type of the ids on disk, little-endian on every machine."""
        return np.dtype(token_dtype(self.vocab_size)).newbyteorder("<")


@dataclass(frozen=True, kw_only=True)
class ShardTask:
    """Which documents make a shard: those of one split in a range of rows that are no copies."""

    folder: Path
    """Where the shard is made."""

    name: str
    """The shard's name without .bin or .idx."""

    units: Path
    """Folder of the unit files."""

    keys: tuple[UnitKey, ...]
    """The units that hold the range, in order."""

    split: int
    """Number of the split."""

    first_row: int
    """The range's first row in the first unit."""

    stop_row: int
    """Row in the last unit at which the range ends."""

    first_document: int
    """Number, in the corpus, of the first row of the first unit."""

    documents: int
    """Documents that the shard must have."""

    tokens: int
    """Ids that the shard must have."""

    marks: Path | None
    """Which documents are copies (``duplicates.mark_duplicates``); None keeps copies."""

    inputs: tuple[str, ...]
    """Names of the input files from ``first_input`` on."""

    first_input: int
    """Number of the first of ``inputs``."""

    tokenizer: TokenizerFacts


def token_dtype(vocab_size: int) -> str:
    """Return NumPy's name of the type that Megatron stores ids of such a vocabulary in.

    Args:
        vocab_size: Number of ids.

    Returns:
        "uint16" or "int32".
    """
    return "uint16" if vocab_size < UINT16_VOCAB_LIMIT else "int32"


class IndexWriter:
    """Writes an .idx file for documents of one sequence each, a few documents at a time.

    The bytes are those of megatron-core 0.19.2's IndexedDatasetBuilder.
    """

    def __init__(self, stream: BinaryIO, documents: int, dtype: np.dtype[np.integer]) -> None:
        """Begin the file.

        Args:
            stream: An empty file, open for writing at any place.
            documents: How many documents will come.
            dtype: Type of the ids in the .bin file.
        """
        self._stream, self._token_bytes = stream, dtype.itemsize
        self._added = self._tokens = 0
        self._lengths_at = INDEX_HEADER.size
        self._pointers_at = self._lengths_at + 4 * documents
        self._boundaries_at = self._pointers_at + 8 * documents
        code = next(code for code, name in DTYPE_CODES.items() if name == dtype.name)
        stream.write(INDEX_HEADER.pack(INDEX_MAGIC, 1, code, documents, documents + 1))
        self._write(self._boundaries_at, np.zeros(1, dtype="<i8"))

    def add(self, lengths: NDArray[np.int32]) -> None:
        """Append documents.

        Args:
            lengths: [documents] their lengths in tokens.
        """
        # int64: a sum of int32 lengths overflows at 2^31 tokens.
        ends = np.cumsum(lengths, dtype="<i8") + self._tokens
        numbers = np.arange(self._added + 1, self._added + len(lengths) + 1, dtype="<i8")
        self._write(self._lengths_at + 4 * self._added, lengths.astype("<i4", copy=False))
        self._write(self._pointers_at + 8 * self._added, (ends - lengths) * self._token_bytes)
        self._write(self._boundaries_at + 8 * (self._added + 1), numbers)
        self._added += len(lengths)
        self._tokens = int(ends[-1]) if len(ends) else self._tokens

    def _write(self, offset: int, values: NDArray[np.integer]) -> None:
        self._stream.seek(offset)
        self._stream.write(values.tobytes())


def write_shard(task: ShardTask) -> ShardEntry:
    """Make a shard in the work folder; its .json comes last.

    Args:
        task: What to write, and where.

    Returns:
        The shard's line in the job's manifest.

    Raises:
        DataError: A unit file is damaged or is not the one that the task was planned with, or a
            file cannot be read or written.
    """
    path = task.folder / task.name
    try:
        manifest = _written(task)
        publish_text(Path(f"{path}.json"), manifest_text(manifest))
    except OSError as error:
        raise DataError(
            f"cannot make the shard {error.filename or path}: {error.strerror or error}; free "
            "space or mend the disk and run the same command again: it goes on where it ended"
        ) from error
    return _entry(task.name, manifest)


def finished_shard(task: ShardTask) -> ShardEntry | None:
    """Recognize a shard that an earlier run made.

    Args:
        task: The shard.

    Returns:
        What ``write_shard`` would return; None if the shard must be made.
    """
    path = Path(f"{task.folder / task.name}.json")
    try:
        manifest = read_shard_manifest(path) if path.is_file() else None
        size = Path(f"{task.folder / task.name}.bin").stat().st_size
        Path(f"{task.folder / task.name}.idx").stat()
    except (DataError, OSError):
        return None
    if manifest is None or (manifest.documents, manifest.tokens, manifest.bin_bytes) != (
        task.documents,
        task.tokens,
        size,
    ):
        return None
    return _entry(task.name, manifest)


def _entry(name: str, manifest: ShardManifest) -> ShardEntry:
    return ShardEntry(
        name=name,
        documents=manifest.documents,
        tokens=manifest.tokens,
        text_bytes=manifest.text_bytes,
        bin_bytes=manifest.bin_bytes,
        bin_sha256=manifest.bin_sha256,
        idx_sha256=manifest.idx_sha256,
    )


class _Facts:
    """What a manifest says of the documents, gathered as they go by."""

    def __init__(self, task: ShardTask) -> None:
        self._task = task
        self.digest = hashlib.sha256()
        self.documents = self.tokens = self.text_bytes = self.largest = 0
        self.inputs: list[InputRange] = []
        self._last_file: int | None = None

    def add_documents(self, rows: NDArray[np.void]) -> None:
        """Count documents and where they come from."""
        self.documents += len(rows)
        self.text_bytes += int(rows["text_bytes"].sum())
        edges = [0, *(np.flatnonzero(np.diff(rows["file"])) + 1).tolist(), len(rows)]
        for start, stop in pairwise(edges):
            if start < stop:
                self._add_range(rows[start:stop])

    def add_ids(self, ids: NDArray[np.integer]) -> None:
        """Count ids."""
        self.tokens += len(ids)
        self.largest = max(self.largest, int(ids.max(initial=0)))
        self.digest.update(ids.data)

    def _add_range(self, rows: NDArray[np.void]) -> None:
        number, documents = int(rows["file"][0]), len(rows)
        start, stop = int(rows["position"][0]), int(rows["position"][-1])
        # By number, because a file may be named twice.
        if number == self._last_file:
            before = self.inputs.pop()
            start, documents = before.start, before.documents + documents
        self._last_file = number
        file = self._task.inputs[number - self._task.first_input]
        self.inputs.append(InputRange(file=file, start=start, stop=stop, documents=documents))


def _written(task: ShardTask) -> ShardManifest:
    """Write .bin and .idx, synced, and say what they hold."""
    tokenizer, facts = task.tokenizer, _Facts(task)
    bin_path, idx_path = (Path(f"{task.folder / task.name}{end}") for end in (".bin", ".idx"))
    with published(bin_path) as bin_stream, published(idx_path) as idx_stream:
        _write_documents(task, facts, bin_stream, idx_stream)
        if (facts.documents, facts.tokens) != (task.documents, task.tokens):
            raise DataError(
                f"{task.name}: planned with {task.documents} documents and {task.tokens} tokens, "
                f"found {facts.documents} and {facts.tokens}: the unit files in {task.units} have "
                f"changed; {_REMAKE}"
            )
    with idx_path.open("rb") as stream:
        # Read back, because it was not written from its beginning to its end.
        idx_sha256 = hashlib.file_digest(stream, "sha256").hexdigest()
    return ShardManifest(
        format_version=FORMAT_VERSION,
        documents=facts.documents,
        tokens=facts.tokens,
        text_bytes=facts.text_bytes,
        largest_token_id=facts.largest,
        dtype=tokenizer.dtype.name,
        bin_bytes=facts.tokens * tokenizer.dtype.itemsize,
        bin_sha256=facts.digest.hexdigest(),
        idx_sha256=idx_sha256,
        tokenizer_sha256=tokenizer.sha256,
        vocab_size=tokenizer.vocab_size,
        eod=tokenizer.eod,
        append_eod=tokenizer.append_eod,
        inputs=facts.inputs,
    )


def _write_documents(
    task: ShardTask, facts: _Facts, bin_stream: BinaryIO, idx_stream: BinaryIO
) -> None:
    """Write the shard's documents, and count them."""
    index = IndexWriter(idx_stream, task.documents, task.tokenizer.dtype)
    counted: Future[None] | None = None
    # Hashing takes as long as reading and writing do, and runs beside them.
    with ThreadPoolExecutor(1) as counter:
        for unit, selected in _selections(task):
            rows = unit.rows[selected]
            facts.add_documents(rows)
            index.add(rows["length"])
            for ids in _selected_ids(unit, selected, task.tokenizer.dtype):
                if counted is not None:
                    counted.result()
                counted = counter.submit(facts.add_ids, ids)
                bin_stream.write(ids.data)
    if counted is not None:
        counted.result()


def _selections(task: ShardTask) -> Iterator[tuple[Unit, NDArray[np.bool_]]]:
    """Yield each unit of the range and which of its documents belong to the shard."""
    number = task.first_document
    for key in task.keys:
        unit = read_unit(task.units, key, token_bytes=task.tokenizer.dtype.itemsize)
        selected = unit.rows["split"] == task.split
        if task.marks is not None:
            selected &= ~read_marks(task.marks, number, len(selected))
        number += len(selected)
        # The stop first: a range within one unit is counted from that unit's first row.
        if key == task.keys[-1]:
            selected[task.stop_row :] = False
        if key == task.keys[0]:
            selected[: task.first_row] = False
        if selected.any():
            yield unit, selected


def _selected_ids(
    unit: Unit, selected: NDArray[np.bool_], dtype: np.dtype[np.integer]
) -> Iterator[NDArray[np.integer]]:
    """Yield the ids of the selected documents in pieces of bounded size."""
    ends = np.cumsum(unit.rows["length"], dtype=np.int64)
    begins = ends - unit.rows["length"]
    checksum = 0
    with unit.tokens_path.open("rb") as stream:
        # All of the file, even for its last document: what is written is what was summed up.
        for start in range(0, unit.facts.tokens, _WINDOW_TOKENS):
            end = min(start + _WINDOW_TOKENS, unit.facts.tokens)
            ids = np.fromfile(stream, dtype=dtype, count=end - start)
            checksum = zlib.crc32(ids.data, checksum)
            # The documents that lie in the window, the first and the last perhaps in part.
            window = slice(
                int(np.searchsorted(ends, start, side="right")), int(np.searchsorted(ends, end)) + 1
            )
            if len(ids) != end - start or selected[window].all():
                yield ids
                continue
            lengths = np.minimum(ends[window], end) - np.maximum(begins[window], start)
            yield ids[np.repeat(selected[window], lengths)]
    if checksum != unit.tokens_crc32:
        raise DataError(
            f"{unit.tokens_path}: not the ids that were written; delete it and the .unit file "
            "beside it and run the same command again"
        )
