"""Which tokens a sample holds: blends, rewritten shards, moved shards."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from megatron_mup import platform
from megatron_mup.data.datasets import Samples, build_datasets
from megatron_mup.errors import DataError
from tests.configurations import tiny

_SAMPLES = 30


def write_shard(prefix: Path, documents: list[list[int]]) -> str:
    """A shard as megatron-core writes it, without a manifest."""
    platform.prepare()
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    prefix.parent.mkdir(exist_ok=True)
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.uint16)
    for document in documents:
        builder.add_document(np.array(document, dtype=np.uint16), [len(document)])
    builder.finalize(f"{prefix}.idx")
    return str(prefix)


def numbered(count: int, length: int, *, first: int = 0) -> list[list[int]]:
    """Documents of consecutive ids below 96."""
    ids = [(first + number) % 96 for number in range(count * length)]
    return [ids[start : start + length] for start in range(0, len(ids), length)]


def build(prefix: str, *overrides: str) -> Samples:
    """The training samples of one shard at sequence length 16; the cache lies beside it."""
    run = tiny(f"train_data_path=[{prefix}]", *overrides)
    return build_datasets(run, train_samples=_SAMPLES, valid_samples=0)[0]


def tokens(samples: Samples) -> list[list[int]]:
    return [samples[index]["tokens"].tolist() for index in range(_SAMPLES)]


def test_a_sample_is_a_window_of_the_concatenated_documents(tmp_path: Path) -> None:
    samples = build(write_shard(tmp_path / "s", [list(range(96))] * 5))
    for index in range(_SAMPLES):
        sample = samples[index]
        # Every document counts from 0 to 95, so each token tells the next.
        first = int(sample["tokens"][0])
        assert sample["tokens"].tolist() == [(first + step) % 96 for step in range(16)]
        assert sample["labels"].tolist() == [(first + step) % 96 for step in range(1, 17)]
    # Windows of 16 cut these documents of 96 at their sixths.
    assert {sample[0] for sample in tokens(samples)} == {0, 16, 32, 48, 64, 80}


def test_a_shard_rewritten_under_its_name_is_read_anew(tmp_path: Path) -> None:
    prefix = write_shard(tmp_path / "s" / "text", numbered(40, 9))
    before = tokens(build(prefix))
    # Fewer and longer documents: the old index points to documents that are gone.
    write_shard(tmp_path / "s" / "text", numbered(12, 31, first=50))
    after = tokens(build(prefix))
    assert after != before
    fresh = write_shard(tmp_path / "fresh" / "text", numbered(12, 31, first=50))
    assert after == tokens(build(fresh))


def test_new_tokens_in_documents_of_the_old_lengths_are_read(tmp_path: Path) -> None:
    prefix = write_shard(tmp_path / "text", [[1] * 9] * 40)
    assert {token for sample in tokens(build(prefix)) for token in sample} == {1}
    write_shard(tmp_path / "text", [[2] * 9] * 40)
    assert {token for sample in tokens(build(prefix)) for token in sample} == {2}


def test_the_order_of_samples_depends_on_the_seed_and_not_on_the_folder(tmp_path: Path) -> None:
    here = write_shard(tmp_path / "here" / "text", numbered(40, 9))
    there = write_shard(tmp_path / "there" / "other_name", numbered(40, 9))
    order = tokens(build(here))
    assert tokens(build(there)) == order
    assert tokens(build(here, f"data_cache_path={tmp_path / 'cache'}")) == order
    assert tokens(build(there, "seed=4321")) != order


def test_an_unchanged_shard_is_indexed_once(tmp_path: Path) -> None:
    prefix = write_shard(tmp_path / "text", numbered(40, 9))
    for _ in range(2):
        build(prefix)
    (description,) = (tmp_path / "cache").glob("*description.txt")
    (content,) = json.loads(description.read_text())["tokenizer"]["contents"]
    assert content.startswith("idx:")
    assert content.endswith("bin:no manifest")


def test_held_out_samples_come_from_their_own_shard(tmp_path: Path) -> None:
    train = write_shard(tmp_path / "train", [[1] * 9] * 40)
    valid = write_shard(tmp_path / "valid", [[2] * 9] * 40)
    run = tiny(f"train_data_path=[{train}]", f"valid_data_path=[{valid}]")
    train_set, valid_set = build_datasets(run, train_samples=10, valid_samples=5)
    assert valid_set is not None
    assert set(train_set[0]["tokens"].tolist()) == {1}
    assert set(valid_set[0]["tokens"].tolist()) == {2}


def test_a_damaged_shard_is_refused_before_an_index_is_made(tmp_path: Path) -> None:
    prefix = write_shard(tmp_path / "text", numbered(40, 9))
    Path(f"{prefix}.bin").write_bytes(b"\0" * 10)
    with pytest.raises(DataError, match="expected 720 bytes"):
        build(prefix)
    assert not (tmp_path / "cache").exists()


def counted(samples: Samples, count: int) -> dict[int, int]:
    """How many samples consist of each token; documents of one shard hold one token."""
    seen: dict[int, int] = {}
    for index in range(count):
        (token,) = set(samples[index]["tokens"].tolist())
        seen[token] = seen.get(token, 0) + 1
    return seen


def write_set(prefix: Path, *counts: int) -> str:
    """A set whose shard number n holds so many documents of 32 times n + 1."""
    for number, count in enumerate(counts):
        name = f"{prefix.name}-{number:05d}-of-{len(counts):05d}"
        write_shard(prefix.with_name(name), [[number + 1] * 32] * count)
    return str(prefix)


def test_a_set_is_read_whole_and_a_remnant_that_fills_no_sequence_left_out(tmp_path: Path) -> None:
    prefix = write_set(tmp_path / "text", 10, 20, 5)
    write_shard(tmp_path / "text-00002-of-00003", [[3] * 16])
    run = tiny(f"train_data_path=[{prefix}]")
    samples, _ = build_datasets(run, train_samples=58, valid_samples=0)
    # 320 and 640 tokens make 19 and 39 sequences of 16 with a token behind each.
    assert counted(samples, 58) == {1: 19, 2: 39}


def test_the_weight_of_a_set_is_spread_over_its_tokens(tmp_path: Path) -> None:
    large = write_set(tmp_path / "large", 10, 30)
    small = write_shard(tmp_path / "small", [[9] * 32] * 10)
    run = tiny(f"train_data_path=[0.8,{large},0.2,{small}]")
    samples, _ = build_datasets(run, train_samples=100, valid_samples=0)
    assert counted(samples, 100) == {1: 20, 2: 60, 9: 20}


def test_a_blend_file_gives_the_samples_of_the_options(tmp_path: Path) -> None:
    train = write_set(tmp_path / "train", 10, 30)
    valid = write_set(tmp_path / "valid", 5, 5)
    path = tmp_path / "blend.json"
    path.write_text(json.dumps({"train": ["1", train], "valid": [valid], "test": None}))
    by_file = tiny(f"per_split_data_args_path={path}")
    by_options = tiny(f"train_data_path=[1,{train}]", f"valid_data_path=[{valid}]")
    read = []
    for run in (by_file, by_options):
        train_set, valid_set = build_datasets(run, train_samples=_SAMPLES, valid_samples=8)
        assert valid_set is not None
        read.append((tokens(train_set), [valid_set[n]["tokens"].tolist() for n in range(8)]))
    assert read[0] == read[1]


def test_documents_of_all_shards_of_a_set_are_read_once_an_epoch(tmp_path: Path) -> None:
    documents = [[[3 + number] * 4 + [2]] for number in range(6)]
    for number, shard in enumerate(documents):
        write_shard(tmp_path / f"text-0000{number}-of-00006", shard)
    run = tiny(f"train_data_path=[{tmp_path / 'text'}]", "sample_layout=document")
    samples, _ = build_datasets(run, train_samples=12, valid_samples=0)
    for epoch in (range(6), range(6, 12)):
        firsts = sorted(int(samples[index]["labels"][0]) for index in epoch)
        assert firsts == [3, 4, 5, 6, 7, 8]
