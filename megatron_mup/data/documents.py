"""Reading documents: plain text (one document a file) and JSON lines, one document at a time.

Owns what a document is, the checks on the input files, and the split into training and held-out
documents. Text is kept exactly: no newline translation, no normalization, no stripping.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_mup.errors import DataError

JSON_LINES_SUFFIXES = (".jsonl", ".json", ".ndjson")
"""Files with these suffixes hold one JSON object a line; every other file is one document."""


@dataclass(frozen=True)
class Document:
    """One text, the unit that ends with an end-of-document token."""

    name: str
    """Where it comes from: the file, with the line number for JSON lines."""

    text: str
    """The text, unchanged; always encodable as UTF-8."""


def check_inputs(paths: Sequence[Path]) -> None:
    """Refuse input files that cannot be read, before any work.

    Args:
        paths: The input files.

    Raises:
        DataError: There is none, or one is missing, a folder, or unreadable.
    """
    if not paths:
        raise DataError("no input file; pass --input FILE, once for each file")
    for path in paths:
        if path.is_dir():
            raise DataError(f"input {path} is a folder; pass the files in it to --input")
        try:
            # Opened rather than asked for its mode: root, network disks and containers differ.
            with path.open("rb"):
                pass
        except OSError as error:
            raise DataError(
                f"cannot read input {path}: {error.strerror or error}; correct --input"
            ) from error


def read_documents(paths: Sequence[Path], *, json_key: str = "text") -> Iterator[Document]:
    """Yield the documents of the files in order, holding one at a time.

    Args:
        paths: Text files, and JSON-lines files (by suffix: .jsonl, .json, .ndjson).
        json_key: The key of the text in each JSON object.

    Yields:
        Each document, empty ones included; blank lines of JSON-lines files are skipped.

    Raises:
        DataError: Invalid UTF-8 (file and byte offset), broken JSON or a line without the key
            (file and line).
    """
    for path in paths:
        if path.suffix.lower() in JSON_LINES_SUFFIXES:
            yield from _read_json_lines(path, json_key)
        else:
            # Bytes, because text mode would translate line ends.
            yield Document(str(path), _decode(path.read_bytes(), path, 0))


def is_held_out(text: str, fraction: float) -> bool:
    """Tell whether a document belongs to the held-out split.

    The decision depends on the text alone (SHA-256 as a fraction of its range), so that it is
    stable over runs, orders and machines, and copies of a document never straddle the split.

    Args:
        text: The document's text.
        fraction: Expected share of held-out documents, 0 to 1.

    Returns:
        True for a held-out document.
    """
    digest = hashlib.sha256(text.encode("utf-8")).digest()
    # 64 bits: a share is met to 1e-19, far below the spread of any number of documents.
    return int.from_bytes(digest[:8], "big") / 2**64 < fraction


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


def _decode(raw: bytes, path: Path, offset: int) -> str:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        where = offset + error.start
        raise DataError(
            f"{path}: invalid UTF-8 at byte offset {where} (byte 0x{raw[error.start]:02x}); "
            "convert the file to UTF-8, e.g. with iconv"
        ) from error


def _read_json_lines(path: Path, json_key: str) -> Iterator[Document]:
    # Bytes before the line, so that a message names the place in the file.
    offset = 0
    with path.open("rb") as stream:
        for number, raw in enumerate(stream, start=1):
            line = _decode(raw, path, offset)
            offset += len(raw)
            if line.strip():
                yield Document(f"{path}:{number}", _text_of(line, f"{path}:{number}", json_key))


def _text_of(line: str, where: str, json_key: str) -> str:
    """Return the text in one JSON line; ``where`` is FILE:LINE for messages."""
    try:
        record = json.loads(line)
    # Deeply nested brackets exhaust the parser's stack.
    except (ValueError, RecursionError) as error:
        raise DataError(
            f"{where}: broken JSON ({error}); each line must be one JSON object"
        ) from error
    if not isinstance(record, dict):
        raise DataError(
            f"{where}: expected a JSON object, found {type(record).__name__}; "
            'each line must look like {"text": "..."}'
        )
    if json_key not in record:
        found = ", ".join(sorted(record)) or "none"
        raise DataError(f"{where}: no key {json_key!r} (keys: {found}); pass --json-key")
    text = record[json_key]
    if not isinstance(text, str):
        raise DataError(
            f"{where}: {json_key!r} is {type(text).__name__}, not a string; pass another --json-key"
        )
    # JSON can escape half of a surrogate pair, which no UTF-8 text can hold.
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise DataError(f"{where}: {json_key!r} holds a lone surrogate escape; mend the JSON line")
    return text
