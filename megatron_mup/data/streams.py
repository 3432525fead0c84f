"""Compressed files and standard input: their bytes in pieces, and their lines in units.

A stream can only be read from its start. Every archive is read to its end mark: one that is cut
short or corrupt is an error, never a silent end. Memory is bounded whatever a stream holds.
"""

from __future__ import annotations

import contextlib
import io
import lzma
import sys
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import BinaryIO, Protocol, cast

import zstandard

from megatron_mup.data.batches import BadReason, Rejected, too_large
from megatron_mup.data.inputs import STDIN, Compression, InputFile, check_stdin, unreadable
from megatron_mup.errors import DataError

_PIECE_BYTES = 256 << 10
# zstd gives all that its input holds at once, up to 128 KiB for every 4 bytes: 16 MiB for these.
_ZSTD_FEED_BYTES = 512
# The largest dictionaries of the xz and zstd command lines without their "extreme" settings.
_XZ_MEMORY_BYTES = 256 << 20
_ZSTD_WINDOW_BYTES = 128 << 20


class DamagedInput(DataError):
    """An input is cut short or corrupt."""

    def __init__(self, file: InputFile, offset: int, what: str) -> None:
        """Name the file and the place.

        Args:
            file: The input.
            offset: Decompressed bytes, or rows of a Parquet file, before the damage.
            what: What is wrong with it.
        """
        super().__init__(f"{file.name}: {what}; copy or make the file again")
        self.file = file
        self.offset = offset
        self.what = what

    def __reduce__(self) -> tuple[type[DamagedInput], tuple[InputFile, int, str]]:
        # An exception is otherwise rebuilt in the parent process from its message alone.
        return DamagedInput, (self.file, self.offset, self.what)


class _Decoder(Protocol):
    """A decompressor of one frame (member, stream) of an archive."""

    @property
    def eof(self) -> bool:
        """Whether the frame's end mark was read."""

    @property
    def unused_data(self) -> bytes:
        """Input behind the end mark."""

    def pieces(self, data: bytes) -> Iterator[bytes]:
        """Yield what ``data`` gives, in pieces of bounded size."""


class _Gzip:
    def __init__(self) -> None:
        # 16: with a gzip header and its checksum.
        self._decoder = zlib.decompressobj(wbits=zlib.MAX_WBITS | 16)

    @property
    def eof(self) -> bool:
        return self._decoder.eof

    @property
    def unused_data(self) -> bytes:
        return self._decoder.unused_data

    def pieces(self, data: bytes) -> Iterator[bytes]:
        while data and not self.eof:
            yield self._decoder.decompress(data, _PIECE_BYTES)
            data = self._decoder.unconsumed_tail


class _Xz:
    def __init__(self) -> None:
        self._decoder = lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=_XZ_MEMORY_BYTES)

    @property
    def eof(self) -> bool:
        return self._decoder.eof

    @property
    def unused_data(self) -> bytes:
        return self._decoder.unused_data

    def pieces(self, data: bytes) -> Iterator[bytes]:
        yield self._decoder.decompress(data, _PIECE_BYTES)
        while not self.eof and not self._decoder.needs_input:
            yield self._decoder.decompress(b"", _PIECE_BYTES)


class _Zstd:
    def __init__(self) -> None:
        limits = zstandard.ZstdDecompressor(max_window_size=_ZSTD_WINDOW_BYTES)
        self._decoder = limits.decompressobj()
        self.unused_data = b""

    @property
    def eof(self) -> bool:
        return self._decoder.eof

    def pieces(self, data: bytes) -> Iterator[bytes]:
        for start in range(0, len(data), _ZSTD_FEED_BYTES):
            end = start + _ZSTD_FEED_BYTES
            yield self._decoder.decompress(data[start:end])
            if self.eof:
                self.unused_data = self._decoder.unused_data + data[end:]
                return


_DECODERS: dict[Compression, type[_Gzip] | type[_Xz] | type[_Zstd]] = {
    Compression.GZIP: _Gzip,
    Compression.XZ: _Xz,
    Compression.ZSTD: _Zstd,
}


def _decompressed(raw: BinaryIO, compression: Compression) -> Iterator[bytes]:
    """Yield the contents of an archive of any number of frames; raises ValueError if it is bad."""
    decoder: _Decoder | None = None
    first = True
    while data := raw.read(_PIECE_BYTES):
        while data:
            if decoder is None:
                # Between frames and at the end, zero bytes are padding.
                data = data if first else data.lstrip(b"\0")
                if not data:
                    break
                decoder, first = _DECODERS[compression](), False
            yield from decoder.pieces(data)
            data = b""
            if decoder.eof:
                data, decoder = decoder.unused_data, None
    if decoder is not None or first:
        raise ValueError(f"cut short: the {compression} data end before their end mark")


