"""Cut, changed, missing and foreign files of a checkpoint are named; its names stay inside it."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import pytest

from megatron_mup.checkpoint.integrity import (
    FileDigest,
    check_files,
    checkpoint_folder,
    digest_files,
    file_order,
    read_checksums,
    whole_iterations,
    write_checksums,
)
from megatron_mup.errors import CheckpointError

CONTENT = {".metadata": b"meta", "__0_0.distcp": b"x" * 5000, "__1_0.distcp": b"y" * 3000}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A published checkpoint of three files."""
    folder = tmp_path / "iter_0000100"
    folder.mkdir()
    for name, content in CONTENT.items():
        (folder / name).write_bytes(content)
    write_checksums(folder, digest_files(folder, CONTENT))
    return folder


def rewrite(folder: Path, **changes: object) -> None:
    """Write a list of checksums with one entry that is as given."""
    name = str(changes.pop("name", "__0_0.distcp"))
    entry = {"bytes": 5000, "sha256": hashlib.sha256(b"x" * 5000).hexdigest()} | changes
    record = {"format": 1, "files": {name: entry}}
    (folder / "checksums.json").write_text(json.dumps(record))


def test_a_whole_checkpoint_has_no_problem(folder: Path) -> None:
    assert check_files(folder) == []


def test_the_list_holds_size_and_sha256_of_every_file(folder: Path) -> None:
    record = json.loads((folder / "checksums.json").read_text())
    assert list(record["files"]) == [".metadata", "__0_0.distcp", "__1_0.distcp"]
    # printf meta | sha256sum
    assert record["files"][".metadata"] == {
        "bytes": 4,
        "sha256": "ea3bd73e2b506e00527232b3ed743c066da83a8e3066f62a71e75eb9b4aa1db6",
    }
    assert read_checksums(folder)["__1_0.distcp"].bytes == 3000


def test_no_temporary_file_stays_beside_the_list(folder: Path) -> None:
    assert {path.name for path in folder.iterdir()} == {*CONTENT, "checksums.json"}


def test_a_cut_file_is_named_with_both_sizes(folder: Path) -> None:
    os.truncate(folder / "__0_0.distcp", 4999)
    assert check_files(folder) == [f"{folder}/__0_0.distcp has 4999 bytes instead of 5000."]


def test_one_flipped_bit_is_found(folder: Path) -> None:
    (folder / "__1_0.distcp").write_bytes(b"y" * 2999 + b"x")
    (problem,) = check_files(folder)
    assert problem.startswith(f"{folder}/__1_0.distcp was changed")


def test_a_missing_file_is_named(folder: Path) -> None:
    (folder / ".metadata").unlink()
    assert check_files(folder) == [f"{folder}/.metadata is missing."]


def test_a_pipe_in_place_of_a_file_is_not_waited_for(folder: Path) -> None:
    (folder / ".metadata").unlink()
    os.mkfifo(folder / ".metadata")
    assert check_files(folder) == [f"{folder}/.metadata is missing."]


def test_an_unlisted_file_is_named_by_the_first_rank_alone(folder: Path) -> None:
    (folder / "common.pt").write_bytes(b"")
    assert check_files(folder, rank=0, size=2) == [
        f"{folder}/common.pt is not listed in checksums.json."
    ]
    assert check_files(folder, rank=1, size=2) == []


def test_ranks_share_the_files_by_bytes_and_miss_none(folder: Path) -> None:
    for name in CONTENT:
        (folder / name).write_bytes(b"")
    shares = [check_files(folder, rank=rank, size=2) for rank in range(2)]
    named = [[problem.split()[0].rsplit("/", 1)[1] for problem in share] for share in shares]
    # 5000 bytes to rank 0, 3000 and 4 to rank 1.
    assert named == [["__0_0.distcp"], [".metadata", "__1_0.distcp"]]


def test_files_are_read_in_the_order_in_which_they_were_written() -> None:
    names = ["__1_0.distcp", "__0_10.distcp", "__0_9.distcp", ".metadata"]
    assert sorted(names, key=file_order) == [
        ".metadata",
        "__0_9.distcp",
        "__0_10.distcp",
        "__1_0.distcp",
    ]


def test_a_rank_without_a_share_reads_nothing(folder: Path) -> None:
    assert check_files(folder, rank=7, size=8) == []


def test_a_folder_without_the_list_was_not_finished(folder: Path) -> None:
    (folder / "checksums.json").unlink()
    with pytest.raises(CheckpointError, match=r"is missing: iter_0000100 was not saved to its end"):
        check_files(folder)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "[" * 100000,
        '{"format": 2, "files": {}}',
        '{"format": 1, "files": []}',
        '{"format": 1, "files": {}, "more": 1}',
        '{"format": 1, "files": {"a": 5}}',
        '{"format": 1, "files": {"a": {"bytes": ' + "9" * 5000 + "}}}",
    ],
)
def test_a_damaged_list_is_an_error_of_one_line(folder: Path, text: str) -> None:
    (folder / "checksums.json").write_text(text)
    with pytest.raises(
        CheckpointError, match=r"checksums\.json is damaged .* another iter_"
    ) as error:
        read_checksums(folder)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "change",
    [
        {"bytes": -1},
        {"bytes": True},
        {"bytes": 5.0},
        {"sha256": "0" * 63},
        {"sha256": "G" * 64},
        {"sha256": None},
        {"mode": 0o777},
    ],
)
def test_an_entry_of_another_type_is_damage(folder: Path, change: dict[str, object]) -> None:
    rewrite(folder, **change)
    with pytest.raises(CheckpointError, match=r"is damaged \(no .* of '__0_0\.distcp'\)"):
        read_checksums(folder)


@pytest.mark.parametrize(
    "name", ["../secret", "/etc/passwd", "..", ".", "", "a/b", "a\\b", "a\0b", "checksums.json"]
)
def test_a_name_that_leaves_the_folder_is_refused(folder: Path, name: str) -> None:
    rewrite(folder, name=name)
    with pytest.raises(CheckpointError, match="which is not a plain file name"):
        check_files(folder)
    with pytest.raises(CheckpointError, match="which is not a plain file name"):
        digest_files(folder, [name])
    with pytest.raises(CheckpointError, match="which is not a plain file name"):
        write_checksums(folder, {name: FileDigest(bytes=0, sha256="0" * 64)})


def test_a_link_out_of_the_folder_is_refused(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "secret").write_bytes(b"x" * 5000)
    (folder / "__0_0.distcp").unlink()
    (folder / "__0_0.distcp").symlink_to("../secret")
    with pytest.raises(CheckpointError, match=r"__0_0\.distcp is a link to .*secret, outside"):
        check_files(folder)


def test_published_iterations_come_newest_first(tmp_path: Path) -> None:
    names = ["iter_0000002", "iter_0000010", "iter_12345678", "iter_0000003.tmp", ".iter_0000004"]
    for name in [*names, "iter_00000005", "iter_x", "iter_0000006"]:
        (tmp_path / name).mkdir()
        if name != "iter_0000006":
            (tmp_path / name / "checksums.json").write_text("{}")
    assert whole_iterations(tmp_path) == [12345678, 10, 2]
    assert whole_iterations(tmp_path / "absent") == []


def test_folders_have_megatrons_names(tmp_path: Path) -> None:
    assert checkpoint_folder(tmp_path, 100).name == "iter_0000100"
    assert checkpoint_folder(tmp_path, 12345678).name == "iter_12345678"
