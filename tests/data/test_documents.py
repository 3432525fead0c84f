from __future__ import annotations

import gzip
import json
import lzma
from pathlib import Path

import pyarrow as pa
import pytest
import zstandard
from pyarrow import parquet as pq

from megatron_mup.data.documents import (
    Document,
    check_fraction,
    check_inputs,
    is_held_out,
    read_documents,
    read_text,
    splits_of,
)
from megatron_mup.data.inputs import find_inputs
from megatron_mup.errors import DataError


def test_a_text_file_is_one_document_with_its_line_endings_kept(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"one\r\n\n  two\xc3\xa9\n")
    assert list(read_documents([path])) == [Document(str(path), "one\r\n\n  two\u00e9\n")]


def test_json_lines_give_a_document_a_line_and_skip_blank_lines(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "x\\ny"}\n\n{"id": 1, "text": ""}\n{"text": "\xe2\x80\xa8"}')
    names_and_texts = [(document.name, document.text) for document in read_documents([path])]
    assert names_and_texts == [(f"{path}:1", "x\ny"), (f"{path}:3", ""), (f"{path}:4", "\u2028")]


def test_files_are_read_in_the_given_order_with_the_given_key(tmp_path: Path) -> None:
    first, second = tmp_path / "b.json", tmp_path / "a.md"
    first.write_text('{"content": "1"}\n')
    second.write_text("2")
    texts = [document.text for document in read_documents([first, second], json_key="content")]
    assert texts == ["1", "2"]


def test_a_document_is_read_before_a_later_line_is_looked_at(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "fine"}\nbroken\n')
    assert next(read_documents([path])).text == "fine"


def test_invalid_utf8_names_file_and_byte_offset(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"abc\xffd")
    with pytest.raises(DataError, match=r"a\.txt: invalid UTF-8 at byte offset 3 \(byte 0xff\)"):
        list(read_documents([path]))


def test_invalid_utf8_in_json_lines_counts_from_the_start_of_the_file(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "a"}\n{"text": "\xfe"}\n')
    with pytest.raises(DataError, match="byte offset 24 "):
        list(read_documents([path]))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": "x"', r"a\.jsonl:2: broken JSON .*one JSON object"),
        ("[" * 100_000, r"a\.jsonl:2: broken JSON"),
        ('["x"]', r"a\.jsonl:2: expected a JSON object, found list"),
        ('{"body": "x"}', r"a\.jsonl:2: no key 'text' \(keys: body\); pass --json-key"),
        ('{"text": 3}', r"a\.jsonl:2: 'text' is int, not a string"),
        ('{"text": "\\ud800"}', r"a\.jsonl:2: 'text' holds a lone surrogate"),
    ],
)
def test_a_bad_json_line_is_named_by_file_and_line(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "fine"}\n' + line + "\n")
    with pytest.raises(DataError, match=message):
        list(read_documents([path]))


def test_unreadable_inputs_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no input file; pass --input"):
        check_inputs([])
    with pytest.raises(DataError, match=r"cannot read input .*missing\.txt: No such file"):
        check_inputs([tmp_path / "missing.txt"])
    with pytest.raises(DataError, match="is a folder without files to read"):
        check_inputs([tmp_path])


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst", ".xz"])
def test_every_format_and_compression_gives_the_same_documents(tmp_path: Path, suffix: str) -> None:
    pack = {
        "": bytes,
        ".gz": gzip.compress,
        ".zst": zstandard.compress,
        ".xz": lzma.compress,
    }[suffix]
    texts = ["one\r\n", "", "zw\u00f6lf \U0001f600\0"]
    lines = "".join(json.dumps({"text": text}) + "\n\n" for text in texts).encode()
    (tmp_path / f"a.jsonl{suffix}").write_bytes(pack(lines))
    for number, text in enumerate(texts):
        (tmp_path / f"b{number}.txt{suffix}").write_bytes(pack(text.encode()))
    pq.write_table(pa.table({"text": texts}), tmp_path / "c.parquet", row_group_size=2)
    found = [(Path(d.name).name, d.text) for d in read_documents([tmp_path])]
    assert found == [
        *((f"a.jsonl{suffix}:{2 * n + 1}", text) for n, text in enumerate(texts)),
        *((f"b{n}.txt{suffix}", text) for n, text in enumerate(texts)),
        *((f"c.parquet:{n + 1}", text) for n, text in enumerate(texts)),
    ]


def test_line_numbers_go_on_from_unit_to_unit(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl.gz"
    line = json.dumps({"text": "x" * 1_000_000})
    path.write_bytes(gzip.compress(f"{line}\n".encode() * 9 + b'{"text": 1}', 1))
    with pytest.raises(DataError, match=r"a\.jsonl\.gz:10: 'text' is int, .* offset 9000117\)$"):
        list(read_documents([path]))


def test_a_damaged_archive_is_an_error_after_its_last_whole_line(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress(b'{"text": "a"}\n{"text": ')[:-4])
    documents = read_documents([path])
    assert next(documents).text == "a"
    with pytest.raises(DataError, match=r"a\.jsonl\.gz:2: damaged .*cut short.*; copy or make"):
        next(documents)


def test_a_bad_text_file_is_rejected_as_a_whole(tmp_path: Path) -> None:
    path = tmp_path / "a.txt.gz"
    path.write_bytes(gzip.compress(b"x" * 11))
    [file] = find_inputs([path])
    assert read_text(file, max_document_bytes=11).texts == ["x" * 11]
    batch = read_text(file, max_document_bytes=10)
    assert (batch.texts, batch.lines) == ([], 1)
    assert [str(bad.reason) for bad in batch.rejected] == ["too_large"]
    path.write_bytes(gzip.compress(b"x" * 11)[:-1])
    assert read_text(file, max_document_bytes=11).rejected[0].reason == "damaged"
    path.write_bytes(gzip.compress(b"x" * 11))
    with pytest.raises(DataError, match=r"a\.txt\.gz: more than the limit of 10 bytes; raise --m"):
        list(read_documents([file], max_document_bytes=10))


def test_a_bad_row_names_file_and_row(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"body": ["a", "b", None]}), path, row_group_size=2)
    with pytest.raises(DataError, match=r"a\.parquet:3: 'body' is null, .*; mend the row"):
        list(read_documents([path], json_key="body"))


def test_splits_are_ranges_of_the_digest() -> None:
    # 0x40 is a quarter of the range of the first byte.
    digests = [bytes([first]) + bytes(31) for first in (0x00, 0x3F, 0x40, 0x7F, 0x80, 0xFF)]
    splits = splits_of(digests, valid_fraction=0.25, test_fraction=0.25).tolist()
    assert splits == [1, 1, 2, 2, 0, 0]
    assert set(splits_of(digests, valid_fraction=0, test_fraction=0).tolist()) == {0}


def test_the_split_depends_on_the_text_alone() -> None:
    # SHA-256 of "hello" begins 2cf2 (0.1756 of the range), of "abc" ba78 (0.7284).
    assert [is_held_out("hello", fraction) for fraction in (0.17, 0.18)] == [False, True]
    assert [is_held_out("abc", fraction) for fraction in (0.72, 0.73)] == [False, True]
    assert not is_held_out("hello", 0.0)


@pytest.mark.parametrize("fraction", [-0.1, 1.0, float("nan")])
def test_a_held_out_share_outside_its_range_is_refused(fraction: float) -> None:
    with pytest.raises(DataError, match=r"--valid-fraction is .*from 0 to below 1"):
        check_fraction(fraction, "--valid-fraction")
