from __future__ import annotations

import hashlib
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_mup.data import shard_writer
from megatron_mup.data.manifest import InputRange, read_shard_manifest
from megatron_mup.data.shard_writer import (
    IndexWriter,
    ShardTask,
    TokenizerFacts,
    finished_shard,
    token_dtype,
    write_shard,
)
from megatron_mup.data.unit_files import UnitKey
from megatron_mup.errors import DataError
from tests.data.corpora import INPUTS, Doc, contents, write_docs

FACTS = TokenizerFacts(sha256="7" * 64, vocab_size=1000, eod=2, append_eod=True)
UNITS = {
    UnitKey(0, 0): [Doc("one", (5, 2), position=0), Doc("two", (6, 7, 2), "valid", position=14)],
    UnitKey(0, 1): [],
    UnitKey(2, 0): [
        Doc("\u00e9", (999, 2), file=2),
        Doc("four", (), file=3),
        Doc("five", (8, 8, 8, 2), file=3, position=4),
        Doc("six", (9, 2), file=3, position=9),
    ],
}


def task_for(folder: Path, keys: list[UnitKey], **changes: Any) -> ShardTask:
    values: dict[str, Any] = {
        "split": 0,
        "first_row": 0,
        "stop_row": 3,
        "documents": 4,
        "tokens": 8,
        "tokenizer": FACTS,
    }
    (folder / "shards").mkdir(parents=True, exist_ok=True)
    return ShardTask(
        folder=folder / "shards",
        name="s",
        units=folder / "units",
        keys=tuple(keys),
        first_document=0,
        marks=None,
        inputs=tuple(INPUTS),
        first_input=0,
        **values | changes,
    )


@pytest.mark.parametrize("vocab_size", [65499, 65500])
@pytest.mark.parametrize("parts", [1, 2, 3])
def test_files_equal_those_of_megatrons_builder(
    tmp_path: Path, upstream: ModuleType, vocab_size: int, parts: int
) -> None:
    dtype = upstream.DType.optimal_dtype(vocab_size)
    assert token_dtype(vocab_size) == dtype.__name__
    documents = [[1, 2, 3], [vocab_size - 1], [], [5, 6]]
    builder = upstream.IndexedDatasetBuilder(str(tmp_path / "m.bin"), dtype=dtype)
    for document in documents:
        builder.add_document(np.array(document), [len(document)])
    builder.finalize(str(tmp_path / "m.idx"))
    with (tmp_path / "s.idx").open("wb") as stream:
        writer = IndexWriter(stream, 4, np.dtype(dtype))
        for part in np.array_split(np.array([3, 1, 0, 2], dtype=np.int32), parts):
            writer.add(part)
    assert (tmp_path / "s.idx").read_bytes() == (tmp_path / "m.idx").read_bytes()


def test_pointers_go_beyond_what_32_bits_hold(tmp_path: Path) -> None:
    with (tmp_path / "s.idx").open("wb") as stream:
        writer = IndexWriter(stream, 3, np.dtype("<i4"))
        writer.add(np.array([2**31 - 1, 2**31 - 1], dtype=np.int32))
        writer.add(np.array([1], dtype=np.int32))
    raw = (tmp_path / "s.idx").read_bytes()
    assert np.frombuffer(raw[34 + 12 : 34 + 36], "<i8").tolist() == [0, 8589934588, 17179869176]


def test_a_shard_holds_its_split_and_range_and_says_so(tmp_path: Path) -> None:
    keys = write_docs(tmp_path, UNITS)
    entry = write_shard(task_for(tmp_path, keys))
    files = contents(tmp_path / "shards")
    assert sorted(files) == ["s.bin", "s.idx", "s.json"]
    assert np.frombuffer(files["s.bin"], "<u2").tolist() == [5, 2, 999, 2, 8, 8, 8, 2]
    manifest = read_shard_manifest(tmp_path / "shards" / "s.json")
    assert json.loads(files["s.json"]) == {
        "format_version": 2,
        "documents": 4,
        "tokens": 8,
        "text_bytes": 13,
        "largest_token_id": 999,
        "dtype": "uint16",
        "bin_bytes": 16,
        "bin_sha256": hashlib.sha256(files["s.bin"]).hexdigest(),
        "idx_sha256": hashlib.sha256(files["s.idx"]).hexdigest(),
        "tokenizer_sha256": "7" * 64,
        "vocab_size": 1000,
        "eod": 2,
        "append_eod": True,
        "inputs": [
            {"file": "a.jsonl", "start": 0, "stop": 0, "documents": 1},
            {"file": "c.txt", "start": 0, "stop": 0, "documents": 1},
            {"file": "d.txt", "start": 0, "stop": 4, "documents": 2},
        ],
    }
    assert (entry.name, entry.documents, entry.tokens, entry.text_bytes) == ("s", 4, 8, 13)
    assert (entry.bin_sha256, entry.idx_sha256) == (manifest.bin_sha256, manifest.idx_sha256)


