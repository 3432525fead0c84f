"""What a reader hands on: documents in batches, and the bad ones with where and why.

Shared by the readers of every format. It reads nothing itself and never holds a document's content
in a message beyond a few characters.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum

from megatron_mup.data.inputs import InputFormat

MAX_DOCUMENT_BYTES = 16 << 20
"""Default of --max-document-bytes: the largest JSON line (without its newline), text file or
Parquet value, in decompressed bytes. Assumption: above any book (the Bible has 4.5 MB), below what
a worker's memory must hold."""


class BadReason(StrEnum):
    """Why a document cannot be read."""

    INVALID_UTF8 = "invalid_utf8"
    BROKEN_JSON = "broken_json"
    """Not JSON, or JSON but no object."""

    NO_FIELD = "no_field"
    NOT_TEXT = "not_text"
    """The field holds another type or null, or half of a surrogate pair."""

    TOO_LARGE = "too_large"
    DAMAGED = "damaged"
    """The file is cut short or corrupt from here on."""


@dataclass(frozen=True)
class Rejected:
    """A bad document."""

    position: int
    """Where it begins; see ``DocumentBatch.positions``."""

    line: int
    """Number of its line or row within what was read in one call, from 0."""

    reason: BadReason
    detail: str
    """What was found, in one short line."""


@dataclass(frozen=True, kw_only=True)
class DocumentBatch:
    """Documents that were read together, in order."""

    texts: list[str] = field(default_factory=list)
    """The documents with text; always encodable as UTF-8."""

    positions: list[int] = field(default_factory=list)
    """Where each text begins: the byte offset of its line in the decompressed file, its row in a
    Parquet file, 0 for a text file."""

    line_numbers: list[int] = field(default_factory=list)
    """Each text's line or row within what was read in one call, from 0."""

    empty_lines: list[int] = field(default_factory=list)
    """The same of the documents without text."""

    rejected: list[Rejected] = field(default_factory=list)
    """The bad documents."""

    lines: int
    """Lines (blank ones included) or rows that were read; 1 for a text file."""

    @property
    def empty(self) -> int:
        """Number of documents without text."""
        return len(self.empty_lines)


def too_large(size_bytes: int, limit_bytes: int) -> str:
    """Return the detail of a document above the size limit.

    Args:
        size_bytes: Its size.
        limit_bytes: The limit.

    Returns:
        One line for ``Rejected.detail``.
    """
    return f"{size_bytes} bytes, more than the limit of {limit_bytes}"


def invalid_utf8(error: UnicodeDecodeError, offset: int) -> str:
    """Return the detail of a document that is not UTF-8.

    Args:
        error: What the decoder said.
        offset: Position of the decoded bytes.

    Returns:
        One line for ``Rejected.detail``.
    """
    byte = error.object[error.start]
    return f"invalid UTF-8 at byte offset {offset + error.start} (byte 0x{byte:02x})"


def explain(
    file_name: str,
    line: int,
    rejected: Rejected,
    *,
    json_key: str,
    input_format: InputFormat = InputFormat.JSONL,
    can_skip: bool = True,
) -> str:
    """Return the message for the user about a bad document.

    Args:
        file_name: The file as the user named it.
        line: Number of the line or row in that file, counted from 1.
        rejected: What is wrong.
        json_key: The key or column that was asked for.
        input_format: What the file holds.
        can_skip: Whether the command has --on-error skip, which the cure then names.

    Returns:
        File, line or row, place, reason and cure.
    """
    place = file_name if input_format is InputFormat.TEXT else f"{file_name}:{line}"
    message = f"{place}: {rejected.detail}; {_cure(rejected, json_key, input_format)}"
    if can_skip:
        message += "; --on-error skip leaves such documents out and counts them"
    # Of UTF-8 the detail names the very byte; a row's number is its position.
    if input_format is InputFormat.JSONL and rejected.reason is not BadReason.INVALID_UTF8:
        message += f" (the line begins at byte offset {rejected.position})"
    return message


def _cure(rejected: Rejected, json_key: str, input_format: InputFormat) -> str:
    column = input_format is InputFormat.PARQUET
    cures = {
        BadReason.INVALID_UTF8: "convert the file to UTF-8, e.g. with iconv",
        BadReason.BROKEN_JSON: f'each line must be one JSON object like {{"{json_key}": "..."}}',
        BadReason.NO_FIELD: "pass --json-key",
        BadReason.NOT_TEXT: f"mend the {'row' if column else 'line'}, or pass another --json-key",
        BadReason.TOO_LARGE: "raise --max-document-bytes or split the document",
        BadReason.DAMAGED: "copy or make the file again",
    }
    return cures[rejected.reason]
