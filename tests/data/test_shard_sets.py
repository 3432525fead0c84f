"""A set's prefix stands for all of its shards; holes and mixtures are refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_mup.data.manifest import read_job_manifest
from megatron_mup.data.shard_sets import (
    expand,
    job_shards,
    member_name,
    named_prefix,
    set_info,
    set_tokens,
)
from megatron_mup.errors import DataError
from tests.data.written_shards import write_job, write_own_shard, write_set, write_shard

THREE = [[[5, 2], [6, 2]], [[7, 8, 2]], [[9, 2]]]


def remove(prefix: Path) -> None:
    for suffix in (".bin", ".idx", ".json"):
        Path(f"{prefix}{suffix}").unlink()


def test_members_are_numbered_from_zero_in_five_digits(tmp_path: Path) -> None:
    assert member_name(tmp_path / "a.b", 17, 64) == tmp_path / "a.b-00017-of-00064"
    assert member_name(Path("x"), 5, 123456) == Path("x-00005-of-123456")


def test_a_shard_stands_for_itself(tmp_path: Path) -> None:
    shard = write_shard(tmp_path / "s", [[1, 2]])
    write_set(tmp_path / "s-other", THREE)
    write_shard(tmp_path / "s-1-of-2", [[1, 2]])
    assert expand(shard) == [shard]
    member = tmp_path / "s-other-00001-of-00003"
    assert expand(member) == [member]


def test_a_set_is_its_shards_in_order(tmp_path: Path) -> None:
    prefix = write_set(tmp_path / "s[*]?", THREE)
    write_set(tmp_path / "s", THREE[:2])
    assert [path.name for path in expand(prefix)] == [
        "s[*]?-00000-of-00003",
        "s[*]?-00001-of-00003",
        "s[*]?-00002-of-00003",
    ]
    info = set_info(prefix, vocab_size=512)
    assert (info.documents, info.tokens, set_tokens(prefix)) == (4, 9, 9)
    assert [(shard.documents, shard.tokens) for shard in info.shards] == [(2, 4), (1, 3), (1, 2)]


def test_what_is_not_there_is_left_to_the_reader_to_name(tmp_path: Path) -> None:
    assert expand(tmp_path / "absent" / "s") == [tmp_path / "absent" / "s"]
    with pytest.raises(DataError, match=r"no file .*gone\.bin; correct the shard's prefix"):
        set_info(tmp_path / "gone")


@pytest.mark.parametrize(
    ("named", "prefix"),
    [
        ("s", "s"),
        ("s.bin", "s"),
        ("s.idx", "s"),
        ("s.json", "s"),
        ("s.bin.bin", "s.bin"),
        ("set", "set"),
        ("set-00000-of-00003.idx", "set-00000-of-00003"),
        ("job", "job"),
        ("job.manifest.json", "job"),
        ("job_train", "job_train"),
    ],
)
def test_a_prefix_is_meant_by_each_of_its_files(tmp_path: Path, named: str, prefix: str) -> None:
    write_own_shard(tmp_path / "s", THREE[0])
    if named == "s.bin.bin":
        write_shard(tmp_path / "s.bin", THREE[0])
    write_set(tmp_path / "set", THREE)
    write_job(tmp_path / "job", {"train": THREE})
    assert named_prefix(tmp_path / named) == tmp_path / prefix


def test_what_is_not_there_is_answered_by_what_is(tmp_path: Path) -> None:
    for name in ("books_train", "books_valid", "zzz"):
        write_shard(tmp_path / name, [[1, 2]])
    write_set(tmp_path / "web_train", THREE)
    (tmp_path / "new.work").mkdir()
    (tmp_path / "none").mkdir()
    books = f"{tmp_path}/books_train, {tmp_path}/books_valid"
    for named, message in (
        ("books", f"there are no shards {tmp_path}/books: .*; there are {books}$"),
        ("web_trian.bin", f"there are no shards .*; there are {tmp_path}/web_train$"),
        ("q", f"; there are {books}, {tmp_path}/web_train and 1 more$"),
        ("", f"{tmp_path} is a folder; .*; there are {books}, {tmp_path}/web_train and 1 more"),
        ("none", "is a folder; .*; no shards are there"),
        ("none/s", "there are no shards .*; no shards are there"),
        ("gone/s", f"the folder {tmp_path}/gone does not exist"),
        ("new", f"the job {tmp_path}/new is not finished: .*new.work; run the same"),
        ("new_train", f"the job {tmp_path}/new is not finished"),
        ("new_train-00000-of-00003.bin", f"the job {tmp_path}/new is not finished"),
    ):
        with pytest.raises(DataError, match=message):
            named_prefix(tmp_path / named)


def test_a_set_with_holes_is_refused_with_their_names(tmp_path: Path) -> None:
    prefix = write_set(tmp_path / "s", [[[number, 2]] for number in range(3, 10)])
    remove(tmp_path / "s-00002-of-00007")
    with pytest.raises(DataError, match=r"has 6 of 7 shards; missing: \S+s-00002-of-00007; copy"):
        expand(prefix)
    for number in (3, 4, 6):
        remove(tmp_path / f"s-0000{number}-of-00007")
    with pytest.raises(DataError, match=r"00002-of-00007, .*00003.*, .*00004\S+ and 1 more; copy"):
        set_tokens(prefix)


def test_a_number_beyond_the_count_is_refused(tmp_path: Path) -> None:
    prefix = write_set(tmp_path / "s", THREE)
    write_own_shard(tmp_path / "s-00003-of-00003", [[1, 2]])
    with pytest.raises(DataError, match="has 4 of 3 shards"):
        expand(prefix)
    remove(tmp_path / "s-00001-of-00003")
    with pytest.raises(DataError, match=r"has 3 of 3 shards; missing: \S+s-00001-of-00003"):
        expand(prefix)


def test_two_sets_of_one_name_are_refused(tmp_path: Path) -> None:
    prefix = write_set(tmp_path / "s", THREE)
    write_set(prefix, THREE[:2])
    with pytest.raises(DataError, match=r"several sets .*s-\*-of-00002, s-\*-of-00003"):
        expand(prefix)


def test_a_set_beside_a_shard_of_its_name_is_refused(tmp_path: Path) -> None:
    prefix = write_set(tmp_path / "s", THREE)
    write_shard(prefix, [[1, 2]])
    with pytest.raises(DataError, match=r"s is a shard, and 3 shards .* exist as well"):
        expand(prefix)


def test_shards_of_different_tokenizers_are_no_set(tmp_path: Path) -> None:
    prefix = write_set(tmp_path / "s", THREE)
    write_own_shard(tmp_path / "s-00001-of-00003", THREE[1], tokenizer_sha256="b" * 64)
    with pytest.raises(DataError, match="of one set, but of different tokenizers"):
        set_info(prefix)


def test_the_shards_of_a_job_lie_beside_its_manifest(tmp_path: Path) -> None:
    prefix = write_job(tmp_path / "o", {"train": THREE, "valid": [[[5, 2]]]})
    shards = job_shards(prefix, read_job_manifest(Path(f"{prefix}.manifest.json")))
    assert shards["train"] == expand(tmp_path / "o_train")
    assert shards["valid"] == [tmp_path / "o_valid-00000-of-00001"]
