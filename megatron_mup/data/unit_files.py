"""Unit files: the tokens of one unit of the corpus, on their way into shards.

A unit is a piece of the inputs that one worker tokenizes at a time; units depend on the inputs
alone, so that a run that was killed finds the finished ones again. A unit has two files in the
work folder: ``NAME.tokens``, the ids of its documents end to end, and ``NAME.unit``, two checksums,
one line of JSON (``UnitFacts``) and then a ``ROW`` for each document. ``NAME.unit`` is published
last: where it is, the unit is whole. Nobody waits for the disk, which would cost a fast engine a
fifth of its time; the checksums tell a file that was cut when the machine went down.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from megatron_mup.data.publication import published
from megatron_mup.errors import DataError

DIGEST_BYTES = 16
"""Leading bytes of a text's SHA-256 that are kept: copies are recognized by them."""

ROW = np.dtype(
    [
        ("length", "<i4"),
        ("split", "u1"),
        ("file", "<i4"),
        ("position", "<i8"),
        ("text_bytes", "<i8"),
        ("digest", f"V{DIGEST_BYTES}"),
    ]
)
"""A document: its length in tokens (eod included), the number of its split, the number of its input
file, its position there (see ``documents.DocumentBatch``), the UTF-8 bytes and the digest of its
text (of the end of it where neither splits nor copies are asked for)."""


logger = logging.getLogger(__name__)

SUMS = struct.Struct("<II")
"""The head of a .unit file: CRC-32 of the ids, and of the rest of the .unit file."""


@dataclass(frozen=True, order=True)
class UnitKey:
    """A unit's place in the corpus; the order of the keys is the order of the documents."""

    source: int
    """Number of the first input file of the unit."""

    part: int
    """Number of the unit within that file."""

    @property
    def name(self) -> str:
        """Stem of the unit's files; the names sort as the keys do."""
        return f"{self.source:07d}-{self.part:07d}"

    @property
    def following(self) -> UnitKey:
        """The next unit of the same input."""
        return UnitKey(self.source, self.part + 1)


@dataclass(frozen=True, kw_only=True)
class UnitFacts:
    """What is known of a finished unit."""

    engine: str
    """The engine that made the ids."""

    tokens: int
    """Ids in ``NAME.tokens``."""

    lines: int
    """Lines (rows of a Parquet file, or text files) read."""

    empty_documents: int
    """Documents without text, left out."""

    rejected: dict[str, int]
    """Bad documents left out, by reason."""

    rejected_places: list[list[Any]]
    """The first of them: file number, position, line within the unit counted from 0, reason and
    detail."""

    last: bool
    """Whether a stream (compressed file, standard input) ends with this unit; always true where the
    number of units is known beforehand."""

    raw_sha256: str | None
    """Digest of the unit's input bytes for standard input; None elsewhere."""


@dataclass(frozen=True)
class Unit:
    """A finished unit, read back."""

    facts: UnitFacts
    rows: NDArray[np.void]
    """One ``ROW`` for each document, in order."""

    tokens_path: Path
    tokens_crc32: int

    def read_ids(self, dtype: np.dtype[np.integer]) -> NDArray[np.integer]:
        """Read all ids of the unit.

        Args:
            dtype: The little-endian type of the shards.

        Returns:
            [tokens] of ``dtype``.

        Raises:
            DataError: They are not the ids that were written.
        """
        raw = self.tokens_path.read_bytes()
        if zlib.crc32(raw) != self.tokens_crc32:
            raise DataError(f"{self.tokens_path}: the checksum differs; {_REMAKE}")
        return np.frombuffer(raw, dtype=dtype)


def is_finished(folder: Path, key: UnitKey) -> bool:
    """Whether a unit is whole."""
    return (folder / f"{key.name}.unit").is_file()


def tokens_path(folder: Path, key: UnitKey) -> Path:
    """Where a unit's ids lie."""
    return folder / f"{key.name}.tokens"


