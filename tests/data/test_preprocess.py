from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_mup.data import preprocess as preprocess_module
from megatron_mup.data.documents import is_held_out
from megatron_mup.data.preprocess import PreprocessOptions, index_bytes, preprocess, token_dtype
from megatron_mup.data.tokenizer import Tokenizer
from megatron_mup.errors import DataError

ONE_SHARD = PreprocessOptions(valid_fraction=0.0, overwrite=True)


def write_jsonl(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), "utf-8")
    return path


def megatron_documents(upstream: ModuleType, prefix: Path) -> list[list[int]]:
    dataset = upstream.IndexedDataset(str(prefix))
    assert dataset.document_indices.tolist() == list(range(len(dataset) + 1))
    return [dataset[number].tolist() for number in range(len(dataset))]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@settings(max_examples=40, deadline=None)
@given(texts=st.lists(st.text(min_size=1), min_size=1, max_size=5))
def test_megatron_reads_back_every_document_in_order(
    tokenizer: Tokenizer,
    upstream: ModuleType,
    tmp_path_factory: pytest.TempPathFactory,
    texts: list[str],
) -> None:
    folder = tmp_path_factory.mktemp("shard")
    path = write_jsonl(folder / "a.jsonl", texts)
    preprocess([path], folder / "s", tokenizer=tokenizer, options=ONE_SHARD)
    documents = megatron_documents(upstream, folder / "s")
    assert [document[-1] for document in documents] == [2] * len(texts)
    assert [tokenizer.decode(document[:-1]) for document in documents] == texts


@pytest.mark.parametrize("vocab_size", [65499, 65500])
def test_files_equal_those_of_megatrons_builder(
    tmp_path: Path, upstream: ModuleType, vocab_size: int
) -> None:
    dtype = upstream.DType.optimal_dtype(vocab_size)
    assert token_dtype(vocab_size) == dtype.__name__
    documents = [[1, 2, 3], [vocab_size - 1], [5, 6]]
    builder = upstream.IndexedDatasetBuilder(str(tmp_path / "m.bin"), dtype=dtype)
    for document in documents:
        builder.add_document(np.array(document), [len(document)])
    builder.finalize(str(tmp_path / "m.idx"))
    assert index_bytes([3, 1, 2], np.dtype(dtype)) == (tmp_path / "m.idx").read_bytes()


def test_a_whole_shard_equals_that_of_megatrons_builder(
    tmp_path: Path, tokenizer: Tokenizer, upstream: ModuleType, jsonl: Path
) -> None:
    builder = upstream.IndexedDatasetBuilder(str(tmp_path / "m.bin"), dtype=np.uint16)
    for line in jsonl.read_text("utf-8").splitlines():
        ids = [*tokenizer.encode(json.loads(line)["text"]), 2]
        builder.add_document(np.array(ids), [len(ids)])
    builder.finalize(str(tmp_path / "m.idx"))
    preprocess([jsonl], tmp_path / "s", tokenizer=tokenizer, options=ONE_SHARD)
    assert (tmp_path / "s.bin").read_bytes() == (tmp_path / "m.bin").read_bytes()
    assert (tmp_path / "s.idx").read_bytes() == (tmp_path / "m.idx").read_bytes()


def test_the_split_goes_by_hash_and_loses_nothing(
    tmp_path: Path, tokenizer: Tokenizer, upstream: ModuleType, jsonl: Path
) -> None:
    options = PreprocessOptions(valid_fraction=0.2)
    manifests = preprocess([jsonl], tmp_path / "s", tokenizer=tokenizer, options=options)
    assert list(manifests) == [tmp_path / "s_train", tmp_path / "s_valid"]
    texts = [json.loads(line)["text"] for line in jsonl.read_text("utf-8").splitlines()]
    for prefix, held_out in ((tmp_path / "s_train", False), (tmp_path / "s_valid", True)):
        decoded = [tokenizer.decode(ids) for ids in megatron_documents(upstream, prefix)]
        assert decoded == [text for text in texts if is_held_out(text, 0.2) is held_out]
    assert 0.1 < manifests[tmp_path / "s_valid"].documents / len(texts) < 0.3


def test_the_manifest_describes_the_shard(tmp_path: Path, tokenizer: Tokenizer) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", ["", "\n\n\n", "\n\u00e9"])
    preprocess([path], tmp_path / "s", tokenizer=tokenizer, options=ONE_SHARD)
    raw = (tmp_path / "s.bin").read_bytes()
    largest = max(tokenizer.encode("\u00e9"))
    assert json.loads((tmp_path / "s.json").read_text()) == {
        "format_version": 1,
        "documents": 2,
        "skipped_empty_documents": 1,
        "tokens": len(raw) // 2,
        "text_bytes": 6,
        "largest_token_id": largest,
        "dtype": "uint16",
        "bin_bytes": len(raw),
        "bin_sha256": hashlib.sha256(raw).hexdigest(),
        "tokenizer_sha256": tokenizer.sha256,
        "vocab_size": 512,
        "eod": 2,
        "append_eod": True,
        "inputs": [str(path)],
    }


def test_the_end_of_document_can_be_left_out(
    tmp_path: Path, tokenizer: Tokenizer, upstream: ModuleType
) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", ["\n", "\n\n"])
    options = PreprocessOptions(valid_fraction=0.0, append_eod=False)
    preprocess([path], tmp_path / "s", tokenizer=tokenizer, options=options)
    assert megatron_documents(upstream, tmp_path / "s") == [[3], [3, 3]]


