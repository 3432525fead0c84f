from __future__ import annotations

import json
import math
import struct
from pathlib import Path

import numpy as np
import pytest

from megatron_mup.data.checks import check_training_data
from megatron_mup.data.preprocess import PreprocessOptions, preprocess
from megatron_mup.data.shards import inspect_shard, open_shard, unigram_entropy
from megatron_mup.data.tokenizer import Tokenizer
from megatron_mup.errors import DataError
from tests.configurations import tiny


def write_shard(
    prefix: Path, documents: list[list[int]], *, dtype: str = "uint16", code: int = 8
) -> Path:
    """Write a shard by the format's definition, as Megatron does it: without a manifest."""
    ids = [token for document in documents for token in document]
    lengths = [len(document) for document in documents]
    size = np.dtype(dtype).itemsize
    pointers = [size * sum(lengths[:number]) for number in range(len(lengths))]
    count = len(documents)
    Path(f"{prefix}.bin").write_bytes(np.array(ids, dtype=dtype).tobytes())
    Path(f"{prefix}.idx").write_bytes(
        b"MMIDIDX\0\0"
        + struct.pack("<QBQQ", 1, code, count, count + 1)
        + struct.pack(f"<{count}i", *lengths)
        + struct.pack(f"<{count}q", *pointers)
        + struct.pack(f"<{count + 1}q", *range(count + 1))
    )
    return prefix


def patch(path: Path, offset: int, raw: bytes) -> None:
    content = bytearray(path.read_bytes())
    content[offset : offset + len(raw)] = raw
    path.write_bytes(content)


@pytest.fixture
def shard(tmp_path: Path) -> Path:
    return write_shard(tmp_path / "s", [[5, 6, 7], [9, 2]])


@pytest.fixture
def own_shard(tmp_path: Path, tokenizer: Tokenizer) -> Path:
    (tmp_path / "a.txt").write_text("def f():\n    return 1\n")
    options = PreprocessOptions(valid_fraction=0.0)
    preprocess([tmp_path / "a.txt"], tmp_path / "own", tokenizer=tokenizer, options=options)
    return tmp_path / "own"


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
    with pytest.raises(DataError, match=r"own\.json: describes .* its \.idx 3 of uint16"):
        open_shard(own_shard)


@pytest.mark.parametrize(
    "change",
    [
        lambda record: record | {"format_version": 2},
        lambda record: record | {"unknown": 1},
        lambda record: record | {"tokens": "5"},
        lambda record: {key: record[key] for key in record if key != "eod"},
        lambda record: [record],
    ],
)
def test_a_damaged_manifest_is_refused(own_shard: Path, change: object) -> None:
    assert callable(change)
    path = Path(f"{own_shard}.json")
    path.write_text(json.dumps(change(json.loads(path.read_text()))))
    with pytest.raises(DataError, match=r"own\.json: not a shard's manifest"):
        open_shard(own_shard)


def test_inspection_reads_lengths_ids_and_a_sample(tmp_path: Path, tokenizer: Tokenizer) -> None:
    hello = tokenizer.encode("hello")
    prefix = write_shard(tmp_path / "s", [[*hello, 2], [3] * 100])
    summary = inspect_shard(prefix, tokenizer=tokenizer)
    assert summary.sample == "hello"
    assert (summary.documents, summary.tokens) == (2, len(hello) + 101)
    assert (summary.min_document_tokens, summary.max_document_tokens) == (len(hello) + 1, 100)
    assert summary.mean_document_tokens == (len(hello) + 101) / 2
    assert summary.largest_token_id == max(hello)
    assert summary.manifest_matches is None
    assert inspect_shard(prefix).sample is None


def test_inspection_checks_the_digest(own_shard: Path) -> None:
    assert inspect_shard(own_shard).manifest_matches is True
    patch(Path(f"{own_shard}.bin"), 0, b"\x05\x00")
    assert inspect_shard(own_shard).manifest_matches is False


def test_inspection_refuses_another_tokenizer(own_shard: Path, tokenizer: Tokenizer) -> None:
    path = Path(f"{own_shard}.json")
    path.write_text(path.read_text().replace(tokenizer.sha256, "0" * 64))
    with pytest.raises(DataError, match=r"made with the tokenizer 000000000000\.\.\., not with"):
        inspect_shard(own_shard, tokenizer=tokenizer)


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
    assert inspect_shard(valid).largest_token_id == 4


def test_the_unigram_entropy_refuses_shards_of_different_tokenizers(
    own_shard: Path, tokenizer: Tokenizer
) -> None:
    other = own_shard.with_name("other")
    for suffix in (".bin", ".idx", ".json"):
        Path(f"{other}{suffix}").write_bytes(Path(f"{own_shard}{suffix}").read_bytes())
    assert unigram_entropy(own_shard, other, 512) > 0
    path = Path(f"{other}.json")
    path.write_text(path.read_text().replace(tokenizer.sha256, "0" * 64))
    with pytest.raises(DataError, match="different tokenizers"):
        unigram_entropy(own_shard, other, 512)
