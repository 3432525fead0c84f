from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pyarrow import parquet

from megatron_mup.data.batches import BadReason, DocumentBatch, explain
from megatron_mup.data.inputs import InputFile, InputFormat, find_inputs
from megatron_mup.data.parquet import check_column, read_parquet, row_groups
from megatron_mup.data.streams import DamagedInput
from megatron_mup.errors import DataError

TEXTS = ["a", "", "caf\u00e9 \u2028", "x\0\r\ny"]


def made(folder: Path, columns: dict[str, Any], **options: Any) -> InputFile:
    path = folder / "a.parquet"
    parquet.write_table(pa.table(columns), path, **options)
    return find_inputs([path])[0]


def read(file: InputFile, group: int = 0, **changes: Any) -> list[DocumentBatch]:
    options = {"column": "text", "first_row": 0, "max_document_bytes": 1000}
    return list(read_parquet(file, group, **(options | changes)))


@pytest.mark.parametrize(
    "kind",
    [
        pa.string(),
        pa.large_string(),
        pa.string_view(),
        pa.binary(),
        pa.large_binary(),
        pa.binary_view(),
        pa.dictionary(pa.int32(), pa.string()),
    ],
    ids=str,
)
def test_strings_and_bytes_of_every_layout_are_read(tmp_path: Path, kind: pa.DataType) -> None:
    raw = [text.encode() for text in TEXTS]
    is_bytes = pa.types.is_binary(kind) or "binary" in str(kind)
    column = pa.array(raw if is_bytes else TEXTS).cast(kind)
    [batch] = read(made(tmp_path, {"id": [1, 2, 3, 4], "text": column}))
    assert batch.texts == [TEXTS[0], TEXTS[2], TEXTS[3]]
    assert (batch.positions, batch.line_numbers) == ([0, 2, 3], [0, 2, 3])
    assert (batch.empty_lines, batch.rejected, batch.lines) == ([1], [], 4)


@pytest.mark.parametrize("codec", ["none", "snappy", "gzip", "zstd", "lz4", "brotli"])
def test_rows_are_counted_through_the_file_and_batches_change_nothing(
    tmp_path: Path, codec: str
) -> None:
    texts = [f"document {number}" for number in range(25)]
    file = made(tmp_path, {"text": texts}, row_group_size=10, compression=codec)
    assert row_groups(file) == [10, 10, 5]
    for batch_rows in (1, 3, 256):
        batches = read(file, 1, first_row=10, batch_rows=batch_rows)
        assert [text for batch in batches for text in batch.texts] == texts[10:20]
        assert [place for batch in batches for place in batch.positions] == list(range(10, 20))
        assert [line for batch in batches for line in batch.line_numbers] == list(range(10))
        assert max(batch.lines for batch in batches) <= batch_rows


def test_large_rows_are_decoded_a_few_at_a_time(tmp_path: Path) -> None:
    file = made(tmp_path, {"text": [f"{n}" * (1 << 20) for n in range(10, 22)]})
    batches = read(file, max_document_bytes=16 << 20)
    assert [batch.lines for batch in batches] == [1] * 12 or max(b.lines for b in batches) <= 2
    assert sum(len(batch.texts) for batch in batches) == 12


def test_bad_rows_are_rejected_with_their_place(tmp_path: Path) -> None:
    values = pa.array([b"a", None, b"b\xffc", b"x" * 1001, b"d"], pa.binary())
    file = made(tmp_path, {"text": values.view(pa.string())})
    [batch] = read(file, first_row=100)
    assert batch.texts == ["a", "d"]
    assert batch.lines == 5
    assert [(bad.position, bad.line, bad.reason, bad.detail) for bad in batch.rejected] == [
        (101, 1, BadReason.NOT_TEXT, "'text' is null, not a string"),
        (102, 2, BadReason.INVALID_UTF8, "invalid UTF-8 at byte offset 1 (byte 0xff)"),
        (103, 3, BadReason.TOO_LARGE, "1001 bytes, more than the limit of 1000"),
    ]
    message = explain(
        "a.parquet", 102, batch.rejected[0], json_key="text", input_format=InputFormat.PARQUET
    )
    assert message.startswith("a.parquet:102: 'text' is null, not a string; mend the row")


def test_a_missing_or_unfit_column_is_refused_with_the_columns_found(tmp_path: Path) -> None:
    file = made(tmp_path, {"id": [1], "nested": [{"text": "a"}]})
    with pytest.raises(DataError, match=r"no column 'text' \(columns: id, nested\);.*--json-key"):
        check_column(file, column="text")
    with pytest.raises(DataError, match=r"no column 'nested\.text'"):
        read(file, column="nested.text")
    with pytest.raises(DataError, match=r"column 'id' holds int64, not text; .*\(columns: id"):
        read(file, column="id")
    with pytest.raises(DataError, match=r"column 'nested' holds struct.*not text"):
        check_column(file, column="nested")


def test_a_column_beside_nested_ones_is_found(tmp_path: Path) -> None:
    file = made(tmp_path, {"meta": [{"text": "no", "n": 1}], "text": ["yes"], "after": [2]})
    check_column(file, column="text")
    assert read(file)[0].texts == ["yes"]


def test_a_file_that_is_cut_short_is_damaged(tmp_path: Path) -> None:
    file = made(tmp_path, {"text": TEXTS})
    file.path.write_bytes(file.path.read_bytes()[:-5])
    with pytest.raises(DamagedInput, match=r"a\.parquet: damaged Parquet \(.*copy or make"):
        row_groups(file)
    with pytest.raises(DamagedInput, match="damaged Parquet"):
        read(file)


def test_rows_behind_corrupt_data_are_one_damaged_document(tmp_path: Path) -> None:
    # Hard to compress, so that the middle of the file is in the pages and not in their headers.
    texts = [
        hashlib.sha256(bytes([number % 256, number // 256])).hexdigest() for number in range(2000)
    ]
    options = {"compression": "gzip", "use_dictionary": False, "data_page_size": 8_000}
    file = made(tmp_path, {"text": texts}, write_batch_size=100, **options)
    content = bytearray(file.path.read_bytes())
    content[len(content) // 2 : len(content) // 2 + 200] = bytes(200)
    file.path.write_bytes(content)
    batches = read(file, first_row=7000, batch_rows=100)
    read_rows = sum(batch.lines for batch in batches[:-1])
    assert [text for batch in batches for text in batch.texts] == texts[:read_rows]
    assert 100 <= read_rows < 2000
    [bad] = batches[-1].rejected
    assert (bad.position, bad.line, bad.reason) == (7000 + read_rows, read_rows, "damaged")
    assert sum(batch.lines for batch in batches) == 2000


def test_a_file_that_is_gone_is_named(tmp_path: Path) -> None:
    file = made(tmp_path, {"text": TEXTS})
    file.path.unlink()
    with pytest.raises(DataError, match=r"cannot read input .*a\.parquet: No such file"):
        row_groups(file)
