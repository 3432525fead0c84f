"""Manifests are read strictly: other names, types or versions are refused with the cure."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_mup.data.manifest import (
    InputRange,
    ShardEntry,
    job_manifest_path,
    manifest_text,
    read_job_manifest,
    read_shard_manifest,
)
from megatron_mup.errors import DataError
from tests.data.written_shards import write_job, write_own_shard

Change = Callable[[dict[str, Any]], Any]


@pytest.fixture
def shard_path(tmp_path: Path) -> Path:
    return Path(f"{write_own_shard(tmp_path / 's', [[5, 2], [7, 8, 2]])}.json")


@pytest.fixture
def job_path(tmp_path: Path) -> Path:
    return job_manifest_path(write_job(tmp_path / "o", {"train": [[[5, 2]], [[6, 2]]]}))


def change(path: Path, how: Change) -> None:
    path.write_text(json.dumps(how(json.loads(path.read_text()))))


def test_a_shards_manifest_comes_back_as_it_was_written(shard_path: Path) -> None:
    manifest = read_shard_manifest(shard_path)
    assert (manifest.documents, manifest.tokens, manifest.largest_token_id) == (2, 5, 8)
    assert manifest.inputs == [InputRange(file="a.jsonl", start=0, stop=40, documents=2)]
    assert json.loads(manifest_text(manifest)) == json.loads(shard_path.read_text())


def test_a_jobs_manifest_comes_back_as_it_was_written(job_path: Path) -> None:
    manifest = read_job_manifest(job_path)
    assert job_path.name == "o.manifest.json"
    assert [entry.name for entry in manifest.splits["train"]] == [
        "o_train-00000-of-00002",
        "o_train-00001-of-00002",
    ]
    assert isinstance(manifest.splits["train"][0], ShardEntry)
    assert (manifest.empty_documents, manifest.rejected_documents) == (4, {"broken JSON": 6})
    assert dataclasses.asdict(manifest) == json.loads(job_path.read_text())


@pytest.mark.parametrize(
    "how",
    [
        lambda record: record | {"format_version": 3},
        lambda record: record | {"format_version": True},
        lambda record: record | {"unknown": 1},
        lambda record: record | {"tokens": "5"},
        lambda record: record | {"tokens": 5.0},
        lambda record: record | {"documents": -1},
        lambda record: record | {"documents": True},
        lambda record: record | {"append_eod": 1},
        lambda record: record | {"inputs": "a.jsonl"},
        lambda record: record | {"inputs": ["a.jsonl"]},
        lambda record: record | {"inputs": [{"file": "a", "start": 0, "stop": 1}]},
        lambda record: record | {"inputs": [record["inputs"][0] | {"start": -1}]},
        lambda record: {key: record[key] for key in record if key != "idx_sha256"},
        lambda record: [record],
        lambda _record: None,
    ],
)
def test_another_record_is_no_shards_manifest(how: Change, shard_path: Path) -> None:
    change(shard_path, how)
    with pytest.raises(DataError, match=r"s\.json: not a shard's manifest .*--overwrite"):
        read_shard_manifest(shard_path)


@pytest.mark.parametrize(
    "how",
    [
        lambda record: record | {"options": []},
        lambda record: record | {"inputs": [1]},
        lambda record: record | {"rejected_documents": {"broken": "6"}},
        lambda record: record | {"rejected_documents": {"broken": -6}},
        lambda record: record | {"rejected_places": [["a.jsonl", 1]]},
        lambda record: record | {"splits": []},
        lambda record: record | {"splits": {"train": {}}},
        lambda record: record | {"splits": {"train": [{"name": "o"}]}},
    ],
)
def test_another_record_is_no_jobs_manifest(how: Change, job_path: Path) -> None:
    change(job_path, how)
    with pytest.raises(DataError, match=r"o\.manifest\.json: not a job's manifest"):
        read_job_manifest(job_path)


@pytest.mark.parametrize("name", ["../o", "a/b", "/etc/passwd", "", "..", "."])
def test_a_job_names_no_shard_in_another_folder(name: str, job_path: Path) -> None:
    record = json.loads(job_path.read_text())
    record["splits"]["train"][0]["name"] = name
    job_path.write_text(json.dumps(record))
    with pytest.raises(DataError, match="shard name"):
        read_job_manifest(job_path)


@pytest.mark.parametrize("read", [read_shard_manifest, read_job_manifest])
def test_the_earlier_version_is_refused_with_two_cures(
    read: Callable[[Path], object], tmp_path: Path
) -> None:
    path = tmp_path / "s.json"
    path.write_text('{"format_version": 1, "inputs": ["a.txt"]}')
    with pytest.raises(
        DataError,
        match=r"format version 1, this version reads 2; make .*--overwrite`, or delete the file: "
        "a shard without a manifest is read through at every start",
    ):
        read(path)


@pytest.mark.parametrize("read", [read_shard_manifest, read_job_manifest])
def test_a_missing_manifest_is_named(read: Callable[[Path], object], tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"cannot read .*gone\.json: No such file"):
        read(tmp_path / "gone.json")
