from __future__ import annotations

from pathlib import Path

import pytest

from megatron_mup.config import RunConfig
from megatron_mup.data.checks import check_epochs
from megatron_mup.errors import DataError
from tests.configurations import tiny
from tests.data.test_datasets import write_shard


def blended(tmp_path: Path, *weights: str, limit: str = "null") -> RunConfig:
    """Shards of 320 and 640 tokens; sequences have 16."""
    small = write_shard(tmp_path / "small", [[7] * 32] * 10)
    large = write_shard(tmp_path / "large", [[7] * 32] * 20)
    paths = [*weights[:1], small, *weights[1:], large]
    return tiny(f"train_data_path=[{','.join(paths)}]", f"max_epochs={limit}")


def test_shards_without_weights_are_read_equally_often(tmp_path: Path) -> None:
    run = blended(tmp_path)
    # 120 sequences of 16 tokens over 960 tokens.
    assert set(check_epochs(run, 120).values()) == {2.0}


def test_weights_say_how_often_each_shard_is_read(tmp_path: Path) -> None:
    epochs = check_epochs(blended(tmp_path, "3", "1"), 120)
    # 1,440 of 1,920 tokens come from the 320 of the small shard, 480 from the 640.
    assert list(epochs.values()) == [4.5, 0.75]


def test_data_that_runs_out_is_refused_with_the_numbers(tmp_path: Path) -> None:
    run = blended(tmp_path, "3", "1", limit="4")
    with pytest.raises(DataError, match=r"small' 4\.5 times, data\.max_epochs is 4"):
        check_epochs(run, 120)
    assert check_epochs(run, 100)