def test_a_range_within_one_unit_is_cut_at_both_ends(tmp_path: Path) -> None:
    write_docs(tmp_path, UNITS)
    write_shard(task_for(tmp_path, [UnitKey(2, 0)], first_row=2, stop_row=3, documents=1, tokens=4))
    assert np.fromfile(tmp_path / "shards" / "s.bin", "<u2").tolist() == [8, 8, 8, 2]


def test_documents_of_one_file_in_several_units_make_one_range(tmp_path: Path) -> None:
    units = {
        UnitKey(0, part): [Doc(f"{part}", (1, 2), position=10 * part)] * 2 for part in range(3)
    }
    keys = write_docs(tmp_path, units)
    write_shard(task_for(tmp_path, keys, stop_row=2, documents=6, tokens=12))
    manifest = read_shard_manifest(tmp_path / "shards" / "s.json")
    assert manifest.inputs == [InputRange(file="a.jsonl", start=0, stop=20, documents=6)]


@settings(max_examples=80, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 12), min_size=1, max_size=30),
    selection=st.lists(st.booleans(), min_size=30, max_size=30),
    window=st.sampled_from([1, 2, 5, 8, 1000]),
)
def test_documents_are_selected_whatever_the_window(
    tmp_path_factory: pytest.TempPathFactory,
    lengths: list[int],
    selection: list[bool],
    window: int,
) -> None:
    folder = tmp_path_factory.mktemp("units")
    docs = [
        Doc(
            f"{number}", tuple(range(10 * number, 10 * number + length)), ("valid", "train")[chosen]
        )
        for number, (length, chosen) in enumerate(zip(lengths, selection, strict=False))
    ]
    expected = [doc for doc in docs if doc.split == "train"]
    ids = [token for doc in expected for token in doc.ids]
    keys = write_docs(folder, {UnitKey(0, 0): docs})
    task = task_for(folder, keys, stop_row=len(docs), documents=len(expected), tokens=len(ids))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shard_writer, "_WINDOW_TOKENS", window)
        write_shard(task)
    assert np.fromfile(folder / "shards" / "s.bin", "<u2").tolist() == ids


def test_a_finished_shard_is_recognized_and_no_other(tmp_path: Path) -> None:
    keys = write_docs(tmp_path, UNITS)
    task = task_for(tmp_path, keys)
    assert finished_shard(task) is None
    entry = write_shard(task)
    assert finished_shard(task) == entry
    assert finished_shard(task_for(tmp_path, keys, documents=3)) is None
    assert finished_shard(task_for(tmp_path, keys, tokens=9)) is None
    (tmp_path / "shards" / "s.bin").write_bytes(b"short")
    assert finished_shard(task) is None
    write_shard(task)
    (tmp_path / "shards" / "s.json").write_text("{}")
    assert finished_shard(task) is None
    write_shard(task)
    (tmp_path / "shards" / "s.idx").unlink()
    assert finished_shard(task) is None


def test_units_that_changed_since_the_plan_are_refused(tmp_path: Path) -> None:
    keys = write_docs(tmp_path, UNITS)
    with pytest.raises(DataError, match=r"planned with 5 documents and 8 tokens, found 4 and 8"):
        write_shard(task_for(tmp_path, keys, documents=5))
    assert list((tmp_path / "shards").iterdir()) == []


@pytest.mark.parametrize("damaged", [0, 3, 13])
def test_ids_that_are_not_those_that_were_written_are_refused(tmp_path: Path, damaged: int) -> None:
    keys = write_docs(tmp_path, UNITS)
    path = tmp_path / "units" / "0000002-0000000.tokens"
    raw = bytearray(path.read_bytes())
    raw[damaged] ^= 1
    path.write_bytes(raw)
    with pytest.raises(DataError, match=r"0000002-0000000\.tokens: not the ids that were written"):
        write_shard(task_for(tmp_path, keys))
    assert list((tmp_path / "shards").iterdir()) == []


def test_a_disk_that_fails_is_named(tmp_path: Path) -> None:
    keys = write_docs(tmp_path, UNITS)
    task = task_for(tmp_path, keys)
    (tmp_path / "shards").rmdir()
    with pytest.raises(DataError, match=r"shards/.*No such file.*run the same command again"):
        write_shard(task)


def test_a_full_disk_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keys = write_docs(tmp_path, UNITS)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(IndexWriter, "add", full)
    with pytest.raises(DataError, match=r"shards/s: No space left on device; free space"):
        write_shard(task_for(tmp_path, keys))
    assert list((tmp_path / "shards").iterdir()) == []
