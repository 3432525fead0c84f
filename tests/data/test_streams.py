from __future__ import annotations

import gzip
import io
import json
import lzma
import sys
import tempfile
import types
from collections.abc import Callable
from pathlib import Path

import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from megatron_mup.data.batches import BadReason
from megatron_mup.data.inputs import Compression, InputFile, InputFormat, find_inputs
from megatron_mup.data.json_lines import read_jsonl, seek_line
from megatron_mup.data.streams import DamagedInput, StreamUnit, cut_stream, open_stream
from megatron_mup.errors import DataError

Compress = Callable[[bytes], bytes]
COMPRESS: dict[str, Compress] = {
    ".gz": lambda raw: gzip.compress(raw, 1, mtime=0),
    ".zst": zstandard.ZstdCompressor(write_checksum=True).compress,
    ".xz": lambda raw: lzma.compress(raw, preset=0),
}
LINES = b"".join(b'{"text": "%d"}\n' % number for number in range(40_000))

suffixes = pytest.mark.parametrize("suffix", COMPRESS)


def made(folder: Path, suffix: str, content: bytes) -> InputFile:
    path = folder / f"a.jsonl{suffix}"
    path.write_bytes(content)
    # Not by find_inputs, which refuses some first bytes.
    compression = {"": "none", ".gz": "gzip", ".zst": "zstd", ".xz": "xz"}[suffix]
    return InputFile(
        name=str(path),
        format=InputFormat.JSONL,
        compression=Compression(compression),
        size_bytes=len(content),
    )


def everything(file: InputFile) -> bytes:
    with open_stream(file) as stream:
        return b"".join(iter(lambda: stream.read(1 << 20), b""))


def units(file: InputFile, unit_bytes: int, limit: int = 1 << 20) -> list[StreamUnit]:
    return list(cut_stream(file, unit_bytes=unit_bytes, max_document_bytes=limit))


@suffixes
def test_an_archive_of_many_frames_is_read_to_its_end(tmp_path: Path, suffix: str) -> None:
    compress = COMPRESS[suffix]
    content = compress(LINES) + compress(b"") + compress(b"second\n") * 3
    assert everything(made(tmp_path, suffix, content)) == LINES + b"second\n" * 3


@suffixes
def test_zero_bytes_after_an_archive_are_padding_and_others_are_damage(
    tmp_path: Path, suffix: str
) -> None:
    content = COMPRESS[suffix](LINES)
    assert everything(made(tmp_path, suffix, content + b"\0" * 512)) == LINES
    with pytest.raises(DamagedInput, match=f"damaged at decompressed byte offset {len(LINES)} "):
        everything(made(tmp_path, suffix, content + b"\0\0garbage"))


def test_skippable_frames_of_zstd_are_skipped(tmp_path: Path) -> None:
    skippable = b"\x5a\x2a\x4d\x18\x04\0\0\0abcd"
    content = skippable + COMPRESS[".zst"](LINES) + skippable
    assert everything(made(tmp_path, ".zst", content)) == LINES


@suffixes
@pytest.mark.parametrize("missing", [1, 3, 5000])
def test_an_archive_that_is_cut_short_is_noticed(tmp_path: Path, suffix: str, missing: int) -> None:
    content = COMPRESS[suffix](LINES)
    file = made(tmp_path, suffix, content[:-missing])
    pieces: list[bytes] = []
    with open_stream(file) as stream, pytest.raises(DamagedInput, match="cut short") as hit:
        pieces.extend(iter(lambda: stream.read(1000), b""))
    good = b"".join(pieces)
    assert (hit.value.file, hit.value.offset) == (file, len(good))
    assert LINES.startswith(good)
    assert len(good) > len(LINES) // 2 or suffix == ".xz"


