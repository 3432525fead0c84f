"""Real processes start on one index cache at the same time, and one is killed while it builds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_mup.data.datasets import build_datasets
from tests.configurations import tiny
from tests.data.test_datasets import write_set, write_shard
from tests.distributed.spawn import run_ranks

pytestmark = pytest.mark.dist


def corpora(folder: Path) -> tuple[str, str]:
    """Options of a blend of two sets and a shard, with a held-out set."""
    one = write_set(folder / "one", 20, 30, 10)
    two = write_set(folder / "two", 10, 15)
    single = write_shard(folder / "single", [[9] * 32] * 10)
    valid = write_set(folder / "valid", 10, 10)
    return (
        f"train_data_path=[0.5,{one},0.3,{two},0.2,{single}]",
        f"valid_data_path=[{valid}]",
    )


def built(tmp_path: Path, world_size: int, **job: object) -> list[dict[str, Any]]:
    """What each surviving process read and how many index files it saved."""
    options = (*corpora(tmp_path / "text"), f"data_cache_path={tmp_path / 'cache'}")
    run_ranks(
        "tests.data.index_cache_worker",
        {"world_size": world_size, "options": options, **job},
        tmp_path,
    )
    paths = [tmp_path / f"{rank}.json" for rank in range(world_size)]
    return [json.loads(path.read_text()) for path in paths if path.exists()]


def alone(tmp_path: Path) -> list[list[list[int]]]:
    """What a process of its own reads, with a cache of its own."""
    train, valid = build_datasets(
        tiny(*corpora(tmp_path / "text"), f"data_cache_path={tmp_path / 'other'}"),
        train_samples=90,
        valid_samples=20,
    )
    assert valid is not None
    return [[part[number]["tokens"].tolist() for number in range(20)] for part in (train, valid)]


def files(tmp_path: Path) -> dict[str, bytes]:
    """The index files of a cache."""
    return {path.name: path.read_bytes() for path in tmp_path.glob("*.npy")}


# Three indexes for each of 8 shards, two for each of two blends.
INDEX_FILES = 3 * 8 + 2 * 2


@pytest.mark.parametrize("one_job", [False, True], ids=["four jobs", "four ranks of one job"])
def test_processes_that_start_together_build_once_and_read_the_same(
    one_job: bool, tmp_path: Path
) -> None:
    results = built(tmp_path, 4, one_job=one_job)
    assert [result["read"] for result in results] == [alone(tmp_path)] * 4
    assert sorted(result["saved"] for result in results) == [0, 0, 0, INDEX_FILES]
    assert files(tmp_path / "cache") == files(tmp_path / "other")
    assert len(files(tmp_path / "cache")) == INDEX_FILES


def test_jobs_that_wait_for_a_builder_that_is_killed_finish_its_work(tmp_path: Path) -> None:
    results = built(tmp_path, 3, one_job=False, killed=1)
    assert [result["read"] for result in results] == [alone(tmp_path)] * 2
    # Of three files of the killed one two are whole; Megatron makes an index anew as a whole.
    assert sorted(result["saved"] for result in results) == [0, INDEX_FILES]
    assert files(tmp_path / "cache") == files(tmp_path / "other")
