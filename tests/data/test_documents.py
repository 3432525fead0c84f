from __future__ import annotations

from pathlib import Path

import pytest

from megatron_mup.data.documents import (
    Document,
    check_fraction,
    check_inputs,
    is_held_out,
    read_documents,
)
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
    with pytest.raises(DataError, match="is a folder"):
        check_inputs([tmp_path])


def test_the_split_depends_on_the_text_alone() -> None:
    # SHA-256 of "hello" begins 2cf2 (0.1756 of the range), of "abc" ba78 (0.7284).
    assert [is_held_out("hello", fraction) for fraction in (0.17, 0.18)] == [False, True]
    assert [is_held_out("abc", fraction) for fraction in (0.72, 0.73)] == [False, True]
    assert not is_held_out("hello", 0.0)


@pytest.mark.parametrize("fraction", [-0.1, 1.0, float("nan")])
def test_a_held_out_share_outside_its_range_is_refused(fraction: float) -> None:
    with pytest.raises(DataError, match=r"--valid-fraction is .*from 0 to below 1"):
        check_fraction(fraction, "--valid-fraction")
