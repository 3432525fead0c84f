from __future__ import annotations

import math
import struct
from pathlib import Path

import numpy as np
import pytest

from megatron_mup.data.checks import check_training_data
from megatron_mup.data.shards import (
    open_shard,
    read_chunks,
    read_index,
    token_count,
    unigram_entropy,
)
from megatron_mup.errors import DataError
from tests.configurations import tiny
from tests.data.written_shards import patch, write_own_shard, write_shard


@pytest.fixture
def shard(tmp_path: Path) -> Path:
    return write_shard(tmp_path / "s", [[5, 6, 7], [9, 2]])


@pytest.fixture
def own_shard(tmp_path: Path) -> Path:
    return write_own_shard(tmp_path / "own", [[5, 6, 7, 2], [511, 2]])


@pytest.mark.parametrize(("dtype", "code"), [("uint16", 8), ("int32", 4), ("int64", 5)])
def test_a_whole_shard_made_elsewhere_opens(tmp_path: Path, dtype: str, code: int) -> None:
    prefix = write_shard(tmp_path / "s", [[5, 6, 7], [9, 2]], dtype=dtype, code=code)
    info = open_shard(prefix, vocab_size=10)
    assert (info.documents, info.tokens, info.dtype, info.manifest) == (2, 5, dtype, None)


def test_an_own_shard_opens_with_its_manifest(own_shard: Path) -> None:
    info = open_shard(own_shard, vocab_size=512)
    assert info.manifest is not None
    assert info.manifest.tokens == info.tokens
    assert info.manifest.vocab_size == 512


@pytest.mark.parametrize("use", ["sample_layout=document", "eod_mask_loss=true"])
def test_another_end_of_document_than_the_shards_is_refused_where_it_is_used(
    own_shard: Path, use: str
) -> None:
    # The tokenizer's end of document is 2.
    shard = [f"train_data_path=[{own_shard}]", "vocab_size=512", "seq_length=4"]
    check_training_data(tiny(*shard, use))
    check_training_data(tiny(*shard, "eod_token=1"))
    with pytest.raises(DataError, match=r"eod_token is 1, but .* end with 2; set data.eod_token=2"):
        check_training_data(tiny(*shard, use, "eod_token=1"))


@pytest.mark.parametrize("suffix", [".bin", ".idx"])
def test_a_missing_file_is_named(shard: Path, suffix: str) -> None:
    Path(f"{shard}{suffix}").unlink()
    with pytest.raises(DataError, match=rf"no file .*s\{suffix}; correct the shard's prefix"):
        open_shard(shard)


def test_a_prefix_with_a_suffix_is_explained(shard: Path) -> None:
    with pytest.raises(DataError, match=r"pass the prefix without \.bin"):
        open_shard(Path(f"{shard}.bin"))


@pytest.mark.parametrize("size", [0, 9, 11])
def test_a_bin_file_of_the_wrong_size_is_refused(shard: Path, size: int) -> None:
    Path(f"{shard}.bin").write_bytes(bytes(size))
    with pytest.raises(
        DataError,
        match=rf"s\.bin: expected 10 bytes \(5 tokens of uint16 by its \.idx\), found {size}; copy",
    ):
        open_shard(shard)


@pytest.mark.parametrize("size", [0, 20])
def test_an_index_without_a_whole_header_is_refused(shard: Path, size: int) -> None:
    path = Path(f"{shard}.idx")
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(DataError, match=f"expected 34 header bytes.* file of {size} bytes"):
        open_shard(shard)


def test_a_truncated_index_is_refused(shard: Path) -> None:
    path = Path(f"{shard}.idx")
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(DataError, match=r"s\.idx: expected 82 bytes \(2 sequences.*found 81"):
        open_shard(shard)


@pytest.mark.parametrize(
    ("offset", "raw", "message"),
    [
        (0, b"X", "not an index"),
        (9, b"\x02", "format version 2 and dtype code 8"),
        (17, b"\x07", "format version 1 and dtype code 7"),
        # A negative length that everything else agrees with.
        (34, struct.pack("<2i2q", -1, 6, 0, -2), "contradict each other"),
        (42, struct.pack("<q", 2), "contradict each other"),
        (50, struct.pack("<q", 8), "contradict each other"),
        (58, struct.pack("<q", 1), "contradict each other"),
        (66, struct.pack("<q", 3), "contradict each other"),
        (74, struct.pack("<q", 1), "contradict each other"),
    ],
)
def test_a_damaged_index_is_refused(shard: Path, offset: int, raw: bytes, message: str) -> None:
    patch(Path(f"{shard}.idx"), offset, raw)
    with pytest.raises(DataError, match=message):
        open_shard(shard)


@pytest.mark.parametrize("documents", [[], [[], []]])
def test_a_shard_without_tokens_is_refused(tmp_path: Path, documents: list[list[int]]) -> None:
    prefix = write_shard(tmp_path / "s", documents)
    with pytest.raises(DataError, match=r"s\.bin: the shard holds no token"):
        open_shard(prefix)


def test_an_id_beyond_the_vocabulary_is_refused(shard: Path) -> None:
    with pytest.raises(DataError, match="holds token id 9, the model's vocab_size is 9"):
        open_shard(shard, vocab_size=9)
    assert open_shard(shard).tokens == 5


