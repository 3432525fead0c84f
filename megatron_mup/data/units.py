"""Units: the pieces of the inputs that are tokenized one at a time.

Where a unit begins and ends depends on the inputs alone, never on the number of
workers, so that a run that was killed, and other machines, find the same units. Nothing is read
here but the sizes of files.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from megatron_mup.data.inputs import STDIN, Compression, InputFile, InputFormat
from megatron_mup.data.parquet import row_groups
from megatron_mup.data.streams import DamagedInput, StreamUnit
from megatron_mup.data.unit_files import UnitKey

_LEAST_BYTES, _MOST_BYTES = 1 << 20, 16 << 20
# Of a stream, the parent and each worker hold several units.
_MOST_STREAMED_BYTES = 4 << 20
_UNITS = 32


@dataclass(frozen=True)
class LinesTask:
    """JSON lines that begin in [start, stop) of a file that can be read anywhere."""

    key: UnitKey
    file: InputFile
    start: int
    stop: int


@dataclass(frozen=True)
class TextsTask:
    """Whole text files, one document each."""

    key: UnitKey
    files: tuple[InputFile, ...]


@dataclass(frozen=True)
class RowsTask:
    """A row group of a Parquet file."""

    key: UnitKey
    file: InputFile
    group: int
    first_row: int

    damage: str | None = None
    """Why the file cannot be read at all; it then has this one unit."""


@dataclass(frozen=True)
class BlockTask:
    """JSON lines of a stream, read and cut by the parent process."""

    key: UnitKey
    file: InputFile
    unit: StreamUnit = field(repr=False)

    raw_sha256: str | None
    """Digest of the unit's bytes for standard input, which cannot be read again; None for files."""


@dataclass(frozen=True)
class StreamTask:
    """All units of a file that can only be read from its beginning; their number shows then."""

    key: UnitKey
    file: InputFile


Task = LinesTask | TextsTask | RowsTask | BlockTask
"""What one worker does at a time."""


def choose_unit_bytes(files: Sequence[InputFile]) -> int:
    """Choose the size of the units.

    A small corpus is cut into enough of them to keep all workers busy to the end; of a large one,
    a unit is 0.2 s of work for a fast engine, and a few of them fit into memory.

    Args:
        files: The input files.

    Returns:
        Bytes of decompressed text, from the stored size of the files alone.
    """
    stored = sum(file.size_bytes or 0 for file in files)
    most = _MOST_STREAMED_BYTES if any(map(_is_streamed, files)) else _MOST_BYTES
    return min(max(stored // _UNITS, _LEAST_BYTES), most)


def _is_streamed(file: InputFile) -> bool:
    """Whether the parent process reads the file for its workers."""
    is_compressed_lines = (
        file.format is InputFormat.JSONL and file.compression is not Compression.NONE
    )
    return is_compressed_lines or file.name == STDIN


def plan_tasks(
    files: Sequence[InputFile], *, unit_bytes: int
) -> Iterator[LinesTask | TextsTask | RowsTask | StreamTask]:
    """Cut the inputs into units.

    Args:
        files: The input files in order.
        unit_bytes: Size of a unit.

    Yields:
        The tasks in the order of their keys.

    Raises:
        DataError: A file cannot be opened.
    """
    number = 0
    while number < len(files):
        file = files[number]
        if file.format is InputFormat.TEXT and file.name != STDIN:
            group = _text_group(files, number, unit_bytes)
            yield TextsTask(UnitKey(number, 0), group)
            number += len(group)
            continue
        if file.format is InputFormat.PARQUET:
            yield from _row_tasks(file, number)
        elif _is_streamed(file):
            yield StreamTask(UnitKey(number, 0), file)
        else:
            size = file.size_bytes or 0
            for part, start in enumerate(range(0, max(size, 1), unit_bytes)):
                yield LinesTask(UnitKey(number, part), file, start, min(start + unit_bytes, size))
        number += 1


def _text_group(files: Sequence[InputFile], first: int, unit_bytes: int) -> tuple[InputFile, ...]:
    """As many neighbouring text files as make a unit, at least one."""
    stored, stop = 0, first
    while (
        stop < len(files) and files[stop].format is InputFormat.TEXT and files[stop].name != STDIN
    ):
        stored += files[stop].size_bytes or 0
        if stop > first and stored > unit_bytes:
            break
        stop += 1
    return tuple(files[first:stop])


def _row_tasks(file: InputFile, number: int) -> Iterator[RowsTask]:
    try:
        groups = row_groups(file)
    except DamagedInput as error:
        yield RowsTask(UnitKey(number, 0), file, 0, 0, damage=error.what)
        return
    first_row = 0
    for group, rows in enumerate(groups):
        yield RowsTask(UnitKey(number, group), file, group, first_row)
        first_row += rows