class _Stream(io.RawIOBase):
    """The decompressed bytes of an input; each read gives at most one piece."""

    def __init__(self, raw: BinaryIO, file: InputFile) -> None:
        self._file = file
        self._pieces = (
            iter(lambda: raw.read(_PIECE_BYTES), b"")
            if file.compression is Compression.NONE
            else _decompressed(raw, file.compression)
        )
        self._rest = memoryview(b"")
        self._offset = 0
        if file.name == STDIN:
            self._rest = memoryview(self._next() or b"")
            check_stdin(bytes(self._rest[:8]), file.format)

    def readable(self) -> bool:
        return True

    def read(self, size: int = -1) -> bytes:
        if size < 0:
            return self.readall()
        # A decoder may take input and give nothing yet; only the end of the input ends the stream.
        while not self._rest:
            piece = self._next()
            if piece is None:
                return b""
            self._rest = memoryview(piece)
        piece, self._rest = bytes(self._rest[:size]), self._rest[size:]
        self._offset += len(piece)
        return piece

    def _next(self) -> bytes | None:
        try:
            return next(self._pieces, None)
        except (ValueError, EOFError, zlib.error, lzma.LZMAError, zstandard.ZstdError) as error:
            # The libraries tell this apart from damage by their words alone.
            if "too much memory" in str(error) or "Memory usage limit" in str(error):
                raise DataError(
                    f"{self._file.name}: decompressing it takes more than "
                    f"{_ZSTD_WINDOW_BYTES >> 20} MiB (.zst) or {_XZ_MEMORY_BYTES >> 20} MiB (.xz); "
                    "compress it again with a smaller window, e.g. zstd --long=27"
                ) from error
            what = f"damaged at decompressed byte offset {self._offset} ({error})"
            raise DamagedInput(self._file, self._offset, what) from error
        except OSError as error:
            raise unreadable(self._file.name, error) from error


@contextlib.contextmanager
def open_stream(file: InputFile) -> Iterator[BinaryIO]:
    """Open an input's decompressed bytes.

    Args:
        file: A plain or compressed file, or standard input.

    Yields:
        A stream whose ``read(n)`` gives at most ``n`` bytes, fewer before the end too, and b"" at
        the end. It raises ``DamagedInput`` after the last good bytes of a damaged archive.

    Raises:
        DataError: The file cannot be opened.
    """
    with contextlib.ExitStack() as stack:
        if file.name == STDIN:
            raw = sys.stdin.buffer
        else:
            try:
                raw = stack.enter_context(file.path.open("rb"))
            except OSError as error:
                raise unreadable(file.name, error) from error
        yield cast(BinaryIO, _Stream(raw, file))


@dataclass(frozen=True, kw_only=True)
class StreamUnit:
    """The lines of a stream that begin in one range of its decompressed bytes."""

    part: int
    """Number of the range."""

    offset: int
    """Decompressed offset of its first line; of the range's start where no line begins in it."""

    first_line: int
    """Lines of the stream before it."""

    data: bytes
    """Its lines, without the one in ``rejected``."""

    rejected: list[Rejected]
    """At most one: its last line where that is too large, or the place of the damage."""

    last: bool
    """Whether the stream ends with it."""

    @property
    def lines(self) -> int:
        """Number of its lines, the rejected one included."""
        # Only the stream's last line may lack its newline.
        unended = bool(self.data) and not self.data.endswith(b"\n")
        return self.data.count(b"\n") + unended + len(self.rejected)


def cut_stream(
    file: InputFile, *, unit_bytes: int, max_document_bytes: int
) -> Iterator[StreamUnit]:
    """Cut a compressed file or standard input of JSON lines into units.

    Unit k holds the lines whose first byte has a decompressed offset from k * ``unit_bytes`` to
    below (k + 1) * ``unit_bytes``; a unit inside a long line is empty. A last line of a unit that
    is too large is left out and never held.

    Args:
        file: A plain or compressed file, or standard input.
        unit_bytes: Size of the ranges.
        max_document_bytes: Longer lines (without their newline) are too large.

    Yields:
        The units in order, without gaps; the last one, and only it, has ``last``. A damaged
        archive ends with the unit of the line that the damage cuts, which is rejected.

    Raises:
        DataError: The file cannot be opened or read.
    """
    cutter = _Cutter(unit_bytes, max_document_bytes)
    with open_stream(file) as stream:
        try:
            while piece := stream.read(_PIECE_BYTES):
                yield from cutter.add(piece)
        except DamagedInput as error:
            yield from cutter.end(damage=error.what)
            return
    yield from cutter.end(damage=None)


