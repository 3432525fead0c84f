"""Which text a conversion is verified on: the best that is at hand."""

from __future__ import annotations

import json
from pathlib import Path

from megatron_mup.convert.checked_text import Handling, tokens_for
from megatron_mup.convert.megatron_source import MegatronSource
from megatron_mup.convert.verification_text import CheckedTokens
from tests.convert.counting_shards import write_shard
from tests.convert.memory_weights import random_weights, small_model
from tests.convert.small_checkpoints import GQA, save_small


def chosen(root: Path, *overrides: str) -> CheckedTokens:
    """What a run with these options is verified on."""
    return tokens_for(MegatronSource(save_small(root, *GQA, *overrides), check=False), Handling())


def test_held_out_shards_are_used_where_they_still_are(tmp_path: Path) -> None:
    prefix = tmp_path / "held[out]"
    source = MegatronSource(
        save_small(tmp_path / "run", *GQA, f"valid_data_path=['{prefix}']"), check=False
    )
    assert "NOT text" in tokens_for(source, Handling()).origin
    # Of another prefix that begins alike.
    write_shard(tmp_path / "held[out]_more", 60)
    assert "NOT text" in tokens_for(source, Handling()).origin
    write_shard(prefix, 60)
    tokens = tokens_for(source, Handling())
    assert tokens.origin == "token shard held[out]"
    # 59 tokens are three sequences of 16.
    assert tokens.ids.shape == (3, 16)
    assert tokens.ids[0, :4].tolist() == [1, 2, 3, 4]


def test_the_first_prefix_of_a_blend_that_is_still_there_is_used(tmp_path: Path) -> None:
    write_shard(tmp_path / "second", 80, first=40)
    write_shard(tmp_path / "third", 60)
    blend = f"valid_data_path=[0.5,{tmp_path}/first,0.3,{tmp_path}/second,0.2,{tmp_path}/third]"
    tokens = chosen(tmp_path / "run", blend)
    assert tokens.origin == "token shard second"
    assert tokens.ids[0, :3].tolist() == [40, 41, 42]


def test_the_first_shard_of_a_set_is_used(tmp_path: Path) -> None:
    for number, first in enumerate((10, 50)):
        name = f"text-{number:05d}-of-00002"
        write_shard(tmp_path / name, first + 30, first=first)
    tokens = chosen(tmp_path / "run", f"valid_data_path=[{tmp_path}/text]")
    assert tokens.origin == "token shard text-00000-of-00002"
    assert tokens.ids[0, :3].tolist() == [10, 11, 12]


def test_a_blend_file_is_read_while_it_is_there(tmp_path: Path) -> None:
    write_shard(tmp_path / "held", 60)
    write_shard(tmp_path / "trained_on", 90, first=60)
    file = tmp_path / "blend.json"
    content = {"train": [str(tmp_path / "trained_on")], "valid": [str(tmp_path / "held")]}
    file.write_text(json.dumps(content | {"test": None}))
    source = MegatronSource(
        save_small(tmp_path / "run", *GQA, f"per_split_data_args_path={file}"), check=False
    )
    assert tokens_for(source, Handling()).origin == "token shard held"
    file.unlink()
    assert "NOT text" in tokens_for(source, Handling()).origin


def test_weights_without_a_run_have_no_held_out_shards() -> None:
    tokens = tokens_for(random_weights(small_model()), Handling())
    assert "NOT text" in tokens.origin
    assert int(tokens.ids.max()) < 90
