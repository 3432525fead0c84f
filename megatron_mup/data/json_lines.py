"""JSON lines: one document a line, read in blocks of whole lines.

The hot path of preprocessing: a line costs one call of orjson when it is good. Whatever orjson
refuses is judged by ``json``, which takes what Megatron's preprocessing takes (NaN, long numbers)
and explains what is broken. Memory is bounded whatever the length of a line.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from typing import Any, BinaryIO

import orjson

from megatron_mup.data.batches import (
    BadReason,
    DocumentBatch,
    Rejected,
    invalid_utf8,
    too_large,
)

_BLOCK_BYTES = 1 << 20
_SEEK_BYTES = 64 << 10
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_DETAIL_CHARACTERS = 40


def read_jsonl(
    stream: BinaryIO,
    *,
    offset: int,
    stop: int | None,
    json_key: str,
    max_document_bytes: int,
    batch_bytes: int = _BLOCK_BYTES,
) -> Iterator[DocumentBatch]:
    """Yield the documents of the lines that begin before ``stop``.

    Lines end with a newline alone; a carriage return before it is white space to JSON. Blank lines
    are no documents. A byte order mark at the start of the file is dropped.

    Args:
        stream: Stands at the first byte of a line.
        offset: That byte's offset in the decompressed file.
        stop: Lines that begin at this offset or after it are left; None reads to the end.
        json_key: The key of the text in each JSON object.
        max_document_bytes: Longer lines (without their newline) are rejected, and not held.
        batch_bytes: Bytes of the stream to read at a time.

    Yields:
        Batches; each rejected line is in the batch of its neighbours.
    """
    first_line = 0
    for start, block, length in _blocks(
        stream, offset=offset, stop=stop, limit=max_document_bytes, block_bytes=batch_bytes
    ):
        if block is None:
            detail = too_large(length, max_document_bytes)
            rejected = Rejected(start, first_line, BadReason.TOO_LARGE, detail)
            yield DocumentBatch(rejected=[rejected], lines=1)
            first_line += 1
            continue
        batch = _read_block(block, start, first_line, json_key, max_document_bytes)
        first_line += batch.lines
        yield batch


def seek_line(stream: BinaryIO, offset: int, *, stop: int | None = None) -> int:
    """Stand at the first line that begins at ``offset`` or after it.

    Args:
        stream: A file that can seek.
        offset: Bytes from its start.
        stop: Where to give up: lines that begin there or later are not wanted.

    Returns:
        The offset of that line; one at or after ``stop``, or the file's size, where none begins.
    """
    reached = min(offset, stream.seek(0, os.SEEK_END))
    if reached <= 0:
        return stream.seek(0)
    # A line begins at an offset if the byte before it is a newline.
    position = stream.seek(reached - 1)
    while piece := stream.read(_SEEK_BYTES):
        end = piece.find(b"\n")
        if end >= 0:
            return stream.seek(position + end + 1)
        position += len(piece)
        if stop is not None and position >= stop:
            break
    return position


def _blocks(
    stream: BinaryIO, *, offset: int, stop: int | None, limit: int, block_bytes: int
) -> Iterator[tuple[int, bytes | None, int]]:
    """Yield (offset, whole lines, their bytes), or (offset, None, bytes) for one oversized line."""
    start = offset
    pieces: list[bytes] = []
    held = 0
    oversized = False
    while stop is None or start < stop:
        piece = stream.read(block_bytes)
        if not piece:
            break
        # Of the line that holds the byte before stop, the end; of others the last end.
        if stop is not None and start + held + len(piece) >= stop:
            cut = piece.find(b"\n", max(0, stop - 1 - start - held)) + 1
        else:
            cut = 0
        cut = cut or piece.rfind(b"\n") + 1
        if cut and oversized:
            end = piece.find(b"\n")
            yield start, None, held + end
            start += held + end + 1
            piece, cut, held, oversized = piece[end + 1 :], cut - end - 1, 0, False
        if cut:
            block = b"".join([*pieces, piece[:cut]])
            yield start, block, len(block)
            start += len(block)
            piece, pieces, held = piece[cut:], [], 0
        held += len(piece)
        if not oversized:
            pieces.append(piece)
        if held > limit:
            # From here on the line is only measured.
            pieces, oversized = [], True
    if held and (stop is None or start < stop):
        yield start, None if oversized else b"".join(pieces), held


def _read_block(
    block: bytes, start: int, first_line: int, json_key: str, limit: int
) -> DocumentBatch:
    """Read whole lines that begin at offset ``start``."""
    if start == 0 and block.startswith(_BYTE_ORDER_MARK):
        # White space of the same length keeps the offsets.
        block = b"   " + block[3:]
    lines = block.split(b"\n")
    if not lines[-1]:
        lines.pop()
    batch = DocumentBatch(lines=len(lines))
    # Looked up once: this is the hot loop.
    loads, texts, positions = orjson.loads, batch.texts, batch.positions
    position = start
    for number, raw in enumerate(lines, start=first_line):
        text: Any = None
        if len(raw) <= limit:
            try:
                text = loads(raw)[json_key]
            except (ValueError, LookupError, TypeError):
                text = None
        # orjson refuses lone surrogates and invalid UTF-8, so each of its strings is text.
        if type(text) is not str:
            text = _judge(raw, json_key, limit, position)
        if type(text) is str:
            if text:
                texts.append(text)
                positions.append(position)
                batch.line_numbers.append(number)
            else:
                batch.empty_lines.append(number)
        elif text is not None:
            batch.rejected.append(Rejected(position, number, *text))
        position += len(raw) + 1
    return batch


def _judge(
    raw: bytes, json_key: str, limit: int, position: int
) -> str | tuple[BadReason, str] | None:
    """Judge a line that orjson refused or that holds no text.

    Returns:
        The text, or what is bad, or None for a blank line.
    """
    if len(raw) > limit:
        return BadReason.TOO_LARGE, too_large(len(raw), limit)
    if not raw.strip():
        return None
    try:
        line = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        return BadReason.INVALID_UTF8, invalid_utf8(error, position)
    try:
        record = json.loads(line)
    # Deeply nested brackets exhaust the parser's stack.
    except (ValueError, RecursionError) as error:
        return BadReason.BROKEN_JSON, f"broken JSON ({_short(str(error), 80)})"
    if not isinstance(record, dict):
        return BadReason.BROKEN_JSON, f"expected a JSON object, found {_kind(record)}"
    if json_key not in record:
        found = _short(" ".join(", ".join(record).split())) or "none"
        return BadReason.NO_FIELD, f"no key {json_key!r} (keys: {found})"
    text = record[json_key]
    if not isinstance(text, str):
        return BadReason.NOT_TEXT, f"{json_key!r} is {_kind(text)}, not a string"
    # JSON can escape half of a surrogate pair, which no UTF-8 text can hold.
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return BadReason.NOT_TEXT, f"{json_key!r} holds a lone surrogate escape"
    return text


def _kind(value: object) -> str:
    return "null" if value is None else type(value).__name__


def _short(content: str, characters: int = _DETAIL_CHARACTERS) -> str:
    return content if len(content) <= characters else f"{content[:characters]}..."
