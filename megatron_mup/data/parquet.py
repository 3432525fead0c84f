"""Parquet files: one document a row, read a few rows at a time.

pyarrow is imported inside the functions: processes that read no Parquet file need not load it.
Nested columns are not read.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from megatron_mup.data.batches import (
    BadReason,
    DocumentBatch,
    Rejected,
    invalid_utf8,
    too_large,
)
from megatron_mup.data.inputs import InputFile, unreadable
from megatron_mup.data.streams import DamagedInput
from megatron_mup.errors import DataError

BATCH_ROWS = 256
"""Most rows to decode at a time; fewer where rows are large."""

_BATCH_BYTES = 4 << 20
_BUFFER_BYTES = 1 << 20


def row_groups(file: InputFile) -> list[int]:
    """Return the number of rows of each row group.

    Args:
        file: A Parquet file.

    Returns:
        The rows, in the order of the groups.

    Raises:
        DamagedInput: Its end, which says where everything is, cannot be read.
        DataError: The file cannot be opened.
    """
    with _opened(file, 0) as opened:
        metadata = opened.metadata
        return [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]


def check_column(file: InputFile, *, column: str) -> None:
    """Refuse a Parquet file without such a column of text.

    Args:
        file: A Parquet file.
        column: The column's name.

    Raises:
        DamagedInput: The file is cut short or corrupt.
        DataError: There is no such column, or it holds something else than strings or bytes.
    """
    with _opened(file, 0) as opened:
        _check_schema(opened.schema_arrow, file, column)


def read_parquet(
    file: InputFile,
    group: int,
    *,
    column: str,
    first_row: int,
    max_document_bytes: int,
    batch_rows: int = BATCH_ROWS,
) -> Iterator[DocumentBatch]:
    """Yield the documents of a row group.

    Args:
        file: A Parquet file.
        group: Number of the row group.
        column: The column of the text: strings, or bytes that are UTF-8.
        first_row: Number of the group's first row in the file.
        max_document_bytes: Longer values are rejected.
        batch_rows: Most rows to decode at a time.

    Yields:
        Batches; the rows behind corrupt data are one document rejected as damaged.

    Raises:
        DataError: The column is missing or holds no text, or the file cannot be opened at all.
    """
    done = rows = 0
    try:
        with _opened(file, first_row) as opened:
            _check_schema(opened.schema_arrow, file, column)
            rows = opened.metadata.row_group(group).num_rows
            for values in _values(opened, group, column, batch_rows):
                yield _batch(values, first_row, done, column, max_document_bytes)
                done += len(values)
            if done != rows:
                raise ValueError(f"row group {group} holds {done} rows, its facts say {rows}")
    except DamagedInput as error:
        if rows == 0:  # The file as a whole cannot be read.
            raise
        bad = Rejected(first_row + done, done, BadReason.DAMAGED, error.what)
        yield DocumentBatch(rejected=[bad], lines=max(0, rows - done))


@contextlib.contextmanager
def _opened(file: InputFile, row: int) -> Iterator[Any]:
    """Open a file; whatever pyarrow says of its contents while it is open is damage."""
    import pyarrow
    import pyarrow.parquet

    try:
        stream = file.path.open("rb")
    except OSError as error:
        raise unreadable(file.name, error) from error
    with stream:
        try:
            # In pieces and without reading ahead, so that memory does not grow with the group.
            with pyarrow.parquet.ParquetFile(
                stream,
                buffer_size=_BUFFER_BYTES,
                pre_buffer=False,
                page_checksum_verification=True,
            ) as opened:
                yield opened
        # Corrupt lengths ask for more memory than there is; corrupt names are no UTF-8.
        except (pyarrow.ArrowException, OSError, MemoryError, ValueError) as error:
            what = f"damaged Parquet ({_one_line(error)})"
            raise DamagedInput(file, row, what) from error


def _values(opened: Any, group: int, column: str, batch_rows: int) -> Iterator[list[bytes | None]]:
    """Yield the column's values as bytes, some rows at a time."""
    import pyarrow

    facts = opened.metadata.row_group(group)
    index = opened.schema_arrow.get_field_index(column)
    # Of all columns: corrupt facts of a single column make pyarrow 26 end the process.
    mean = facts.total_byte_size // max(1, facts.num_rows)
    rows = max(1, min(batch_rows, _BATCH_BYTES // max(1, mean)))
    kind = opened.schema_arrow.field(index).type
    for batch in opened.iter_batches(
        batch_size=rows, row_groups=[group], columns=[column], use_threads=False
    ):
        values = batch.column(0)
        if pyarrow.types.is_dictionary(kind):
            values = values.dictionary_decode()
        # As bytes: pyarrow does not check that strings are UTF-8.
        yield values.cast(_binary_type(values.type)).to_pylist()


def _binary_type(kind: Any) -> Any:
    """The type of the same layout whose values are bytes."""
    import pyarrow

    types = pyarrow.types
    if types.is_string_view(kind) or types.is_binary_view(kind):
        return pyarrow.binary_view()
    if types.is_large_string(kind) or types.is_large_binary(kind):
        return pyarrow.large_binary()
    return pyarrow.binary()


def _check_schema(schema: Any, file: InputFile, column: str) -> None:
    from pyarrow import types

    # -1 also for a name that two columns have.
    index = schema.get_field_index(column)
    if index < 0:
        found = ", ".join(schema.names) or "none"
        problem = "more than one column" if column in schema.names else "no column"
        raise DataError(
            f"{file.name}: {problem} {column!r} (columns: {found}); pass the column of the text "
            "with --json-key"
        )
    kind = schema.field(index).type
    if types.is_dictionary(kind):
        kind = kind.value_type
    text_types = (
        types.is_string,
        types.is_large_string,
        types.is_string_view,
        types.is_binary,
        types.is_large_binary,
        types.is_binary_view,
    )
    if not any(is_text(kind) for is_text in text_types):
        raise DataError(
            f"{file.name}: column {column!r} holds {kind}, not text; pass another --json-key "
            f"(columns: {', '.join(schema.names)})"
        )


def _batch(
    values: list[bytes | None], first_row: int, done: int, column: str, limit: int
) -> DocumentBatch:
    """Read the values of the rows ``done``, ``done`` + 1 ... of a group."""
    batch = DocumentBatch(lines=len(values))
    for row, raw in enumerate(values, start=done):
        text = _text(raw, column, limit)
        if not isinstance(text, str):
            batch.rejected.append(Rejected(first_row + row, row, *text))
        elif text:
            batch.texts.append(text)
            batch.positions.append(first_row + row)
            batch.line_numbers.append(row)
        else:
            batch.empty_lines.append(row)
    return batch


def _text(raw: bytes | None, column: str, limit: int) -> str | tuple[BadReason, str]:
    """Decode a value; otherwise what is wrong with it."""
    if raw is None:
        return BadReason.NOT_TEXT, f"{column!r} is null, not a string"
    if len(raw) > limit:
        return BadReason.TOO_LARGE, too_large(len(raw), limit)
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        return BadReason.INVALID_UTF8, invalid_utf8(error, 0)


def _one_line(error: BaseException) -> str:
    """The beginning of an error's message."""
    return " ".join(str(error).split())[:100] or type(error).__name__