@suffixes
def test_a_flipped_bit_of_the_contents_is_noticed(tmp_path: Path, suffix: str) -> None:
    content = bytearray(COMPRESS[suffix](LINES))
    content[len(content) // 2] ^= 4
    with pytest.raises(DamagedInput, match="damaged at decompressed byte offset"):
        everything(made(tmp_path, suffix, bytes(content)))


def test_what_needs_too_much_memory_to_decompress_is_refused(tmp_path: Path) -> None:
    window = zstandard.ZstdCompressionParameters(window_log=28, write_content_size=False)
    writer = zstandard.ZstdCompressor(compression_params=window).compressobj()
    content = writer.compress(LINES) + writer.flush()
    with pytest.raises(DataError, match=r"more than 128 MiB .* zstd --long=27"):
        everything(made(tmp_path, ".zst", content))


def test_a_unit_holds_the_lines_that_begin_in_its_range(tmp_path: Path) -> None:
    file = made(tmp_path, "", b"ab\ncd\n\nefghijklmnop\nq\n")
    found = [(u.part, u.offset, u.first_line, u.lines, u.data, u.last) for u in units(file, 4)]
    assert found == [
        (0, 0, 0, 2, b"ab\ncd\n", False),
        (1, 6, 2, 2, b"\nefghijklmnop\n", False),
        (2, 8, 4, 0, b"", False),
        (3, 12, 4, 0, b"", False),
        (4, 16, 4, 0, b"", False),
        (5, 20, 4, 1, b"q\n", True),
    ]


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", [(0, b"", True)]),
        (b"abc\n", [(0, b"abc\n", True)]),
        (b"abc\nd", [(0, b"abc\n", False), (1, b"d", True)]),
        (b"abcdefghi", [(0, b"abcdefghi", False), (1, b"", False), (2, b"", True)]),
        (b"abcdefg\n", [(0, b"abcdefg\n", False), (1, b"", True)]),
    ],
)
def test_a_stream_has_as_many_units_as_a_plain_file_of_its_size(
    tmp_path: Path, content: bytes, expected: list[tuple[int, bytes, bool]]
) -> None:
    found = units(made(tmp_path, ".gz", COMPRESS[".gz"](content)), 4)
    assert [(unit.part, unit.data, unit.last) for unit in found] == expected


@pytest.mark.parametrize("ending", [b"", b"\n", b"\nz"])
def test_an_oversized_last_line_of_a_unit_is_left_out(tmp_path: Path, ending: bytes) -> None:
    found = units(made(tmp_path, "", b"ab\n" + b"x" * 9 + ending), 8, limit=8)
    assert found[0].data == b"ab\n"
    [bad] = found[0].rejected
    assert (bad.position, bad.line, bad.reason) == (3, 1, BadReason.TOO_LARGE)
    assert bad.detail == "9 bytes, more than the limit of 8"
    assert [unit.lines for unit in found] == [2, 1 if ending == b"\nz" else 0]
    assert found[1].first_line == 2


@suffixes
def test_the_lines_before_the_damage_are_kept(tmp_path: Path, suffix: str) -> None:
    file = made(tmp_path, suffix, COMPRESS[suffix](LINES) + COMPRESS[suffix](LINES)[:-4])
    found = units(file, 100_000)
    kept = b"".join(unit.data for unit in found)
    assert kept.endswith(b"\n")
    assert (LINES + LINES).startswith(kept)
    assert len(kept) >= len(LINES)
    assert [unit.last for unit in found] == [False] * (len(found) - 1) + [True]
    [bad] = [bad for unit in found for bad in unit.rejected]
    assert (bad.reason, bad.position) == (BadReason.DAMAGED, len(kept))
    assert found[-1].rejected == [bad]
    assert found[-1].first_line + bad.line == kept.count(b"\n")


@pytest.mark.parametrize(
    ("good", "part"), [(b"", 0), (b"a\n", 0), (b"abc\n", 1), (b"abcdefg\n", 2)]
)
def test_damage_at_the_start_of_a_line_belongs_to_the_unit_there(
    tmp_path: Path, good: bytes, part: int
) -> None:
    content = COMPRESS[".gz"](good) + b"garbage" if good else b"\x1f\x8b\xff\xff\xff\xff"
    found = units(made(tmp_path, ".gz", content), 4)
    assert (found[-1].part, found[-1].last) == (part, True)
    assert [unit.part for unit in found] == list(range(part + 1))
    assert found[-1].rejected[0].position == len(good)
    assert b"".join(unit.data for unit in found) == good


