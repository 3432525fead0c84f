from __future__ import annotations

import io
import json
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_mup.data.batches import BadReason, DocumentBatch, explain
from megatron_mup.data.json_lines import read_jsonl, seek_line


def read(raw: bytes, **changes: Any) -> list[DocumentBatch]:
    options = {"offset": 0, "stop": None, "json_key": "text", "max_document_bytes": 1000}
    return list(read_jsonl(io.BytesIO(raw), **(options | changes)))


def documents(batches: list[DocumentBatch]) -> list[tuple[int, int, str]]:
    return [
        document
        for batch in batches
        for document in zip(batch.line_numbers, batch.positions, batch.texts, strict=True)
    ]


def test_a_batch_tells_texts_places_and_empty_lines() -> None:
    raw = b'{"text": "a\\u0000"}\r\n\n \t\n{"text": ""}\n{"n": NaN, "text": "b\\ud83d\\ude00"}\n'
    [batch] = read(raw)
    assert documents([batch]) == [(0, 0, "a\0"), (4, 38, "b\U0001f600")]
    assert (batch.empty_lines, batch.empty, batch.rejected, batch.lines) == ([3], 1, [], 5)


def test_a_byte_order_mark_is_dropped_at_the_start_of_the_file_only() -> None:
    line = b'\xef\xbb\xbf{"text": "a"}\n'
    assert documents(read(line + b'{"text": "b"}\n')) == [(0, 0, "a"), (1, 17, "b")]
    [batch] = read(line, offset=17)
    assert [bad.reason for bad in batch.rejected] == [BadReason.BROKEN_JSON]


@pytest.mark.parametrize(
    ("line", "reason", "detail"),
    [
        (b'{"text": "\xfe"}', "invalid_utf8", "invalid UTF-8 at byte offset 24 (byte 0xfe)"),
        (b'{"text": "x"', "broken_json", "broken JSON (Expecting ',' delimiter"),
        (b'{"text": "a\tb"}', "broken_json", "broken JSON (Invalid control character"),
        (b"[" * 999, "broken_json", "broken JSON ("),
        (b'["x"]', "broken_json", "expected a JSON object, found list"),
        (b'"text"', "broken_json", "expected a JSON object, found str"),
        (b'{"body": 1, "a\\nb": 2}', "no_field", "no key 'text' (keys: body, a b)"),
        (b'{"' + b"k" * 99 + b'": 1}', "no_field", f"(keys: {'k' * 40}...)"),
        (b"{}", "no_field", "no key 'text' (keys: none)"),
        (b'{"text": 3}', "not_text", "'text' is int, not a string"),
        (b'{"text": null}', "not_text", "'text' is null, not a string"),
        (b'{"text": "\\ud800"}', "not_text", "'text' holds a lone surrogate escape"),
        (
            b'{"text": "' + b"x" * 989 + b'"}',
            "too_large",
            "1001 bytes, more than the limit of 1000",
        ),
    ],
)
def test_a_bad_line_is_rejected_with_its_place_and_its_neighbours_stay(
    line: bytes, reason: str, detail: str
) -> None:
    batches = read(b'{"text": "a"}\n' + line + b'\n{"text": "b"}\n')
    assert [text for _, _, text in documents(batches)] == ["a", "b"]
    [bad] = [bad for batch in batches for bad in batch.rejected]
    assert (bad.position, bad.line, bad.reason) == (14, 1, reason)
    assert detail in bad.detail
    assert len(bad.detail) < 150
    assert "\n" not in bad.detail


def test_a_line_as_long_as_the_limit_is_read() -> None:
    raw = b'{"text": "' + b"x" * 988 + b'"}'
    for block in (1, 7, 999, 1000, 1001, 4096):
        assert len(documents(read(raw + b"\n" + raw, batch_bytes=block))) == 2


