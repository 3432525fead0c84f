"""Input files: finding them, what they hold, and refusing what cannot be read before any work.

A file's suffix says how it is read; its first bytes are checked against it. Owns the order of the
inputs. It opens files but never reads documents.
"""

from __future__ import annotations

import glob
import hashlib
import logging
import os
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from megatron_mup.errors import DataError

logger = logging.getLogger(__name__)

STDIN = "-"
"""The name of standard input."""


class InputFormat(StrEnum):
    """How an input holds its documents."""

    JSONL = "jsonl"
    """One JSON object a line."""

    TEXT = "text"
    """The whole file is one document."""

    PARQUET = "parquet"
    """One document a row."""


class Compression(StrEnum):
    """What a file is compressed with as a whole."""

    NONE = "none"
    GZIP = "gzip"
    ZSTD = "zstd"
    XZ = "xz"


_FORMATS = {
    ".jsonl": InputFormat.JSONL,
    ".json": InputFormat.JSONL,
    ".ndjson": InputFormat.JSONL,
    ".txt": InputFormat.TEXT,
    ".md": InputFormat.TEXT,
    ".rst": InputFormat.TEXT,
    ".parquet": InputFormat.PARQUET,
}
_COMPRESSIONS = {".gz": Compression.GZIP, ".zst": Compression.ZSTD, ".xz": Compression.XZ}

_PARQUET = "Parquet"
_MAGICS = {
    b"\x1f\x8b": "gzip",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"\xfd7zXZ\x00": "xz",
    b"PAR1": _PARQUET,
    b"PARE": "encrypted Parquet",
    b"BZh": "bzip2",
    b"PK\x03\x04": "zip",
    b"\xff\xfe": "UTF-16",
    b"\xfe\xff": "UTF-16",
    # Seekable and parallel zstd writers may begin with one of 16 kinds of skippable frames.
    **{bytes([0x50 + kind, 0x2A, 0x4D, 0x18]): "zstd" for kind in range(16)},
}
_SHARD_INDEX = b"MMIDIDX"
"""The first bytes of an .idx file: ``shards.INDEX_MAGIC``, without loading NumPy."""

_SUFFIX_OF = {"gzip": ".gz", "zstd": ".zst", "xz": ".xz", _PARQUET: ".parquet"}

_DECOMPRESSED_BY = {"gzip": "gzip -dc", "zstd": "zstd -dc", "xz": "xz -dc", "bzip2": "bzip2 -dc"}
"""The command that writes an archive's contents to a pipe."""

_FINGERPRINT_BYTES = 64 << 10


@dataclass(frozen=True, kw_only=True)
class InputFile:
    """One input and how to read it."""

    name: str
    """The file as the user named it, which is what manifests record; "-" is standard input."""

    format: InputFormat
    """What it holds."""

    compression: Compression
    """What it is compressed with."""

    size_bytes: int | None
    """Its size as stored; None for standard input."""

    @property
    def path(self) -> Path:
        """The file's path; without meaning for standard input."""
        return Path(self.name)


def find_inputs(
    patterns: Sequence[str | Path], *, input_format: InputFormat | None = None
) -> list[InputFile]:
    """List the input files that the user named, in the order in which they are read.

    A pattern is a file, a glob (``**`` crosses folders), a folder or "-". A glob's matches are
    sorted by name; folders among them are left out. A folder gives every file below it with a
    known suffix, sorted by name, hidden ones left out: .jsonl, .json and .ndjson (JSON lines),
    .txt, .md and .rst (text), .parquet, the first two also with .gz, .zst or .xz after it. A file
    that is named, or matched by a glob, with any other suffix is one text document.

    Args:
        patterns: What ``--input`` named.
        input_format: What the files hold, whatever their suffix; None goes by the suffix.

    Returns:
        The inputs; each can be opened and begins as its suffix promises.

    Raises:
        DataError: A pattern matches nothing, a file is missing, unreadable, no regular file, or
            something else than its suffix says; standard input is named twice.
    """
    if not patterns:
        raise DataError("no input file; pass --input FILE, once for each file")
    names = [name for pattern in patterns for name in _expand(str(pattern))]
    if names.count(STDIN) > 1:
        raise DataError("standard input (-) is named more than once; pass --input - once")
    inputs = [_input_file(name, input_format) for name in names]
    _warn_of_copies(inputs)
    return inputs


