"""Tokenization of units: what a worker process does.

Reads the documents of a unit, encodes them, and publishes the unit's files. A worker imports no
torch, and holds one batch of texts and the ids of one unit.
"""

from __future__ import annotations

import hashlib
import io
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from megatron_mup.data.batches import BadReason, DocumentBatch, Rejected, explain
from megatron_mup.data.documents import read_text, splits_of
from megatron_mup.data.engines import REFERENCE, Engine, audit, build_engine
from megatron_mup.data.inputs import InputFile, unreadable
from megatron_mup.data.json_lines import read_jsonl, seek_line
from megatron_mup.data.parquet import read_parquet
from megatron_mup.data.shard_writer import token_dtype
from megatron_mup.data.streams import StreamUnit
from megatron_mup.data.tokenizer import Tokenizer, tokenizer_from_bytes
from megatron_mup.data.unit_files import (
    DIGEST_BYTES,
    ROW,
    UnitFacts,
    UnitKey,
    UnitWriter,
    unit_writer,
)
from megatron_mup.data.units import BlockTask, LinesTask, RowsTask, Task, TextsTask
from megatron_mup.errors import DataError

KEPT_PLACES = 100
"""Bad documents of a unit that are recorded with their places; all are counted."""

_COUNT_BYTES = 1 << 22

# What is hashed of a text where only the audit chooses by it: ends differ more than beginnings.
_END_BYTES = 256


@dataclass(frozen=True, kw_only=True)
class WorkSettings:
    """What a worker must know besides its task."""

    units_folder: Path
    """Where unit files are published."""

    model: bytes = field(repr=False)
    """The tokenizer model file's bytes."""

    eod_token: str
    """The piece that ends a document."""

    engine: str
    """The engine that encodes."""

    engine_model: bytes | None = field(default=None, repr=False)
    """The model as the engine reads it (``engines.engine_model``); None if it reads ``model``."""

    json_key: str
    """Key of the text in JSON lines, column of a Parquet file."""

    append_eod: bool
    """Whether each document ends with ``eod``."""

    valid_fraction: float
    """Share of documents of the split "valid"."""

    test_fraction: float
    """Share of documents of the split "test"."""

    max_document_bytes: int
    """Larger documents are bad ones."""

    skip_bad: bool
    """Leave bad documents out, instead of stopping at the first."""

    token_bytes: int
    """Bytes of an id in the shards."""

    deduplicate: bool
    """Whether copies of documents are to be recognized."""

    @property
    def needs_digests(self) -> bool:
        """Whether the split or copies are decided by the SHA-256 of whole texts."""
        return self.deduplicate or self.valid_fraction > 0 or self.test_fraction > 0


@dataclass(frozen=True, kw_only=True)
class UnitOutcome:
    """What became of a unit."""

    key: UnitKey
    documents: int = 0
    tokens: int = 0
    text_bytes: int = 0

    mismatch: str | None = None
    """Where the engine's ids differ from the reference's; the unit was not written then."""