def test_a_negative_id_is_refused(tmp_path: Path) -> None:
    prefix = write_shard(tmp_path / "s", [[1, -4]], dtype="int32", code=4)
    with pytest.raises(DataError, match="negative token id -4"):
        open_shard(prefix, vocab_size=9)


def test_the_manifest_tells_the_largest_id_of_an_own_shard(own_shard: Path) -> None:
    largest = int(np.fromfile(f"{own_shard}.bin", dtype="<u2").max())
    assert open_shard(own_shard, vocab_size=largest + 1).dtype == "uint16"
    with pytest.raises(DataError, match=f"holds token id {largest}, .* vocab_size is {largest}"):
        open_shard(own_shard, vocab_size=largest)


def test_a_manifest_of_another_run_is_refused(own_shard: Path, tmp_path: Path) -> None:
    write_shard(own_shard, [[1, 2, 3]])
    with pytest.raises(DataError, match=r"own\.json: describes 6 tokens .* its \.idx 3 of uint16"):
        open_shard(own_shard)


def test_a_manifest_of_as_many_tokens_in_other_documents_is_refused(own_shard: Path) -> None:
    write_shard(own_shard, [[5, 2], [6, 2], [7, 2]])
    with pytest.raises(DataError, match=r"in 2 documents, its \.idx 6 of uint16 in 3"):
        open_shard(own_shard)


def test_tokens_are_counted_by_the_size_of_the_file(shard: Path, tmp_path: Path) -> None:
    assert token_count(shard) == 5
    assert token_count(write_shard(tmp_path / "w", [[1, 2, 3]], dtype="int32", code=4)) == 3
    with pytest.raises(DataError, match=r"no file .*gone\.bin"):
        token_count(tmp_path / "gone")


def test_documents_have_the_tokens_of_all_their_sequences(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prefix = write_shard(tmp_path / "s", [[1], [2, 3], [], [4, 5, 6], [7]])
    # Documents of two, none and three sequences.
    raw = Path(f"{prefix}.idx").read_bytes()[: 34 + 12 * 5]
    header = b"MMIDIDX\0\0" + struct.pack("<QBQQ", 1, 8, 5, 4)
    Path(f"{prefix}.idx").write_bytes(header + raw[34:] + struct.pack("<4q", 0, 2, 2, 5))
    for size in (1, 2, 100):
        monkeypatch.setattr("megatron_mup.data.shards._CHUNK_SEQUENCES", size)
        parts = [part.tolist() for part in read_index(Path(f"{prefix}.idx")).document_tokens()]
        assert [length for part in parts for length in part] == [3, 0, 4]


def test_an_index_is_checked_over_the_ends_of_pieces(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("megatron_mup.data.shards._CHUNK_SEQUENCES", 2)
    prefix = write_shard(tmp_path / "s", [[1, 2], [3], [4], [5, 6], [7]])
    whole = Path(f"{prefix}.idx").read_bytes()
    assert open_shard(prefix).documents == 5
    pointers, boundaries = 34 + 4 * 5, 34 + 12 * 5
    for offset in [pointers + 8 * number for number in range(5)]:
        patch(f"{prefix}.idx", offset, b"\x63")
        with pytest.raises(DataError, match="contradict each other"):
            open_shard(prefix)
        Path(f"{prefix}.idx").write_bytes(whole)
    for number in (1, 2, 3, 4):
        patch(f"{prefix}.idx", boundaries + 8 * number, b"\x63")
        with pytest.raises(DataError, match="contradict each other"):
            open_shard(prefix)
        Path(f"{prefix}.idx").write_bytes(whole)


def test_the_output_prefix_of_a_job_is_explained(tmp_path: Path) -> None:
    (tmp_path / "all.manifest.json").touch()
    with pytest.raises(DataError, match=r"output prefix of a whole job; name one .*/all_train"):
        open_shard(tmp_path / "all")


def test_the_unigram_entropy_is_that_of_the_held_out_tokens(tmp_path: Path, shard: Path) -> None:
    # Shares 1/2, 1/4, 1/4: 1/2 ln 2 + 2 (1/4) ln 4 = 1.5 ln 2.
    valid = write_shard(tmp_path / "v", [[1, 1, 4], [2]])
    assert unigram_entropy(shard, valid, 10) == pytest.approx(1.5 * math.log(2), abs=1e-12)
    constant = write_shard(tmp_path / "c", [[3, 3, 3]])
    assert unigram_entropy(shard, constant, 10) == 0.0


def test_the_unigram_entropy_counts_over_all_chunks(
    tmp_path: Path, shard: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("megatron_mup.data.shards._CHUNK_TOKENS", 3)
    valid = write_shard(tmp_path / "v", [[1, 1, 4, 2, 1, 1, 4, 2]])
    assert unigram_entropy(shard, valid, 10) == pytest.approx(1.5 * math.log(2), abs=1e-12)
    assert [chunk.tolist() for chunk in read_chunks(valid, "uint16")] == [
        [1, 1, 4],
        [2, 1, 1],
        [4, 2],
    ]


def test_the_unigram_entropy_refuses_shards_of_different_tokenizers(own_shard: Path) -> None:
    other = write_own_shard(own_shard.with_name("other"), [[5, 6, 2]])
    assert unigram_entropy(own_shard, other, 512) > 0
    write_own_shard(other, [[5, 6, 2]], tokenizer_sha256="0" * 64)
    with pytest.raises(DataError, match="different tokenizers"):
        unigram_entropy(own_shard, other, 512)