def test_standard_input_is_cut_like_a_file(monkeypatch: pytest.MonkeyPatch) -> None:
    [file] = find_inputs(["-"])
    monkeypatch.setattr(sys, "stdin", types.SimpleNamespace(buffer=io.BytesIO(LINES)))
    found = units(file, 10_000)
    assert b"".join(unit.data for unit in found) == LINES
    assert len(found) == -(-len(LINES) // 10_000)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        *(
            (COMPRESS[suffix](LINES), f"is {kind}, not jsonl; decompress it .*: {kind} -dc FILE")
            for suffix, kind in ((".gz", "gzip"), (".zst", "zstd"), (".xz", "xz"))
        ),
        (b"PAR1\x15\x04", "is Parquet, not jsonl; pass the file to --input"),
        ('{"text": "a"}\n'.encode("utf-16"), "is UTF-16, not jsonl; convert it"),
    ],
)
def test_standard_input_that_is_no_text_is_refused_by_what_it_is(
    content: bytes, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    [file] = find_inputs(["-"])
    monkeypatch.setattr(sys, "stdin", types.SimpleNamespace(buffer=io.BytesIO(content)))
    with pytest.raises(DataError, match=rf"standard input \(-\) {message}"):
        units(file, 10_000)


any_line = st.binary(max_size=12) | st.text(max_size=9).map(
    lambda text: json.dumps({"text": text}, ensure_ascii=False).encode()
)


@given(
    lines=st.lists(any_line.map(lambda raw: raw.replace(b"\n", b"")), max_size=30),
    ended=st.booleans(),
    unit_bytes=st.integers(1, 90),
    limit=st.integers(1, 30),
    suffix=st.sampled_from(["", *COMPRESS]),
    block=st.integers(1, 60),
)
def test_units_hold_the_documents_of_the_whole_in_order(
    lines: list[bytes], ended: bool, unit_bytes: int, limit: int, suffix: str, block: int
) -> None:
    raw = b"\n".join(lines) + (b"\n" if ended else b"")
    expected, offset = [], 0
    for number, line in enumerate(raw.split(b"\n")):
        content = read_line(
            line if offset else line.removeprefix(b"\xef\xbb\xbf"), len(line), limit
        )
        if content is not None:
            place = offset if content else -1
            expected.append((offset // unit_bytes, number, place, content))
        offset += len(line) + 1
    assert by_ranges(raw, unit_bytes, limit, block) == expected
    with tempfile.TemporaryDirectory() as folder:
        compressed = COMPRESS[suffix](raw) if suffix else raw
        assert by_units(made(Path(folder), suffix, compressed), unit_bytes, limit) == expected


Found = list[tuple[int, int, int, str]]
"""Part, line in the file, position, and text or "bad" of each line that is not blank."""


def read_line(line: bytes, size: int, limit: int) -> str | None:
    """An independent reading: the text, "" or "bad"; None for a blank line."""
    if size > limit:
        return "bad"
    if not line.strip():
        return None
    try:
        record = json.loads(line.decode("utf-8"))
    except ValueError:
        return "bad"
    return record["text"] if isinstance(record, dict) else "bad"


def read_part(
    raw: bytes, offset: int, stop: int | None, *, limit: int, block: int = 1 << 20
) -> tuple[list[tuple[int, int, str]], int]:
    """Lines, positions and contents that are read from ``raw``, and the number of lines."""
    found: list[tuple[int, int, str]] = []
    lines = 0
    for batch in read_jsonl(
        io.BytesIO(raw),
        offset=offset,
        stop=stop,
        json_key="text",
        max_document_bytes=limit,
        batch_bytes=block,
    ):
        found += zip(batch.line_numbers, batch.positions, batch.texts, strict=True)
        found += [(bad.line, bad.position, "bad") for bad in batch.rejected]
        # Positions of empty documents are not recorded.
        found += [(line, -1, "") for line in batch.empty_lines]
        lines += batch.lines
    return sorted(found), lines


def by_ranges(raw: bytes, unit_bytes: int, limit: int, block: int) -> Found:
    """Read as workers read the ranges of a plain file."""
    every: Found = []
    first_line = 0
    for part in range(-(-len(raw) // unit_bytes)):
        offset = seek_line(io.BytesIO(raw), part * unit_bytes)
        stop = (part + 1) * unit_bytes
        found, lines = read_part(raw[offset:], offset, stop, limit=limit, block=block)
        every += [(part, first_line + line, place, content) for line, place, content in found]
        first_line += lines
    return every


def by_units(file: InputFile, unit_bytes: int, limit: int) -> Found:
    """Read as a worker reads the units of a stream."""
    every: Found = []
    first_line = 0
    for number, unit in enumerate(units(file, unit_bytes, limit)):
        assert (unit.part, unit.first_line) == (number, first_line)
        found, lines = read_part(unit.data, unit.offset, None, limit=limit)
        found += [(bad.line, bad.position, "bad") for bad in unit.rejected]
        every += [(unit.part, first_line + line, place, content) for line, place, content in found]
        assert unit.lines == lines + len(unit.rejected)
        first_line += unit.lines
    return every