class UnitTokenizer:
    """Tokenizes units, one after the other."""

    def __init__(self, settings: WorkSettings, tokenizer: Tokenizer) -> None:
        self._settings = settings
        self._tokenizer = tokenizer
        self._engine: Engine = build_engine(tokenizer, settings.engine, settings.engine_model)
        self._dtype = np.dtype(token_dtype(tokenizer.vocab_size)).newbyteorder("<")

    def run(self, task: Task) -> UnitOutcome:
        """Tokenize a unit and publish it.

        Raises:
            DataError: A bad document that must not be skipped, or an input that cannot be read.
        """
        with unit_writer(self._settings.units_folder, task.key) as writer:
            return self._run(task, writer)

    def _run(self, task: Task, writer: UnitWriter) -> UnitOutcome:
        rows: list[NDArray[np.void]] = []
        tokens = 0
        counts = _Counts(task, self._settings)
        for number, batch in read_batches(task, self._settings):
            counts.add(number, batch)
            if not batch.texts:
                continue
            encoded = self._engine.encode_flat(batch.texts)
            # Afterwards: an engine leaves the UTF-8 that it asked for in the texts.
            digests, text_bytes = _hashed(batch.texts, whole=self._settings.needs_digests)
            wrong = None
            if self._engine.name != REFERENCE:
                wrong = audit(self._tokenizer, batch.texts, encoded, digests)
            if wrong is not None:
                place = f"{_file(task, number).name}, document at {batch.positions[wrong]}"
                return UnitOutcome(key=task.key, mismatch=place)
            ids, lengths = self._ended(encoded.ids, encoded.lengths)
            writer.add(ids)
            tokens += len(ids)
            rows.append(self._rows(number, batch, lengths, digests, text_bytes))
        all_rows = np.concatenate(rows) if rows else np.empty(0, ROW)
        writer.finish(counts.facts(task, engine=self._engine.name, tokens=tokens), all_rows)
        return UnitOutcome(
            key=task.key,
            documents=len(all_rows),
            tokens=tokens,
            text_bytes=int(all_rows["text_bytes"].sum()),
        )

    def _ended(
        self, ids: NDArray[np.integer], lengths: NDArray[np.int64]
    ) -> tuple[NDArray[np.integer], NDArray[np.int64]]:
        """Bring ids to the shards' type and end each document with eod where asked."""
        narrow = ids.astype(self._dtype)
        if not self._settings.append_eod:
            return narrow, lengths
        return np.insert(narrow, np.cumsum(lengths), self._tokenizer.eod), lengths + 1

    def _rows(
        self,
        number: int,
        batch: DocumentBatch,
        lengths: NDArray[np.int64],
        digests: list[bytes],
        text_bytes: list[int],
    ) -> NDArray[np.void]:
        settings = self._settings
        rows = np.empty(len(batch.texts), ROW)
        rows["length"] = lengths
        rows["file"] = number
        rows["position"] = batch.positions
        rows["text_bytes"] = text_bytes
        rows["split"] = splits_of(
            digests, valid_fraction=settings.valid_fraction, test_fraction=settings.test_fraction
        )
        kept = b"".join(digest[:DIGEST_BYTES] for digest in digests)
        rows["digest"] = np.frombuffer(kept, ROW["digest"])
        return rows


class _Counts:
    """Lines, empty and bad documents of a unit; stops at a bad one unless they are skipped."""

    def __init__(self, task: Task, settings: WorkSettings) -> None:
        self._task, self._settings = task, settings
        self._lines = self._empty = 0
        self._rejected: Counter[str] = Counter()
        self._places: list[list[object]] = []

    def add(self, number: int, batch: DocumentBatch) -> None:
        """Count a batch of the file with this number.

        Raises:
            DataError: It holds a bad document, and these are not skipped.
        """
        for bad in batch.rejected:
            if not self._settings.skip_bad:
                file = _file(self._task, number)
                raise DataError(
                    explain(
                        file.name,
                        _lines_before(self._task) + bad.line + 1,
                        bad,
                        json_key=self._settings.json_key,
                        input_format=file.format,
                    )
                )
            self._rejected[str(bad.reason)] += 1
            # The line within the unit: the lines before it are known only when all units are.
            if len(self._places) < KEPT_PLACES:
                self._places.append([number, bad.position, bad.line, str(bad.reason), bad.detail])
        self._lines += batch.lines
        self._empty += batch.empty

    def facts(self, task: Task, *, engine: str, tokens: int) -> UnitFacts:
        """What is to be known of the unit."""
        return UnitFacts(
            engine=engine,
            tokens=tokens,
            lines=self._lines,
            empty_documents=self._empty,
            rejected=dict(self._rejected),
            rejected_places=self._places,
            last=task.unit.last if isinstance(task, BlockTask) else True,
            raw_sha256=task.raw_sha256 if isinstance(task, BlockTask) else None,
        )


