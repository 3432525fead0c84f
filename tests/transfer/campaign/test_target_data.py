"""A target's data are asked for before its proxies are trained."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_mup.config import RunConfig
from megatron_mup.config_io import config_from_dict
from megatron_mup.errors import ConfigError, DataError
from megatron_mup.transfer.campaign.target_data import check_target_data
from megatron_mup.transfer.sweep.spec import TextOptions
from tests.data.written_shards import write_shard
from tests.transfer.campaign.campaigns import target_data

TEXT = TextOptions(vocab_size=96, valid_tokens=None, corpus_bytes=1000)


def shards(folder: Path) -> dict[str, list[str]]:
    """Ids 0 to 95, ten times."""
    ids = [list(range(96)) for _ in range(10)]
    paths = {}
    for part in ("train", "valid"):
        write_shard(folder / part, ids)
        paths[f"data__{part}_data_path"] = [str(folder / part)]
    return paths


def config(**changes: object) -> RunConfig:
    return config_from_dict({"optimizer": {"lr": 1.0}} | target_data(**changes))


def test_shards_of_its_own_are_checked(tmp_path: Path) -> None:
    proxy = config()
    with pytest.raises(DataError, match=r"shards/train"):
        check_target_data(config(), proxy, TEXT)
    named = shards(tmp_path)
    check_target_data(config(**named), proxy, TEXT)
    with pytest.raises(DataError, match="vocab_size is 64"):
        check_target_data(config(**named, model__vocab_size=64), proxy, TEXT)
    # 10 steps of 4 x 16 positions of 960 are two thirds of them.
    with pytest.raises(DataError, match="the training data runs out"):
        check_target_data(config(**named, data__max_epochs=0.5), proxy, TEXT)


def test_without_any_the_proxies_are_checked_against_its_vocabulary(tmp_path: Path) -> None:
    bare = {"data__train_data_path": [], "data__valid_data_path": []}
    proxy = config(**shards(tmp_path))
    check_target_data(config(**bare), proxy, None)
    with pytest.raises(DataError, match="vocab_size is 64"):
        check_target_data(config(**bare, model__vocab_size=64), proxy, None)


def test_shards_that_are_not_made_yet_must_fit_the_vocabulary() -> None:
    bare = {"data__train_data_path": [], "data__valid_data_path": []}
    check_target_data(config(**bare), config(), TEXT)
    with pytest.raises(ConfigError, match=r"vocab_size 64 is below the sweep's text.vocab_size 96"):
        check_target_data(config(**bare, model__vocab_size=64), config(), TEXT)