@pytest.mark.parametrize("block", [1, 2, 3, 5, 8, 64, 4096])
def test_an_oversized_line_gives_its_length_wherever_blocks_end(block: int) -> None:
    raw = b'{"text": "a"}\n' + b"x" * 37 + b"\n" + b'{"text": "b"}\n' + b"y" * 20
    batches = read(raw, max_document_bytes=19, batch_bytes=block)
    assert documents(batches) == [(0, 0, "a"), (2, 52, "b")]
    bad = [(bad.position, bad.line, bad.detail) for batch in batches for bad in batch.rejected]
    assert bad == [
        (14, 1, "37 bytes, more than the limit of 19"),
        (66, 3, "20 bytes, more than the limit of 19"),
    ]
    assert sum(batch.lines for batch in batches) == 4


def test_lines_that_begin_at_stop_or_later_are_left() -> None:
    raw = b'{"text": "a"}\n{"text": "b"}\n{"text": "c"}\n'
    found = {stop: len(documents(read(raw, stop=stop))) for stop in (0, 1, 14, 15, 28, 29, 42)}
    assert found == {0: 0, 1: 1, 14: 1, 15: 2, 28: 2, 29: 3, 42: 3}


@pytest.mark.parametrize("padding", [0, 70_000])
def test_seeking_finds_the_first_line_that_begins_there_or_later(padding: int) -> None:
    raw = b"ab\n" + b"c" * padding + b"d\n\nef"
    starts = [0, 3, padding + 5, padding + 6]
    for offset in (*range(5), *range(padding + 3, padding + 12)):
        stream = io.BytesIO(raw)
        expected = next((start for start in starts if start >= offset), len(raw))
        assert seek_line(stream, offset) == expected == stream.tell()
    assert seek_line(io.BytesIO(b""), 5) == 0


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@given(
    text=st.text() | st.text(st.characters(categories=("Cs", "Lu"))),
    rest=st.dictionaries(st.text(), json_values, max_size=3),
    ascii_only=st.booleans(),
)
def test_any_json_gives_the_text_that_the_standard_parser_gives(
    text: str, rest: dict[str, Any], ascii_only: bool
) -> None:
    surrogate = any(0xD800 <= ord(character) <= 0xDFFF for character in text)
    raw = json.dumps(rest | {"text": text}, ensure_ascii=ascii_only)
    [batch] = read(raw.encode("utf-8", "surrogatepass"), max_document_bytes=1 << 20)
    expected = json.loads(raw)["text"]
    if any(0xD800 <= ord(character) <= 0xDFFF for character in expected):
        assert surrogate
        assert batch.rejected[0].reason in (BadReason.NOT_TEXT, BadReason.INVALID_UTF8)
    elif not batch.rejected:
        assert (batch.texts or [""]) == [expected]
    else:
        # Raw halves of pairs elsewhere in the line are no UTF-8.
        assert not ascii_only
        assert batch.rejected[0].reason is BadReason.INVALID_UTF8


@given(value=st.floats() | st.integers(-(10**40), 10**40), nesting=st.integers(0, 400))
def test_numbers_and_nesting_that_megatron_reads_are_read(value: float, nesting: int) -> None:
    inner = "[" * nesting + json.dumps(value) + "]" * nesting
    assert math.isnan(value) or json.loads(inner) is not None
    [batch] = read(f'{{"n": {inner}, "text": "x"}}'.encode(), max_document_bytes=1 << 20)
    assert batch.texts == ["x"]


def test_the_message_names_line_offset_and_cure() -> None:
    [batch] = read(b'{"text": "a"}\n{"body": "b"}\n')
    assert explain("a.jsonl", 2, batch.rejected[0], json_key="text") == (
        "a.jsonl:2: no key 'text' (keys: body); pass --json-key; --on-error skip leaves such "
        "documents out and counts them (the line begins at byte offset 14)"
    )
    [batch] = read(b"\xff\n")
    assert explain("a.jsonl", 1, batch.rejected[0], json_key="text", can_skip=False) == (
        "a.jsonl:1: invalid UTF-8 at byte offset 0 (byte 0xff); convert the file to UTF-8, e.g. "
        "with iconv"
    )