def _hashed(texts: list[str], *, whole: bool) -> tuple[list[bytes], list[int]]:
    """Return the SHA-256 digests of the texts (or only of their ends) and their UTF-8 bytes."""
    raw = [text.encode("utf-8") for text in texts]
    hashed = raw if whole else [part[-_END_BYTES:] for part in raw]
    return [hashlib.sha256(part).digest() for part in hashed], [len(part) for part in raw]


def _file(task: Task, number: int) -> InputFile:
    return task.files[number - task.key.source] if isinstance(task, TextsTask) else task.file


def _lines_before(task: Task) -> int:
    """Lines (rows) of the file before the unit; only asked for a message."""
    if isinstance(task, BlockTask):
        return task.unit.first_line
    if isinstance(task, RowsTask):
        return task.first_row
    if isinstance(task, TextsTask):
        return 0
    lines = 0
    with task.file.path.open("rb") as stream:
        start = seek_line(stream, task.start)
        stream.seek(0)
        while start:
            piece = stream.read(min(start, _COUNT_BYTES))
            lines += piece.count(b"\n")
            start -= len(piece)
    return lines


def read_batches(task: Task, settings: WorkSettings) -> Iterator[tuple[int, DocumentBatch]]:
    """Read a unit.

    Args:
        task: The unit.
        settings: Of these, the key of the text and the largest document.

    Yields:
        The number of the input file, and documents of it.

    Raises:
        DataError: A file cannot be read, or has changed.
    """
    limit, first = settings.max_document_bytes, task.key.source
    if isinstance(task, TextsTask):
        for number, file in enumerate(task.files, start=first):
            yield number, read_text(file, max_document_bytes=limit)
        return
    if isinstance(task, RowsTask):
        yield from ((first, batch) for batch in _row_batches(task, settings))
        return
    if isinstance(task, BlockTask):
        yield from ((first, batch) for batch in _block_batches(task.unit, settings))
        return
    yield from _range_batches(task, settings)


def _row_batches(task: RowsTask, settings: WorkSettings) -> Iterator[DocumentBatch]:
    if task.damage is not None:
        yield DocumentBatch(rejected=[Rejected(0, 0, BadReason.DAMAGED, task.damage)], lines=1)
        return
    yield from read_parquet(
        task.file,
        task.group,
        column=settings.json_key,
        first_row=task.first_row,
        max_document_bytes=settings.max_document_bytes,
    )


def _block_batches(unit: StreamUnit, settings: WorkSettings) -> Iterator[DocumentBatch]:
    yield from read_jsonl(
        io.BytesIO(unit.data),
        offset=unit.offset,
        stop=None,
        json_key=settings.json_key,
        max_document_bytes=settings.max_document_bytes,
    )
    yield DocumentBatch(rejected=unit.rejected, lines=len(unit.rejected))


def _range_batches(task: LinesTask, settings: WorkSettings) -> Iterator[tuple[int, DocumentBatch]]:
    try:
        with task.file.path.open("rb") as stream:
            if os.fstat(stream.fileno()).st_size != task.file.size_bytes:
                raise DataError(
                    f"{task.file.name} has changed while it was read; run the command again, with "
                    "--overwrite, when nothing writes to it"
                )
            offset = seek_line(stream, task.start, stop=task.stop)
            for batch in read_jsonl(
                stream,
                offset=offset,
                stop=task.stop,
                json_key=settings.json_key,
                max_document_bytes=settings.max_document_bytes,
            ):
                yield task.key.source, batch
    except OSError as error:
        raise unreadable(task.file.name, error) from error


# Set once in each worker process, so that the model travels once and not with every unit.
_worker: UnitTokenizer | None = None


def start_worker(settings: WorkSettings) -> None:
    """Prepare a worker process."""
    global _worker
    tokenizer = tokenizer_from_bytes(settings.model, eod_token=settings.eod_token)
    _worker = UnitTokenizer(settings, tokenizer)


def run_in_worker(task: Task) -> UnitOutcome:
    """``UnitTokenizer.run`` in a worker process."""
    if _worker is None:
        raise RuntimeError("the worker process was started without its settings")
    return _worker.run(task)