class _Cutter:
    """The unit in the making."""

    def __init__(self, unit_bytes: int, limit: int) -> None:
        self._unit_bytes, self._limit = unit_bytes, limit
        # A finished unit waits until it is known whether the stream goes on.
        self._finished: StreamUnit | None = None
        self._offset = self._first_line = 0
        self._start_unit()

    def add(self, piece: bytes) -> Iterator[StreamUnit]:
        """Take bytes of the stream; yields the units that they show not to be the last."""
        while piece:
            part = self._offset // self._unit_bytes
            yield from self._release(part)
            # The unit ends with the line that holds the last byte of its range.
            before = max(0, (part + 1) * self._unit_bytes - 1 - self._offset - self._size)
            end = piece.find(b"\n", before) + 1
            taken = piece[:end] if end else piece
            self._size += len(taken)
            self._last_byte = taken[-1:]
            if not self._dropping:
                self._pieces.append(taken)
            if end:
                self._finish(None)
            elif len(piece) > before:
                self._hold_back_long_line()
            piece = piece[len(taken) :]

    def end(self, damage: str | None) -> Iterator[StreamUnit]:
        """Yield what is left at the end of the stream, or where it is damaged."""
        if damage is not None:
            yield from self._release(self._offset // self._unit_bytes)
        unit = self._finished or self._finish(damage)
        # Ranges inside a long line exist as they do in a plain file of the same size.
        last_part = -(-self._offset // self._unit_bytes) - 1
        if damage is not None or last_part <= unit.part:
            yield replace(unit, last=True)
            return
        yield from self._release(last_part)
        yield self._empty(last_part, last=True)

    def _start_unit(self) -> None:
        self._size = 0
        self._last_byte = b""
        self._head: bytes | None = None
        self._pieces: list[bytes] = []
        self._dropping = False

    def _hold_back_long_line(self) -> None:
        """Part the whole lines from a last one that reaches beyond the range; drop an oversized."""
        if self._head is None:
            data = b"".join(self._pieces)
            cut = data.rfind(b"\n") + 1
            self._head, self._pieces = data[:cut], [data[cut:]]
        if self._size - len(self._head) > self._limit:
            self._pieces, self._dropping = [], True

    def _finish(self, damage: str | None) -> StreamUnit:
        """Make the unit of what was taken and start the next one."""
        data = b"".join([self._head or b"", *self._pieces])
        ended = self._last_byte == b"\n"
        if self._head is not None:
            cut = len(self._head)
        else:
            # Where the last line begins; damage cuts the line behind the last newline.
            cut = data.rfind(b"\n", 0, len(data) - (ended and damage is None)) + 1
        rejected = self._bad_end(cut, self._size - cut - ended, damage)
        if rejected is not None:
            data = data[:cut]
        unit = StreamUnit(
            part=self._offset // self._unit_bytes,
            offset=self._offset,
            first_line=self._first_line,
            data=data,
            rejected=[] if rejected is None else [replace(rejected, line=data.count(b"\n"))],
            last=False,
        )
        self._offset += self._size
        self._first_line += unit.lines
        self._finished = unit
        self._start_unit()
        return unit

    def _bad_end(self, cut: int, line_bytes: int, damage: str | None) -> Rejected | None:
        """What is wrong with the unit's last line, which begins at ``cut``."""
        position = self._offset + cut
        if damage is not None:
            return Rejected(position, 0, BadReason.DAMAGED, damage)
        if line_bytes <= self._limit:
            return None
        return Rejected(position, 0, BadReason.TOO_LARGE, too_large(line_bytes, self._limit))

    def _release(self, until: int) -> Iterator[StreamUnit]:
        """Yield the finished unit and the empty ones between it and unit ``until``."""
        if self._finished is not None:
            yield self._finished
            for part in range(self._finished.part + 1, until):
                yield self._empty(part, last=False)
            self._finished = None

    def _empty(self, part: int, *, last: bool) -> StreamUnit:
        return StreamUnit(
            part=part,
            offset=part * self._unit_bytes,
            first_line=self._first_line,
            data=b"",
            rejected=[],
            last=last,
        )
