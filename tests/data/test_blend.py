"""Blends of sets, blend files, and plans for a token budget."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_mup.data.blend import (
    expand_blend,
    parse_blend,
    read_blend_file,
    train_paths,
    valid_paths,
)
from megatron_mup.data.blend_plan import BlendPart, plan_blend, write_blend
from megatron_mup.errors import DataError
from tests.configurations import tiny
from tests.data.written_shards import write_job, write_set, write_shard


@pytest.fixture
def corpora(tmp_path: Path) -> tuple[str, str]:
    """A set of 30 and 10 tokens, and a shard of 10."""
    large = write_set(tmp_path / "large", [[[7] * 10] * 3, [[7] * 10]])
    return str(large), str(write_shard(tmp_path / "small", [[7] * 10]))


@pytest.mark.parametrize(
    ("paths", "expected"),
    [
        (["a"], (["a"], None)),
        (["a", "b", "c"], (["a", "b", "c"], None)),
        (["0.7", "a", "0.3", "b"], (["a", "b"], [0.7, 0.3])),
        (["2", "a"], (["a"], [2.0])),
        # One name that reads as a number is a shard.
        (["7"], (["7"], None)),
    ],
)
def test_a_blend_is_prefixes_or_weights_and_prefixes_in_turn(
    paths: list[str], expected: tuple[list[str], list[float] | None]
) -> None:
    assert parse_blend(paths) == expected


@pytest.mark.parametrize(
    ("paths", "words"),
    [
        (["0.7", "a", "0.3"], "does not alternate weight and prefix"),
        (["0.7", "a", "b", "c"], "does not alternate weight and prefix"),
        (["0.7", "a", "0", "b"], "must be positive"),
        (["-1", "a"], "must be positive"),
        (["inf", "a"], "must be positive"),
        (["nan", "a"], "must be positive"),
    ],
)
def test_a_blend_that_cannot_be_read_is_refused(paths: list[str], words: str) -> None:
    with pytest.raises(DataError, match=words):
        parse_blend(paths)


def test_the_weight_of_a_set_is_divided_among_its_shards_by_tokens(
    corpora: tuple[str, str],
) -> None:
    large, small = corpora
    shards = [f"{large}-00000-of-00002", f"{large}-00001-of-00002", small]
    assert expand_blend(([large, small], [0.8, 0.2])) == (shards, pytest.approx([0.6, 0.2, 0.2]))
    assert expand_blend(([large, small], None)) == (shards, None)


def test_shards_of_a_set_that_fill_no_sequence_are_left_out(corpora: tuple[str, str]) -> None:
    large, small = corpora
    kept = [f"{large}-00000-of-00002", small]
    assert expand_blend(([large, small], [0.8, 0.2]), more_than_tokens=10) == (kept, [0.8, 0.2])
    assert expand_blend(([large, small], None), more_than_tokens=10) == (kept, None)
    # A set that is all too short stays, for the check that says so.
    assert len(expand_blend(([large], None), more_than_tokens=30)[0]) == 2


@pytest.mark.parametrize(
    ("record", "train", "valid"),
    [
        ({"train": ["a"], "valid": None, "test": None}, ["a"], []),
        ({"train": ["0.5", "a", "0.5", "b"], "valid": ["c"]}, ["0.5", "a", "0.5", "b"], ["c"]),
        ({"train": [30, "a", 0.7, "b"], "test": ["c"]}, ["30", "a", "0.7", "b"], []),
        ({"train": "0.5 a 0.5 b", "valid": "c"}, ["0.5", "a", "0.5", "b"], ["c"]),
    ],
)
def test_a_blend_file_is_read_as_megatron_reads_it(
    tmp_path: Path, record: dict[str, Any], train: list[str], valid: list[str]
) -> None:
    path = tmp_path / "blend.json"
    path.write_text(json.dumps(record))
    run = tiny(f"per_split_data_args_path={path}")
    assert (train_paths(run), valid_paths(run)) == (train, valid)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "broken JSON"),
        ("[" * 100_000, "broken JSON"),
        ("[]", "holds list; it must look like"),
        ('{"training": ["a"]}', "holds .'training'.; it must look like"),
        ('{"train": []}', "names no training data"),
        ('{"valid": ["a"]}', "names no training data"),
        ('{"train": [true, "a"]}', "not a list of weights and prefixes"),
        ('{"train": {"a": 1}}', "not a list of weights and prefixes"),
    ],
)
def test_a_blend_file_of_another_form_is_refused(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "blend.json"
    path.write_text(text)
    with pytest.raises(DataError, match=rf"blend\.json: .*{words}"):
        read_blend_file(path)


def test_a_missing_blend_file_is_named_with_its_option(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"gone: No such file .*data\.per_split_data_args_path"):
        train_paths(tiny(f"per_split_data_args_path={tmp_path / 'gone'}"))


def test_without_weights_all_text_is_planned_to_be_read_equally_often(
    corpora: tuple[str, str],
) -> None:
    large, small = corpora
    assert plan_blend([large, small], train_tokens=100) == [
        BlendPart(prefix=large, shards=2, tokens=40, weight=0.8, train_tokens=80.0),
        BlendPart(prefix=small, shards=1, tokens=10, weight=0.2, train_tokens=20.0),
    ]
    assert [part.epochs for part in plan_blend([large, small], train_tokens=100)] == [2.0, 2.0]


def test_weights_decide_how_often_a_part_is_read(corpora: tuple[str, str]) -> None:
    large, small = corpora
    parts = plan_blend(["3", large, "1", small], train_tokens=200)
    assert [(part.weight, part.epochs) for part in parts] == [(0.75, 3.75), (0.25, 5.0)]


def test_a_temperature_brings_small_sets_forward(corpora: tuple[str, str]) -> None:
    # Square roots of 40 and 10 are as 2 to 1.
    parts = plan_blend(list(corpora), train_tokens=30, temperature=2.0)
    assert [part.weight for part in parts] == pytest.approx([2 / 3, 1 / 3])


@pytest.mark.parametrize(
    ("paths", "options", "words"),
    [
        ([], {}, "no shards to blend"),
        (["SMALL", "SMALL"], {}, "is named twice"),
        (["SMALL"], {"train_tokens": 0}, "--train-tokens is 0"),
        (["SMALL"], {"temperature": 0.0}, "--temperature is 0.0; it must be positive"),
        (["1", "SMALL"], {"temperature": 2.0}, "leave out one of them"),
        (["gone"], {}, "there are no shards gone"),
    ],
)
def test_a_plan_that_makes_no_sense_is_refused(
    corpora: tuple[str, str], paths: list[str], options: dict[str, Any], words: str
) -> None:
    named = [corpora[1] if path == "SMALL" else path for path in paths]
    with pytest.raises(DataError, match=words):
        plan_blend(named, **({"train_tokens": 100} | options))


def test_the_written_blend_is_the_one_that_training_reads(
    tmp_path: Path, corpora: tuple[str, str]
) -> None:
    large, small = corpora
    held_out = str(write_shard(tmp_path / "held_out", [[7] * 10]))
    output = tmp_path / "blend.json"
    write_blend(output, plan_blend([large, small], train_tokens=100), valid=[held_out])
    run = tiny(f"per_split_data_args_path={output}")
    assert parse_blend(train_paths(run)) == ([large, small], [0.8, 0.2])
    assert valid_paths(run) == [held_out]
    # Megatron-LM asks for all three splits by name.
    assert json.loads(output.read_text())["test"] is None
    with pytest.raises(DataError, match=r"output exists: .*blend\.json; pass --overwrite"):
        write_blend(output, plan_blend([small], train_tokens=100))
    write_blend(output, plan_blend([small], train_tokens=100), overwrite=True)
    assert (train_paths(run), valid_paths(run)) == (["1", small], [])
    # An empty list is one that Megatron-LM cannot unpack.
    assert json.loads(output.read_text())["valid"] is None


def test_sets_are_written_shard_by_shard_for_megatron(
    tmp_path: Path, corpora: tuple[str, str]
) -> None:
    from megatron.core.datasets.utils import get_blend_from_list

    large, small = corpora
    held_out = str(write_set(tmp_path / "held_out", [[[7] * 10], [[7] * 10]]))
    output = tmp_path / "blend.json"
    parts = plan_blend([large, small], train_tokens=100)
    write_blend(output, parts, valid=[held_out], expand_sets=True)
    record = json.loads(output.read_text())
    shards = [f"{large}-00000-of-00002", f"{large}-00001-of-00002"]
    prefixes, weights = get_blend_from_list(record["train"])
    assert (prefixes, weights) == ([*shards, small], pytest.approx([0.6, 0.2, 0.2]))
    held_out_shards = [f"{held_out}-00000-of-00002", f"{held_out}-00001-of-00002"]
    assert get_blend_from_list(record["valid"]) == (held_out_shards, None)
    assert get_blend_from_list(record["test"]) is None


def test_text_is_never_both_trained_on_and_held_out(
    tmp_path: Path, corpora: tuple[str, str]
) -> None:
    large, small = corpora
    (tmp_path / "link").symlink_to(tmp_path)
    parts = plan_blend([large, small], train_tokens=100)
    same = f"{tmp_path}/link/small"
    for valid in ([small], [f"{small}.bin"], ["1", small], [f"{large}-00001-of-00002"], [same]):
        with pytest.raises(DataError, match=r"and the training blend's .* hold the same shard"):
            write_blend(tmp_path / "blend.json", parts, valid=valid)
    assert not (tmp_path / "blend.json").exists()


def test_a_shard_has_one_place_in_a_blend(corpora: tuple[str, str]) -> None:
    large, small = corpora
    for twice in (f"{large}-00001-of-00002", f"{large}-00000-of-00002.idx"):
        with pytest.raises(DataError, match=r"large-0000\d-of-00002 is part of .*; name it once"):
            plan_blend([large, small, twice], train_tokens=100)


def test_files_are_blended_as_their_prefix_and_jobs_are_not(tmp_path: Path) -> None:
    job = write_job(tmp_path / "o", {"train": [[[7, 2]]], "valid": [[[7, 2]]]})
    (part,) = plan_blend([f"{job}_train-00000-of-00001.bin"], train_tokens=4)
    assert part.prefix == f"{job}_train-00000-of-00001"
    words = f"{job} is a whole job; name a split of it: {job}_train, {job}_valid"
    with pytest.raises(DataError, match=words):
        plan_blend([str(job)], train_tokens=4)


def test_a_blend_with_a_missing_held_out_shard_is_not_written(
    tmp_path: Path, corpora: tuple[str, str]
) -> None:
    with pytest.raises(DataError, match=r"there are no shards .*gone"):
        write_blend(
            tmp_path / "blend.json",
            plan_blend([corpora[1]], train_tokens=100),
            valid=[str(tmp_path / "gone")],
        )
    assert not (tmp_path / "blend.json").exists()


def test_a_blend_file_that_the_disk_does_not_hold_is_an_error_with_its_option(
    corpora: tuple[str, str], tmp_path: Path, full_disk: None
) -> None:
    parts = plan_blend(corpora, train_tokens=100)
    with pytest.raises(
        DataError, match=r"cannot write .*b\.json: File too large; free .* --output"
    ):
        write_blend(tmp_path / "b.json", parts)
    assert not list(tmp_path.glob("*b.json*"))
