from __future__ import annotations

from pathlib import Path

import pytest

from megatron_mup.config import RunConfig
from megatron_mup.data.blend_plan import plan_blend
from megatron_mup.data.checks import check_epochs, check_training_data, repetition_warning
from megatron_mup.errors import DataError
from tests.configurations import tiny
from tests.data.test_datasets import write_set, write_shard
from tests.data.written_shards import write_own_shard


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


def test_a_set_is_counted_as_one(tmp_path: Path) -> None:
    large = write_set(tmp_path / "large", 15, 5)
    small = write_shard(tmp_path / "small", [[7] * 32] * 10)
    run = tiny(f"train_data_path=[1,{large},3,{small}]")
    # 480 of 1,920 tokens come from the set's 640, 1,440 from the 320 of the shard.
    assert check_epochs(run, 120) == {large: 0.75, small: 4.5}
    assert set(check_epochs(tiny(f"train_data_path=[{large},{small}]"), 120)) == {large, small}


def test_a_prefix_named_twice_is_read_for_both_weights(tmp_path: Path) -> None:
    small = write_shard(tmp_path / "small", [[7] * 32] * 10)
    large = write_shard(tmp_path / "large", [[7] * 32] * 20)
    run = tiny(f"train_data_path=[1,{small},2,{large},1,{small}]")
    # 960 of 1,920 tokens each.
    assert check_epochs(run, 120) == {small: 3.0, large: 1.5}


def test_epochs_of_documents_are_counted_over_a_set(tmp_path: Path) -> None:
    prefix = write_set(tmp_path / "text", 15, 5)
    run = tiny(f"train_data_path=[{prefix}]", "sample_layout=document")
    assert check_epochs(run, 50) == {prefix: 2.5}


def test_repetition_is_warned_of_with_each_set_and_its_epochs() -> None:
    assert repetition_warning({"a": 1.0, "b": 0.2}) is None
    text = repetition_warning({"a": 2.25, "b": 0.5, "c": 1.5})
    assert text is not None
    assert text.startswith("warning: training repeats its data: 'a' 2.25 times, 'c' 1.5 times;")
    assert "max_epochs=1" in text
    assert "arXiv" not in text
    assert "more than 4 times helps ever less" in str(repetition_warning({"a": 4.5}))


def test_every_shard_of_a_set_is_checked(tmp_path: Path) -> None:
    prefix = write_set(tmp_path / "text", 10, 20)
    check_training_data(tiny(f"train_data_path=[{prefix}]"))
    write_shard(tmp_path / "text-00001-of-00002", [[200] * 32])
    with pytest.raises(DataError, match=r"text-00001-of-00002\.bin: holds token id 200"):
        check_training_data(tiny(f"train_data_path=[{prefix}]"))
    (tmp_path / "text-00001-of-00002.idx").unlink()
    with pytest.raises(DataError, match=r"has 1 of 2 shards; missing: .*text-00001-of-00002"):
        check_training_data(tiny(f"train_data_path=[{prefix}]"))


def test_what_is_left_out_of_a_set_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    prefix = write_set(tmp_path / "text", 10, 20)
    write_shard(tmp_path / "text-00001-of-00002", [[7] * 16])
    check_training_data(tiny(f"train_data_path=[{prefix}]"))
    assert "do not fill one sequence of 16 tokens: " in caplog.text
    assert "text-00001-of-00002" in caplog.text
    write_shard(tmp_path / "text-00000-of-00002", [[7] * 16])
    with pytest.raises(DataError, match="has 16 tokens, which is not one sequence"):
        check_training_data(tiny(f"train_data_path=[{prefix}]"))


def test_more_shards_than_megatron_numbers_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("megatron_mup.data.checks.MOST_SHARDS", 2)
    run = tiny(f"train_data_path=[{write_set(tmp_path / 'text', 5, 5, 5)}]")
    with pytest.raises(DataError, match="a blend of 3 shards; Megatron reads at most 2"):
        check_training_data(run)


def test_the_shards_of_a_blend_file_are_checked(tmp_path: Path) -> None:
    path = tmp_path / "blend.json"
    path.write_text('{"train": ["' + str(tmp_path / "gone") + '"]}')
    with pytest.raises(DataError, match=r"no file .*gone\.bin"):
        check_training_data(tiny(f"per_split_data_args_path={path}"))
    path.write_text('{"train": ["' + write_shard(tmp_path / "here", [[7] * 32]) + '"]}')
    check_training_data(tiny(f"per_split_data_args_path={path}"))
    with pytest.raises(DataError, match=r"data\.valid_data_path is empty"):
        check_training_data(tiny(f"per_split_data_args_path={path}", "eval_iters=1"))


def test_shards_of_different_tokenizers_are_not_trained_on_together(tmp_path: Path) -> None:
    first = write_own_shard(tmp_path / "first", [[7] * 32] * 10)
    second = write_own_shard(tmp_path / "second", [[7] * 32] * 10, tokenizer_sha256="b" * 64)
    foreign = write_shard(tmp_path / "foreign", [[7] * 32] * 10)
    check_training_data(tiny(f"train_data_path=[{first},{foreign}]", "eval_iters=0"))
    for paths in (
        [f"train_data_path=[{first},{second}]", "eval_iters=0"],
        [f"train_data_path=[{first}]", f"valid_data_path=[{second}]", "eval_iters=1"],
    ):
        with pytest.raises(DataError, match=r"first and .*second were made with different"):
            check_training_data(tiny(*paths))
    with pytest.raises(DataError, match=r"first and .*second were made with different"):
        plan_blend([str(first), str(second)], train_tokens=100)
