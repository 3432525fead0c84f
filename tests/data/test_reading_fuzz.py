"""Readers on damaged, hostile and huge inputs: clear errors, bounded memory, never a crash."""

from __future__ import annotations

import functools
import gzip
import io
import json
import lzma
import subprocess
import sys
import tempfile
import tracemalloc
import zlib
from pathlib import Path

import pyarrow as pa
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import parquet

from megatron_mup.data.documents import read_documents
from megatron_mup.data.inputs import Compression, InputFile, InputFormat, find_inputs
from megatron_mup.data.streams import cut_stream
from megatron_mup.errors import DataError

TEXTS = [f"text {number} \u00e9" * (number % 7) for number in range(300)]
JSON = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS).encode()
SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".jsonl.xz", ".txt.gz", ".parquet")


@functools.cache
def good(suffix: str) -> bytes:
    """A whole file of the kind."""
    if suffix == ".parquet":
        sink = io.BytesIO()
        options = {"row_group_size": 100, "data_page_size": 500}
        parquet.write_table(pa.table({"text": TEXTS}), sink, **options)
        return sink.getvalue()
    packers = {
        ".gz": lambda raw: gzip.compress(raw, mtime=0),
        ".zst": zstandard.ZstdCompressor(write_checksum=True).compress,
        ".xz": lzma.compress,
    }
    pack = packers.get(suffix[-4:].lstrip("ltn"), packers.get(Path(suffix).suffix, bytes))
    return pack(JSON)


def input_file(path: Path, suffix: str) -> InputFile:
    formats = {".jsonl": InputFormat.JSONL, ".txt": InputFormat.TEXT}
    compressions = {".gz": Compression.GZIP, ".zst": Compression.ZSTD, ".xz": Compression.XZ}
    return InputFile(
        name=str(path),
        format=formats.get(f".{suffix.split('.')[1]}", InputFormat.PARQUET),
        compression=compressions.get(path.suffix, Compression.NONE),
        size_bytes=path.stat().st_size,
    )


def read_as(suffix: str, content: bytes) -> tuple[list[str], DataError | None]:
    """The texts before the first bad document, and what was said of it."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"a{suffix}"
        path.write_bytes(content)
        texts: list[str] = []
        try:
            for document in read_documents([input_file(path, suffix)]):
                texts.append(document.text)
        except DataError as error:
            return texts, error
    return texts, None


def expected_texts(suffix: str) -> list[str]:
    return [JSON.decode()] if ".txt" in suffix else TEXTS


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_whole_files_give_their_documents(suffix: str) -> None:
    assert read_as(suffix, good(suffix)) == (expected_texts(suffix), None)


@given(suffix=st.sampled_from(SUFFIXES), content=st.binary(max_size=300), data=st.data())
def test_random_bytes_give_text_or_a_clear_error(
    suffix: str, content: bytes, data: st.DataObject
) -> None:
    # With the beginning of a good file, decoders get further.
    head = good(suffix)[: data.draw(st.integers(0, 40))]
    _, error = read_as(suffix, head + content)
    assert error is None or "\n" not in str(error)


@given(suffix=st.sampled_from(SUFFIXES), share=st.floats(0, 1, exclude_max=True))
def test_a_truncated_file_gives_its_beginning_and_an_error(suffix: str, share: float) -> None:
    content = good(suffix)
    cut = int(len(content) * share)
    texts, error = read_as(suffix, content[:cut])
    assert texts == expected_texts(suffix)[: len(texts)]
    # Lines have no end mark: cut behind a whole one, with or without its newline, they are fine.
    fine = suffix == ".jsonl" and content[:cut].rstrip(b"\n") in whole_lines()
    assert (error is None) == fine


@functools.cache
def whole_lines() -> set[bytes]:
    ends = [place for place, byte in enumerate(JSON) if byte == 10]
    return {JSON[:end] for end in ends} | {b""}


@given(
    suffix=st.sampled_from(SUFFIXES), share=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7)
)
def test_a_flipped_bit_never_passes_through_a_checksum(suffix: str, share: float, bit: int) -> None:
    content = bytearray(good(suffix))
    content[int(len(content) * share)] ^= 1 << bit
    texts, error = read_as(suffix, bytes(content))
    if error is None and suffix not in (".jsonl", ".parquet"):
        # Bits that mean nothing: times and names in headers.
        assert texts == expected_texts(suffix)


LONG_LINE = """
import sys
from megatron_mup.data.documents import read_documents
from megatron_mup.data.inputs import find_inputs
from megatron_mup.data.json_lines import read_jsonl
from megatron_mup.data.streams import cut_stream
def peak_kib():
    # Not ru_maxrss, which a new program inherits from the one that started it.
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("VmHWM"))
[file] = find_inputs([sys.argv[1]])
before = peak_kib()
limit = 1 << 20
if file.compression == "none":
    with file.path.open("rb") as stream:
        batches = list(
            read_jsonl(stream, offset=0, stop=None, json_key="text", max_document_bytes=limit)
        )
    texts = [text for batch in batches for text in batch.texts]
    bad = [bad for batch in batches for bad in batch.rejected]
else:
    units = list(cut_stream(file, unit_bytes=16 << 20, max_document_bytes=limit))
    texts = [unit.data for unit in units if unit.data]
    bad = [bad for unit in units for bad in unit.rejected]
grown = peak_kib() - before
print(len(texts), [(b.position, b.line, str(b.reason), b.detail) for b in bad], grown)
"""


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
def test_a_line_of_300_megabytes_is_rejected_in_little_memory(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a.jsonl{suffix}"
    first, last = b'{"text": "a"}\n', b'\n{"text": "b"}\n'
    piece = b"x" * 10_000_000
    if suffix:
        pack = gzip.compress if suffix == ".gz" else zstandard.compress
        # Frames end to end are an archive of the whole.
        path.write_bytes(pack(first) + pack(piece) * 30 + pack(last))
    else:
        with path.open("wb") as stream:
            stream.write(first)
            for _ in range(30):
                stream.write(piece)
            stream.write(last)
    run = subprocess.run(
        [sys.executable, "-c", LONG_LINE, str(path)], capture_output=True, text=True, check=True
    )
    texts, rest = run.stdout.split(" ", 1)
    places, grown_kib = rest.rsplit(" ", 1)
    assert texts == "2"
    assert places == ("[(14, 1, 'too_large', '300000000 bytes, more than the limit of 1048576')]")
    # A unit of 16 MiB is held a few times while its last line is parted from it.
    assert int(grown_kib) < 100_000


@pytest.mark.parametrize("suffix", [".gz", ".zst", ".xz"])
def test_a_small_archive_of_very_much_text_is_read_in_pieces(tmp_path: Path, suffix: str) -> None:
    text = b"\n" * (64 << 20)
    packed = {
        ".gz": lambda: zlib.compress(text, 1, wbits=31),
        ".zst": lambda: zstandard.compress(text),
        ".xz": lambda: lzma.compress(text, preset=0),
    }[suffix]()
    path = tmp_path / f"a.jsonl{suffix}"
    path.write_bytes(packed)
    assert len(packed) < len(text) // 200
    [file] = find_inputs([path])
    tracemalloc.start()
    try:
        sizes = [
            (unit.offset, len(unit.data))
            for unit in cut_stream(file, unit_bytes=8 << 20, max_document_bytes=1 << 20)
        ]
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    # A unit in pieces and whole, the one before it, and what a decoder gives at once.
    assert peak < 50 << 20
    assert sizes == [(part * (8 << 20), 8 << 20) for part in range(8)]
