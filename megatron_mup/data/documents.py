"""Documents: reading them from every kind of input, and their split into training and held-out.

One reader for every format and compression, over ``json_lines``, ``streams`` and ``parquet``. Text
is kept exactly: no newline translation, no normalization, no stripping.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from megatron_mup.data.batches import (
    MAX_DOCUMENT_BYTES,
    BadReason,
    DocumentBatch,
    Rejected,
    explain,
    invalid_utf8,
)
from megatron_mup.data.inputs import InputFile, InputFormat, find_inputs
from megatron_mup.data.json_lines import read_jsonl
from megatron_mup.data.parquet import read_parquet, row_groups
from megatron_mup.data.streams import DamagedInput, cut_stream, open_stream
from megatron_mup.errors import DataError

_UNIT_BYTES = 4 << 20
_PIECE_BYTES = 1 << 20


@dataclass(frozen=True)
class Document:
    """One text, the unit that ends with an end-of-document token."""

    name: str
    """Where it comes from: the file, with the line or row number where it holds many."""

    text: str
    """The text, unchanged; always encodable as UTF-8."""


def check_inputs(paths: Sequence[str | Path]) -> None:
    """Refuse inputs that cannot be read, before any work.

    Args:
        paths: Files, globs and folders, as for ``find_inputs``.

    Raises:
        DataError: There is none, or one is missing, unreadable or not what its suffix says.
    """
    find_inputs(paths)


def read_documents(
    inputs: Sequence[str | Path | InputFile],
    *,
    json_key: str = "text",
    max_document_bytes: int = MAX_DOCUMENT_BYTES,
) -> Iterator[Document]:
    """Yield the documents of the inputs in order, holding a few megabytes at a time.

    Args:
        inputs: Files, globs and folders, or what ``find_inputs`` made of them.
        json_key: The key of the text in each JSON object, or the column of a Parquet file.
        max_document_bytes: The largest document, as stored.

    Yields:
        Each document, empty ones included; blank lines of JSON-lines files are skipped.

    Raises:
        DataError: A document is bad: file, line or row, what is wrong and the cure.
    """
    for item in inputs:
        files = [item] if isinstance(item, InputFile) else find_inputs([item])
        for file in files:
            for first_line, batch in _batches(file, json_key, max_document_bytes):
                yield from _documents(file, first_line, batch, json_key)


def read_text(file: InputFile, *, max_document_bytes: int) -> DocumentBatch:
    """Read a text file, which is one document.

    Args:
        file: A plain or compressed text file, or standard input.
        max_document_bytes: A longer text is rejected; no more of it is held.

    Returns:
        A batch of one line.

    Raises:
        DataError: The file cannot be opened.
    """
    pieces: list[bytes] = []
    size = 0
    try:
        with open_stream(file) as stream:
            while size <= max_document_bytes and (piece := stream.read(_PIECE_BYTES)):
                pieces.append(piece)
                size += len(piece)
    except DamagedInput as error:
        return _rejected_text(BadReason.DAMAGED, error.what)
    text = _text(b"".join(pieces), max_document_bytes)
    if not isinstance(text, str):
        return _rejected_text(*text)
    if not text:
        return DocumentBatch(empty_lines=[0], lines=1)
    return DocumentBatch(texts=[text], positions=[0], line_numbers=[0], lines=1)


def splits_of(
    digests: Sequence[bytes], *, valid_fraction: float, test_fraction: float
) -> NDArray[np.uint8]:
    """Return the split of each document.

    The decision depends on the text alone (its SHA-256 as a fraction of the range), so that it is
    stable over runs, orders and machines, and copies of a document never straddle the splits.

    Args:
        digests: SHA-256 of the documents' UTF-8 texts.
        valid_fraction: Expected share of validation documents, 0 to 1.
        test_fraction: Expected share of test documents, 0 to 1.

    Returns:
        [documents] of 0 for training, 1 for validation, 2 for test.
    """
    # 64 bits: a share is met to 1e-19, far below the spread of any number of documents.
    leading = np.frombuffer(b"".join(digest[:8] for digest in digests), ">u8")
    places = leading.astype(np.float64) / 2**64
    choices = [places < valid_fraction, places < valid_fraction + test_fraction]
    return np.select(choices, [np.uint8(1), np.uint8(2)], np.uint8(0))


def is_held_out(text: str, fraction: float) -> bool:
    """Tell whether a document belongs to the held-out split; see ``splits_of``.

    Args:
        text: The document's text.
        fraction: Expected share of held-out documents, 0 to 1.

    Returns:
        True for a held-out document.
    """
    digest = hashlib.sha256(text.encode("utf-8")).digest()
    return bool(splits_of([digest], valid_fraction=fraction, test_fraction=0.0)[0] == 1)


def check_fraction(fraction: float, option: str) -> None:
    """Refuse a held-out share outside [0, 1).

    Args:
        fraction: The share of documents to hold out.
        option: The command-line option that set it; for the message.

    Raises:
        DataError: ``fraction`` is not in [0, 1).
    """
    if not 0.0 <= fraction < 1.0:
        raise DataError(f"{option} is {fraction}; pass a share of documents from 0 to below 1")


def _batches(
    file: InputFile, json_key: str, max_document_bytes: int
) -> Iterator[tuple[int, DocumentBatch]]:
    """Yield an input's batches, each with the number of the line that its lines count from."""
    if file.format is InputFormat.TEXT:
        yield 0, read_text(file, max_document_bytes=max_document_bytes)
    elif file.format is InputFormat.PARQUET:
        first_row = 0
        for group, rows in enumerate(row_groups(file)):
            for batch in read_parquet(
                file,
                group,
                column=json_key,
                first_row=first_row,
                max_document_bytes=max_document_bytes,
            ):
                yield first_row, batch
            first_row += rows
    else:
        # Cut, so that the lines before the damage of an archive come first.
        for unit in cut_stream(file, unit_bytes=_UNIT_BYTES, max_document_bytes=max_document_bytes):
            for batch in read_jsonl(
                io.BytesIO(unit.data),
                offset=unit.offset,
                stop=None,
                json_key=json_key,
                max_document_bytes=max_document_bytes,
            ):
                yield unit.first_line, batch
            yield unit.first_line, DocumentBatch(rejected=unit.rejected, lines=len(unit.rejected))


def _documents(
    file: InputFile, first_line: int, batch: DocumentBatch, json_key: str
) -> Iterator[Document]:
    """Yield a batch's documents in order; raises DataError at the first bad one."""
    found: dict[int, str | Rejected] = dict(zip(batch.line_numbers, batch.texts, strict=True))
    found |= dict.fromkeys(batch.empty_lines, "")
    found |= {rejected.line: rejected for rejected in batch.rejected}
    for line, item in sorted(found.items()):
        number = first_line + line + 1
        if isinstance(item, Rejected):
            message = explain(
                file.name,
                number,
                item,
                json_key=json_key,
                input_format=file.format,
                can_skip=False,
            )
            raise DataError(message)
        alone = file.format is InputFormat.TEXT
        yield Document(file.name if alone else f"{file.name}:{number}", item)


def _rejected_text(reason: BadReason, detail: str) -> DocumentBatch:
    return DocumentBatch(rejected=[Rejected(0, 0, reason, detail)], lines=1)


def _text(raw: bytes, limit: int) -> str | tuple[BadReason, str]:
    """Decode a text file; otherwise what is wrong with it."""
    if len(raw) > limit:
        return BadReason.TOO_LARGE, f"more than the limit of {limit} bytes"
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        return BadReason.INVALID_UTF8, invalid_utf8(error, 0)