def fingerprint(file: InputFile) -> str:
    """Return a digest by which a restarted run sees that an input was replaced.

    Args:
        file: The input.

    Returns:
        Hex SHA-256 of the file's size, first and last 64 KiB; "-" for standard input.

    Raises:
        DataError: The file cannot be read.
    """
    if file.name == STDIN:
        return STDIN
    try:
        with file.path.open("rb") as stream:
            size = stream.seek(0, os.SEEK_END)
            stream.seek(0)
            first = stream.read(_FINGERPRINT_BYTES)
            stream.seek(max(0, size - _FINGERPRINT_BYTES))
            last = stream.read(_FINGERPRINT_BYTES)
    except OSError as error:
        raise unreadable(file.name, error) from error
    return hashlib.sha256(f"{size}\n".encode("ascii") + first + last).hexdigest()


def unreadable(name: str, error: OSError) -> DataError:
    """Return the error for an input that the system refuses to read.

    Args:
        name: The file.
        error: What the system said.

    Returns:
        The error to raise.
    """
    return DataError(f"cannot read input {name}: {error.strerror or error}; correct --input")


def _expand(pattern: str) -> Iterator[str]:
    """Yield the files that one pattern stands for."""
    if pattern == STDIN:
        yield STDIN
    elif os.path.isdir(pattern):
        yield from _files_below(pattern)
    # A file may have a glob's characters in its name.
    elif glob.has_magic(pattern) and not os.path.lexists(pattern):
        files = [name for name in glob.glob(pattern, recursive=True) if not os.path.isdir(name)]
        if not files:
            raise DataError(f"no file matches the input {pattern}; correct --input")
        yield from sorted(files)
    else:
        yield pattern


def _files_below(folder: str) -> list[str]:
    """The files of a folder with a known suffix; raises DataError if there is none."""
    every = sorted(_walk(folder, ()))
    found = [name for name in every if _suffixes(name)[0] in _FORMATS]
    left_out = [name for name in every if _suffixes(name)[0] not in _FORMATS]
    if not found:
        raise DataError(
            f"input {folder} is a folder without files to read ({len(left_out)} with other "
            f"suffixes than {', '.join(_FORMATS)}); correct --input, or name files by a glob such "
            f"as '{os.path.join(folder, '**', '*.html')}'"
        )
    if left_out:
        logger.warning(
            "--input %s: %d files with other suffixes are left out, first %s; a glob reads them",
            folder,
            len(left_out),
            left_out[0],
        )
    return found


def _walk(folder: str, above: tuple[str, ...]) -> Iterator[str]:
    """Yield the visible files below a folder; links to folders are followed, but not in circles."""
    real = os.path.realpath(folder)
    if real in above:
        return
    try:
        with os.scandir(folder) as entries:
            visible = [entry for entry in entries if not entry.name.startswith(".")]
    except OSError as error:
        raise unreadable(folder, error) from error
    for entry in visible:
        if entry.is_dir():
            yield from _walk(entry.path, (*above, real))
        else:
            yield entry.path


def _suffixes(name: str) -> tuple[str, Compression]:
    """A file's suffix below that of its compression, and the compression."""
    stem, suffix = os.path.splitext(name.lower())
    compression = _COMPRESSIONS.get(suffix, Compression.NONE)
    if compression is Compression.NONE:
        return suffix, compression
    return os.path.splitext(stem)[1], compression


def _input_file(name: str, input_format: InputFormat | None) -> InputFile:
    if name == STDIN:
        return _standard_input(input_format or InputFormat.JSONL)
    suffix, compression = _suffixes(name)
    chosen = input_format or _FORMATS.get(suffix, InputFormat.TEXT)
    head, size = _look(name)
    _refuse_shard(name, head)
    if suffix == ".tar":
        raise DataError(f"input {name} is an archive of files; unpack it and pass the files")
    if chosen is InputFormat.PARQUET and compression is not Compression.NONE:
        raise DataError(
            f"input {name} is compressed Parquet, which cannot be read in pieces; decompress it "
            "(Parquet compresses its columns itself)"
        )
    _check_head(name, chosen, compression, head)
    return InputFile(name=name, format=chosen, compression=compression, size_bytes=size)


