"""Each kind of damage is found, named, and does not hide the state of other shards."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from megatron_mup.data.shards import read_index
from megatron_mup.data.verification import ShardReport, verify, verify_shard
from megatron_mup.errors import DataError
from tests.data.written_shards import (
    digest,
    patch,
    write_job,
    write_own_shard,
    write_set,
    write_shard,
)

DOCUMENTS = [[5, 6, 7, 2], [8, 2], [511, 9, 2], [2]]


def problems(reports: list[ShardReport]) -> list[str]:
    return [problem for report in reports for problem in report.problems]


def test_good_shards_are_counted(tmp_path: Path) -> None:
    prefix = write_set(tmp_path / "s", [DOCUMENTS, DOCUMENTS[:2]])
    seen: list[ShardReport] = []
    reports = verify([prefix], tokenizer_sha256="a" * 64, report=seen.append)
    assert [(report.documents, report.tokens) for report in reports] == [(4, 10), (2, 6)]
    assert (problems(reports), seen) == ([], reports)
    assert all(report.has_manifest for report in reports)


@pytest.mark.parametrize("size", [1, 3, 100])
def test_good_and_bad_documents_are_told_apart_at_any_piece(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    monkeypatch.setattr("megatron_mup.data.verification._PIECE_TOKENS", size)
    monkeypatch.setattr("megatron_mup.data.shards._CHUNK_SEQUENCES", size)
    assert verify_shard(write_own_shard(tmp_path / "good", DOCUMENTS)).problems == ()
    bad = [DOCUMENTS[0], [8, 3], *DOCUMENTS[2:], [2, 2, 4]]
    (problem,) = verify_shard(write_own_shard(tmp_path / "bad", bad)).problems
    assert "2 documents do not end with id 2, the first is number 1 from 0" in problem


def test_a_shard_made_elsewhere_is_read_and_said_to_have_no_manifest(tmp_path: Path) -> None:
    report = verify_shard(write_shard(tmp_path / "s", [[5, 6], [7]]))
    assert report == ShardReport(
        name=str(tmp_path / "s"), documents=2, tokens=3, has_manifest=False, problems=()
    )
    negative = write_shard(tmp_path / "n", [[5, -6]], dtype="int32", code=4)
    assert "holds the negative token id -6" in problems([verify_shard(negative)])[0]


def test_documents_without_an_end_are_right_where_none_was_appended(tmp_path: Path) -> None:
    shard = write_own_shard(tmp_path / "s", [[5, 6], [7, 8]], append_eod=False)
    assert verify_shard(shard).problems == ()


def test_an_empty_document_lacks_its_end(tmp_path: Path) -> None:
    prefix = write_own_shard(tmp_path / "s", [[5, 2], [6, 2]])
    record = json.loads(Path(f"{prefix}.json").read_text())
    write_shard(prefix, [[5, 2], [], [6, 2]])
    record |= {"documents": 3, "idx_sha256": digest(f"{prefix}.idx")}
    Path(f"{prefix}.json").write_text(json.dumps(record))
    (problem,) = verify_shard(prefix).problems
    assert "1 documents do not end with id 2, the first is number 1" in problem


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda p: patch(f"{p}.bin", 2, b"\x07"), r"s\.bin: is not the file that the manifest"),
        (lambda p: patch(f"{p}.bin", 2, b"\x00\x02"), "holds token id 512, the tokenizer has 512"),
        (lambda p: Path(f"{p}.bin").unlink(), r"no file .*s\.bin"),
        (lambda p: Path(f"{p}.idx").unlink(), r"no file .*s\.idx"),
        (lambda p: Path(f"{p}.bin").write_bytes(b"cut"), "expected 20 bytes"),
        (lambda p: patch(f"{p}.idx", 34, b"\x05"), "contradict each other"),
        (lambda p: Path(f"{p}.json").write_text("{}"), "not a shard's manifest"),
        (lambda p: write_own_shard(p, DOCUMENTS, idx_sha256="c" * 64), r"s\.idx: is not the file"),
        (lambda p: write_own_shard(p, DOCUMENTS, largest_token_id=9), "largest token id is 9"),
        (lambda p: write_own_shard(p, DOCUMENTS, tokens=9), "describes 9 tokens"),
    ],
)
def test_damage_is_named_and_other_shards_are_still_checked(
    tmp_path: Path, damage: Callable[[Path], object], words: str
) -> None:
    bad = write_own_shard(tmp_path / "s", DOCUMENTS)
    good = write_own_shard(tmp_path / "good", DOCUMENTS)
    damage(bad)
    first, second = verify([bad, good], tokenizer_sha256="a" * 64)
    with pytest.raises(DataError, match=words):
        raise DataError(" | ".join(first.problems))
    assert (second.name, second.problems) == (str(good), ())


def test_another_tokenizer_is_no_damage_and_said_before_anything_is_read(tmp_path: Path) -> None:
    good = write_own_shard(tmp_path / "good", DOCUMENTS)
    other = write_own_shard(tmp_path / "s", DOCUMENTS, tokenizer_sha256="c" * 64)
    foreign = write_shard(tmp_path / "f", DOCUMENTS)
    seen: list[ShardReport] = []
    words = r"1 of 3 shards .* \(SHA-256 aaaa.*, first \S+/s \(cccccccccccc\.\.\.\)"
    with pytest.raises(DataError, match=words):
        verify([good, other, foreign], tokenizer_sha256="a" * 64, report=seen.append)
    assert seen == []
    assert problems(verify([good, foreign], tokenizer_sha256="a" * 64)) == []


def test_a_reader_that_sees_other_documents_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prefix = write_own_shard(tmp_path / "s", DOCUMENTS)

    def shifted(path: Path) -> object:
        index = read_index(path)
        return type(index)(index.dtype, index.lengths, index.pointers, index.boundaries + 1)

    monkeypatch.setattr("megatron_mup.data.verification.read_index", shifted)
    (problem,) = verify_shard(prefix).problems
    assert "megatron-core reads other document boundaries" in problem


def test_a_whole_job_is_checked_with_its_shards(tmp_path: Path) -> None:
    prefix = write_job(tmp_path / "o", {"train": [DOCUMENTS, DOCUMENTS[:2]], "valid": [[[5, 2]]]})
    reports = verify([prefix])
    assert problems(reports) == []
    assert [Path(report.name).name for report in reports] == [
        "o_train-00000-of-00002",
        "o_train-00001-of-00002",
        "o_valid-00000-of-00001",
        "o.manifest.json",
    ]
    assert (reports[-1].documents, reports[-1].tokens) == (7, 18)


def test_missing_and_foreign_shards_of_a_job_are_named(tmp_path: Path) -> None:
    prefix = write_job(tmp_path / "o", {"train": [DOCUMENTS, DOCUMENTS[:2]]})
    for suffix in (".bin", ".idx", ".json"):
        Path(f"{prefix}_train-00001-of-00002{suffix}").unlink()
    write_shard(tmp_path / "o_valid", [[5, 2]])
    write_shard(tmp_path / "o_train-00000-of-00008", [[5, 2]])
    # Others that only begin alike.
    write_shard(tmp_path / "other", [[5, 2]])
    write_shard(tmp_path / "o_training", [[5, 2]])
    shard, missing, job = verify([prefix])
    assert shard.problems == ()
    assert "no file" in missing.problems[0]
    absent, *foreign = job.problems
    assert "o_train-00001-of-00002.json: No such file" in absent
    assert [problem.split(":")[0] for problem in foreign] == [
        str(tmp_path / "o_train-00000-of-00008"),
        str(tmp_path / "o_valid"),
    ]


def test_a_jobs_manifest_that_contradicts_a_shards_is_named(tmp_path: Path) -> None:
    prefix = write_job(tmp_path / "o", {"train": [DOCUMENTS]}, eod=3)
    shard = tmp_path / "o_train-00000-of-00001"
    write_own_shard(shard, [*DOCUMENTS, [5, 2]])
    named = [problem.split(": ")[1].split()[0] for problem in verify([prefix])[-1].problems]
    expected = {"documents", "tokens", "text_bytes", "bin_bytes", "bin_sha256", "idx_sha256", "eod"}
    assert set(named) == expected


def test_several_processes_report_what_one_reports_in_order(tmp_path: Path) -> None:
    shards = [[[number, 2]] * 3 for number in range(3, 8)]
    prefix = write_set(tmp_path / "s", shards)
    patch(f"{prefix}-00003-of-00005.bin", 0, b"\x09")
    alone = verify([prefix], workers=1)
    assert verify([prefix], workers=2) == alone
    assert [bool(report.problems) for report in alone] == [False, False, False, True, False]


def test_every_byte_of_a_larger_shard_is_read(tmp_path: Path) -> None:
    generator = np.random.default_rng(5)
    lengths = generator.integers(1, 30, size=400)
    documents = [[*generator.integers(3, 512, size=length).tolist(), 2] for length in lengths]
    prefix = write_own_shard(tmp_path / "s", documents)
    assert verify_shard(prefix).problems == ()
    size = Path(f"{prefix}.bin").stat().st_size
    for offset in generator.integers(0, size, size=10).tolist():
        before = Path(f"{prefix}.bin").read_bytes()[offset]
        patch(f"{prefix}.bin", offset, bytes([before ^ 1]))
        assert verify_shard(prefix).problems
        patch(f"{prefix}.bin", offset, bytes([before]))