def test_output_does_not_depend_on_the_number_of_workers(
    tmp_path: Path, tokenizer: Tokenizer, jsonl: Path
) -> None:
    for workers in (1, 3):
        preprocess(
            [jsonl],
            tmp_path / str(workers) / "s",
            tokenizer=tokenizer,
            options=PreprocessOptions(workers=workers),
        )
    assert contents(tmp_path / "1") == contents(tmp_path / "3")
    assert len(contents(tmp_path / "1")) == 6


def test_batches_are_read_only_as_they_are_needed(
    tokenizer: Tokenizer,
) -> None:
    read: list[int] = []

    def batches() -> Iterator[list[str]]:
        for number in range(100):
            read.append(number)
            yield [f"text {number}"]

    encoded = preprocess_module._encoded(batches(), tokenizer, 2)
    texts, ids = next(encoded)
    assert (texts, ids[0].tolist()) == (["text 0"], tokenizer.encode("text 0"))
    assert len(read) == 4
    encoded.close()


@pytest.mark.parametrize("workers", [1, 2])
def test_a_failure_in_the_middle_leaves_nothing_under_any_name(
    tmp_path: Path, tokenizer: Tokenizer, workers: int
) -> None:
    path = tmp_path / "a.jsonl"
    lines = [json.dumps({"text": f"document {number}"}) for number in range(300)]
    path.write_text("\n".join([*lines, "broken"]))
    options = PreprocessOptions(workers=workers)
    with pytest.raises(DataError, match=r"a\.jsonl:301: broken JSON"):
        preprocess([path], tmp_path / "out/s", tokenizer=tokenizer, options=options)
    assert contents(tmp_path / "out") == {}


def test_a_failed_run_keeps_the_shards_it_would_have_replaced(
    tmp_path: Path, tokenizer: Tokenizer
) -> None:
    good = write_jsonl(tmp_path / "a.jsonl", ["good"])
    preprocess([good], tmp_path / "out/s", tokenizer=tokenizer, options=ONE_SHARD)
    before = contents(tmp_path / "out")
    (tmp_path / "b.txt").write_bytes(b"\xff")
    with pytest.raises(DataError, match="invalid UTF-8"):
        preprocess(
            [good, tmp_path / "b.txt"], tmp_path / "out/s", tokenizer=tokenizer, options=ONE_SHARD
        )
    assert contents(tmp_path / "out") == before


def test_a_failed_publication_leaves_no_index(
    tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", ["first"])
    preprocess([path], tmp_path / "out/s", tokenizer=tokenizer, options=ONE_SHARD)
    replace = os.replace

    def full_disk(source: Path, target: Path) -> None:
        if target.suffix == ".json":
            raise OSError(28, "No space left on device")
        replace(source, target)

    monkeypatch.setattr(os, "replace", full_disk)
    write_jsonl(path, ["second, longer"])
    with pytest.raises(DataError, match=r"cannot write .*s: .*No space left on device; free space"):
        preprocess([path], tmp_path / "out/s", tokenizer=tokenizer, options=ONE_SHARD)
    assert sorted(contents(tmp_path / "out")) == ["s.bin", "s.json"]


def test_the_index_is_published_last(
    tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[str] = []
    replace = os.replace

    def record(source: Path, target: Path) -> None:
        order.append(target.name)
        replace(source, target)

    monkeypatch.setattr(os, "replace", record)
    path = write_jsonl(tmp_path / "a.jsonl", ["hello", "abc"])
    options = PreprocessOptions(valid_fraction=0.2)
    preprocess([path], tmp_path / "s", tokenizer=tokenizer, options=options)
    assert order == [
        f"s_{split}.{end}" for split in ("train", "valid") for end in ("bin", "json", "idx")
    ]


def test_a_dead_worker_is_reported_and_nothing_published(
    tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    # os._exit ends the worker as a kill would; it is called with the batch as its exit status.
    monkeypatch.setattr(preprocess_module, "_encode_in_worker", os._exit)
    monkeypatch.setattr(preprocess_module, "_batches", lambda documents: iter([1, 1]))
    path = write_jsonl(tmp_path / "a.jsonl", ["text"])
    options = PreprocessOptions(workers=2, valid_fraction=0.0)
    with pytest.raises(DataError, match=r"process died .*; pass fewer --workers \(2 now\)"):
        preprocess([path], tmp_path / "out/s", tokenizer=tokenizer, options=options)
    assert contents(tmp_path / "out") == {}


@pytest.mark.parametrize(
    ("texts", "fraction", "message"),
    [
        ([], 0.0, r"no document for .*s: .*\(0 were empty\)"),
        (["", ""], 0.0, r"no document for .*s: .*\(2 were empty\)"),
        (["abc"], 0.2, r"no document for .*s_valid: .*--valid-fraction 0"),
        (["hello"], 0.2, r"no document for .*s_train: "),
    ],
)
def test_a_split_without_documents_is_refused(
    tmp_path: Path, tokenizer: Tokenizer, texts: list[str], fraction: float, message: str
) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", texts)
    options = PreprocessOptions(valid_fraction=fraction)
    with pytest.raises(DataError, match=message):
        preprocess([path], tmp_path / "out/s", tokenizer=tokenizer, options=options)
    assert contents(tmp_path / "out") == {}


def test_existing_shards_are_kept_without_overwrite(tmp_path: Path, tokenizer: Tokenizer) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", ["x"])
    (tmp_path / "s.idx").touch()
    options = PreprocessOptions(valid_fraction=0.0)
    with pytest.raises(DataError, match=r"output exists: .*s\.idx; pass --overwrite"):
        preprocess([path], tmp_path / "s", tokenizer=tokenizer, options=options)


def test_options_outside_their_range_are_refused() -> None:
    with pytest.raises(DataError, match="--workers is 0"):
        PreprocessOptions(workers=0)
    with pytest.raises(DataError, match="--valid-fraction is 1"):
        PreprocessOptions(valid_fraction=1.0)
