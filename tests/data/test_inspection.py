"""Inspection counts by independent arithmetic, draws by seed, and compares with manifests."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest

from megatron_mup.data.inspection import LengthBin, SplitSummary, inspect_prefix
from megatron_mup.data.tokenizer import Tokenizer
from megatron_mup.errors import DataError
from tests.data.written_shards import patch, write_job, write_own_shard, write_set, write_shard

# Lengths 1, 2, 3, 8 and 20.
DOCUMENTS = [[2], [9, 2], [5, 5, 2], [7] * 7 + [2], [500] * 19 + [2]]


def test_lengths_are_counted_by_powers_of_two(tmp_path: Path) -> None:
    found = inspect_prefix(write_shard(tmp_path / "s", DOCUMENTS))
    assert (found.shards, found.documents, found.tokens, found.dtype) == (1, 5, 34, "uint16")
    assert (found.min_document_tokens, found.max_document_tokens) == (1, 20)
    assert found.mean_document_tokens == 6.8
    assert found.largest_token_id == 500
    assert found.histogram == [
        LengthBin(shortest_tokens=1, longest_tokens=1, documents=1, tokens=1),
        LengthBin(shortest_tokens=2, longest_tokens=3, documents=2, tokens=5),
        LengthBin(shortest_tokens=4, longest_tokens=7, documents=0, tokens=0),
        LengthBin(shortest_tokens=8, longest_tokens=15, documents=1, tokens=8),
        LengthBin(shortest_tokens=16, longest_tokens=31, documents=1, tokens=20),
    ]
    assert (found.manifest_matches, found.text_bytes, found.job) == (None, None, None)
    assert found.samples == []


def test_an_empty_document_is_a_bin_of_its_own(tmp_path: Path) -> None:
    found = inspect_prefix(write_shard(tmp_path / "s", [[], [1]]))
    assert [length_bin.shortest_tokens for length_bin in found.histogram] == [0, 1]
    assert found.min_document_tokens == 0


@pytest.mark.parametrize("chunk", [1, 3, 100])
def test_the_sums_do_not_depend_on_the_pieces_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk: int
) -> None:
    prefix = write_set(tmp_path / "s", [DOCUMENTS, DOCUMENTS[:3]])
    monkeypatch.setattr("megatron_mup.data.shards._CHUNK_TOKENS", chunk)
    monkeypatch.setattr("megatron_mup.data.shards._CHUNK_SEQUENCES", chunk)
    found = inspect_prefix(prefix)
    assert (found.shards, found.documents, found.tokens) == (2, 8, 40)
    assert [length_bin.documents for length_bin in found.histogram] == [2, 4, 0, 1, 1]
    # Three bytes a token, as the manifests say.
    assert (found.text_bytes, found.manifest_matches) == (120, True)
    assert found.splits == [SplitSummary(name=str(prefix), shards=2, documents=8, tokens=40)]


def test_a_job_is_described_by_split(tmp_path: Path) -> None:
    prefix = write_job(tmp_path / "o", {"train": [DOCUMENTS, DOCUMENTS[:3]], "valid": [[[7, 2]]]})
    found = inspect_prefix(prefix)
    assert found.splits == [
        SplitSummary(name="train", shards=2, documents=8, tokens=40),
        SplitSummary(name="valid", shards=1, documents=1, tokens=2),
    ]
    assert found.job is not None
    assert (found.job.empty_documents, found.job.duplicate_documents) == (4, 5)
    assert (found.documents, found.tokens, found.manifest_matches) == (9, 42, True)


def test_altered_files_are_named(tmp_path: Path) -> None:
    prefix = write_set(tmp_path / "s", [DOCUMENTS, DOCUMENTS[:3]])
    patch(f"{prefix}-00001-of-00002.bin", 0, b"\x05\x00")
    write_own_shard(tmp_path / "s-00000-of-00002", DOCUMENTS, idx_sha256="c" * 64)
    found = inspect_prefix(prefix)
    assert found.manifest_matches is False
    assert found.altered_files == [f"{prefix}-00000-of-00002.idx", f"{prefix}-00001-of-00002.bin"]


def test_a_manifest_that_lies_about_the_largest_id_is_found(tmp_path: Path) -> None:
    prefix = write_own_shard(tmp_path / "s", DOCUMENTS, largest_token_id=499)
    assert inspect_prefix(prefix).altered_files == [f"{prefix}.bin"]


def test_samples_are_drawn_by_seed_without_repetition(tmp_path: Path, tokenizer: Tokenizer) -> None:
    words = [tokenizer.encode(f"word{number}") for number in range(30)]
    documents = [[*ids, tokenizer.eod] for ids in words]
    shards = [documents[:10], documents[10:]]
    prefix = write_set(tmp_path / "s", shards, tokenizer_sha256=tokenizer.sha256)
    first = [f"{prefix}-0000{number}-of-00002" for number in range(2)]

    def drawn(samples: int, seed: int) -> list[int]:
        found = inspect_prefix(prefix, tokenizer=tokenizer, samples=samples, seed=seed).samples
        numbers = [sample.document + 10 * first.index(sample.shard) for sample in found]
        assert [sample.text for sample in found] == [f"word{number}" for number in numbers]
        assert [sample.tokens for sample in found] == [len(documents[n]) for n in numbers]
        return numbers

    assert drawn(30, 0) == drawn(99, 0) == list(range(30))
    assert len(set(drawn(5, 1))) == 5
    assert drawn(5, 1) == drawn(5, 1) != drawn(5, 2)
    assert drawn(0, 0) == []


def test_a_sample_is_the_beginning_of_a_long_document_and_nothing_of_an_empty_one(
    tmp_path: Path, tokenizer: Tokenizer
) -> None:
    word = tokenizer.encode("a")
    prefix = write_shard(tmp_path / "s", [word * 100, []])
    long, empty = inspect_prefix(prefix, tokenizer=tokenizer, samples=2).samples
    assert (long.tokens, long.text) == (100 * len(word), tokenizer.decode((word * 100)[:64]))
    assert (empty.tokens, empty.text) == (0, "")
    # Without even an empty sequence, there is no pointer to where the last document begins.
    raw = Path(f"{write_shard(prefix, [word])}.idx").read_bytes()
    index = raw[:17] + struct.pack("<BQQ", 8, 1, 3) + raw[34:46] + struct.pack("<3q", 0, 1, 1)
    Path(f"{prefix}.idx").write_bytes(index)
    assert inspect_prefix(prefix, tokenizer=tokenizer, samples=2).samples[1].text == ""


def test_inspection_refuses_another_tokenizer(tmp_path: Path, tokenizer: Tokenizer) -> None:
    prefix = write_own_shard(tmp_path / "s", DOCUMENTS)
    with pytest.raises(DataError, match=r"made with the tokenizer aaaaaaaaaaaa\.\.\., not with"):
        inspect_prefix(prefix, tokenizer=tokenizer)


def test_another_tokenizer_is_named_rather_than_the_ids_that_it_lacks(
    tmp_path: Path, tokenizer: Tokenizer
) -> None:
    largest = tokenizer.vocab_size
    prefix = write_own_shard(tmp_path / "s", [[largest, 2]], vocab_size=largest + 1)
    with pytest.raises(DataError, match=r"made with the tokenizer aaaaaaaaaaaa\.\.\., not with"):
        inspect_prefix(prefix, tokenizer=tokenizer)
    # Without a manifest the ids are all there is to tell by.
    with pytest.raises(DataError, match=f"holds token id {largest}"):
        inspect_prefix(write_shard(tmp_path / "t", [[largest, 2]]), tokenizer=tokenizer)


def test_a_job_without_shards_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"o\.manifest\.json: names no shard"):
        inspect_prefix(write_job(tmp_path / "o", {}))