def _standard_input(input_format: InputFormat) -> InputFile:
    if input_format is InputFormat.PARQUET:
        raise DataError(
            "Parquet cannot be read from standard input (-); pass the file to --input, or pipe "
            "JSON lines"
        )
    return InputFile(name=STDIN, format=input_format, compression=Compression.NONE, size_bytes=None)


def check_stdin(head: bytes, expected_format: InputFormat) -> None:
    """Refuse standard input that is no text; unlike a file, it shows that only when it is read.

    Args:
        head: Its first 8 bytes, or all of them.
        expected_format: What it is read as.

    Raises:
        DataError: It begins like an archive, Parquet or UTF-16.
    """
    found = _kind(head)
    if found is None:
        return
    cure = "convert it in the pipe"
    if found in _DECOMPRESSED_BY:
        cure = f"decompress it in the pipe: {_DECOMPRESSED_BY[found]} FILE | ... --input -"
    elif found == _PARQUET:
        cure = "pass the file to --input"
    raise DataError(f"standard input (-) is {found}, not {expected_format.value}; {cure}")


def _kind(head: bytes) -> str | None:
    """What a file that begins with these bytes is; None for what may be text."""
    return next((kind for magic, kind in _MAGICS.items() if head.startswith(magic)), None)


def _look(name: str) -> tuple[bytes, int]:
    """The first bytes and the size of a file; raises DataError if it cannot be read."""
    try:
        # Before it is opened: opening a pipe waits for its writer, and reading eats its bytes.
        facts = os.stat(name)
        if not stat.S_ISREG(facts.st_mode):
            raise DataError(
                f"input {name} is not a regular file; pipe it to standard input (--input -)"
            )
        # Opened rather than asked for its mode: root, network disks and containers differ.
        with open(name, "rb") as stream:
            return stream.read(8), facts.st_size
    except OSError as error:
        raise unreadable(name, error) from error


def _refuse_shard(name: str, head: bytes) -> None:
    """Refuse the files of a token shard; other files may end in .bin as well."""
    stem, suffix = os.path.splitext(name)
    if suffix == ".bin" and os.path.isfile(f"{stem}.idx"):
        head = _look(f"{stem}.idx")[0]
    elif suffix != ".idx":
        return
    if head.startswith(_SHARD_INDEX):
        raise DataError(
            f"input {name} belongs to the token shard {stem}, which is tokenized already; pass the "
            "text to --input, or train with the shard as it is (data.train_data_path)"
        )


def _check_head(
    name: str, expected_format: InputFormat, compression: Compression, head: bytes
) -> None:
    """Refuse a file that does not begin as its suffix promises."""
    found = _kind(head)
    expected: str | None = None
    if compression is not Compression.NONE:
        expected = compression.value
    elif expected_format is InputFormat.PARQUET:
        expected = _PARQUET
    if found == expected:
        return
    if found is None:
        what = f"begins with the bytes {head.hex(' ')}" if head else "is empty"
        raise DataError(
            f"input {name} is named as {expected} but {what}; rename it to what it is, or copy it "
            "again"
        )
    cure = f"rename it to end in {_SUFFIX_OF[found]}" if found in _SUFFIX_OF else "convert it"
    if found == _PARQUET and compression is Compression.NONE:
        cure += " or pass --input-format parquet"
    raise DataError(f"input {name} is {found}, not {expected or expected_format.value}; {cure}")


def _warn_of_copies(inputs: Sequence[InputFile]) -> None:
    seen: dict[str, str] = {}
    for file in inputs:
        if file.name == STDIN:
            continue
        real = os.path.realpath(file.name)
        if real in seen:
            logger.warning(
                "--input: %s and %s are the same file; its documents are read twice",
                seen[real],
                file.name,
            )
        seen.setdefault(real, file.name)