@contextlib.contextmanager
def unit_writer(folder: Path, key: UnitKey) -> Iterator[UnitWriter]:
    """Open a unit for writing; it is published when ``UnitWriter.finish`` was called.

    Args:
        folder: The folder of the units.
        key: The unit.

    Yields:
        What takes the ids as they come.
    """
    with published(tokens_path(folder, key), synced=False) as stream:
        writer = UnitWriter(stream)
        yield writer
    if writer.head is not None:
        with published(folder / f"{key.name}.unit", synced=False) as stream:
            stream.write(writer.head)


class UnitWriter:
    """A unit in the making; ``unit_writer`` makes one."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream, self._checksum = stream, 0
        self.head: bytes | None = None

    def add(self, ids: NDArray[np.integer]) -> None:
        """Append ids of the shards' little-endian type."""
        raw = memoryview(ids).cast("B")
        self._checksum = zlib.crc32(raw, self._checksum)
        self._stream.write(raw)

    def finish(self, facts: UnitFacts, rows: NDArray[np.void]) -> None:
        """Say that the unit is whole.

        Args:
            facts: What is known of it.
            rows: [documents] of ``ROW``.
        """
        line = json.dumps(dataclasses.asdict(facts)).encode("utf-8")
        body = rows.tobytes()
        sums = SUMS.pack(self._checksum, zlib.crc32(body, zlib.crc32(line)))
        self.head = sums + line + b"\n" + body


def whole_unit(folder: Path, key: UnitKey, *, token_bytes: int) -> UnitFacts | None:
    """Look through a unit of an earlier run, and delete it if the machine's fall has cut it.

    Args:
        folder: The folder of the units.
        key: The unit.
        token_bytes: Bytes of an id.

    Returns:
        What is known of it; None if it is not there or was deleted.
    """
    if not is_finished(folder, key):
        return None
    try:
        return read_unit(folder, key, token_bytes=token_bytes).facts
    except DataError as error:
        logger.warning("%s; it is made again", error)
        remove_unit(folder, key)
        return None


def remove_unit(folder: Path, key: UnitKey) -> None:
    """Delete a unit, so that it is made again."""
    # First the file that says that the unit is whole.
    (folder / f"{key.name}.unit").unlink(missing_ok=True)
    tokens_path(folder, key).unlink(missing_ok=True)


def read_facts(folder: Path, key: UnitKey) -> UnitFacts:
    """Read what is known of a finished unit, without its rows.

    Raises:
        DataError: The file is damaged.
    """
    path = folder / f"{key.name}.unit"
    with path.open("rb") as stream:
        stream.seek(SUMS.size)
        return _facts(stream.readline().rstrip(b"\n"), path)


def read_unit(folder: Path, key: UnitKey, *, token_bytes: int) -> Unit:
    """Read a finished unit and check it against itself.

    Args:
        folder: The folder of the units.
        key: The unit.
        token_bytes: Bytes of an id.

    Returns:
        The unit; its ids stay on disk.

    Raises:
        DataError: The files are damaged or contradict each other.
    """
    path = folder / f"{key.name}.unit"
    raw = path.read_bytes()
    line, _, body = raw[SUMS.size :].partition(b"\n")
    sums = SUMS.unpack(raw[: SUMS.size]) if len(raw) >= SUMS.size else None
    if sums is None or zlib.crc32(body, zlib.crc32(line)) != sums[1]:
        raise DataError(f"{path}: cut or damaged (its checksum differs); {_REMAKE}")
    facts, rows = _facts(line, path), np.frombuffer(body, dtype=ROW)
    tokens = tokens_path(folder, key)
    size = tokens.stat().st_size if tokens.is_file() else -1
    expected = int(rows["length"].sum(dtype=np.int64)) * token_bytes
    if not size == expected == facts.tokens * token_bytes:
        raise DataError(
            f"{tokens}: expected {expected} bytes by its .unit file, found {size}; {_REMAKE}"
        )
    return Unit(facts, rows, tokens, sums[0])


_REMAKE = "delete the two files and run the same command again"


def _facts(line: bytes, path: Path) -> UnitFacts:
    try:
        return UnitFacts(**json.loads(line))
    except (ValueError, TypeError) as error:
        raise DataError(f"{path}: not a unit file ({error}); {_REMAKE}") from error
