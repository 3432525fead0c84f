"""The newest checkpoints and every Nth stay; a kill while deleting leaves no half checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from megatron_mup.checkpoint.integrity import check_files, digest_files, write_checksums
from megatron_mup.checkpoint.retention import iterations_to_delete, remove_leftovers


def make(root: Path, name: str, content: str = "{}") -> Path:
    """A folder that looks like a published checkpoint."""
    (root / name).mkdir()
    (root / name / "weights").write_text("w")
    (root / name / "checksums.json").write_text(content)
    return root / name


@pytest.mark.parametrize(
    ("keep_last", "retain_interval", "deleted"),
    [
        (None, None, []),
        (1, None, [10, 20, 30, 40]),
        (2, None, [10, 20, 30]),
        (2, 20, [10, 30]),
        (1, 50, [10, 20, 30, 40]),
        (5, None, []),
        (9, 20, []),
    ],
)
def test_the_newest_and_every_nth_stay(
    keep_last: int | None, retain_interval: int | None, deleted: list[int]
) -> None:
    saved = [50, 30, 10, 20, 40]
    chosen = iterations_to_delete(saved, keep_last=keep_last, retain_interval=retain_interval)
    assert chosen == deleted


def test_leftovers_of_killed_runs_go_and_everything_else_stays(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("iter_0000010", "iter_0000020.tmp", ".iter_0000005.deleted.0.tmp", "notes"):
        make(tmp_path, name)
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("10")
    for name in (".latest_checkpointed_iteration.txt.17.tmp", ".lease.json.abc.tmp", "mine.tmp"):
        (tmp_path / name).write_text("1")
    elsewhere = make(tmp_path / "notes", "data")
    (tmp_path / "link.tmp").symlink_to(elsewhere)
    assert remove_leftovers(tmp_path) == [
        ".iter_0000005.deleted.0.tmp",
        ".latest_checkpointed_iteration.txt.17.tmp",
        "iter_0000020.tmp",
    ]
    assert {path.name for path in tmp_path.iterdir()} == {
        ".lease.json.abc.tmp",
        "mine.tmp",
        "iter_0000010",
        "latest_checkpointed_iteration.txt",
        "link.tmp",
        "notes",
    }
    assert (elsewhere / "weights").exists()
    assert remove_leftovers(tmp_path / "absent") == []
    assert caplog.text == ""


def replacing(root: Path, *, successor: bytes = b"new", checksums: bool = True) -> None:
    """Folders as a kill between the two renames of a replacement leaves them."""
    old, new = root / "iter_0000010.old.tmp", root / "iter_0000010.tmp"
    for folder, content in ((old, b"old"), (new, b"new")):
        folder.mkdir()
        (folder / "weights").write_bytes(content)
        if checksums or folder is old:
            write_checksums(folder, digest_files(folder, ["weights"]))
    (new / "weights").write_bytes(successor)


def test_a_replacement_that_was_killed_between_its_renames_is_finished(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    replacing(tmp_path)
    assert remove_leftovers(tmp_path) == ["iter_0000010.old.tmp"]
    assert [path.name for path in tmp_path.iterdir()] == ["iter_0000010"]
    assert (tmp_path / "iter_0000010" / "weights").read_text() == "new"
    assert check_files(tmp_path / "iter_0000010") == []
    assert "iter_0000010 was interrupted while being replaced and is the new one" in caplog.text


@pytest.mark.parametrize(
    "damage",
    [{"successor": b"ne"}, {"checksums": False}],
    ids=["a file of another size", "no checksums"],
)
def test_a_checkpoint_whose_successor_is_incomplete_gets_its_name_back(
    damage: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    replacing(tmp_path, **damage)
    assert remove_leftovers(tmp_path) == ["iter_0000010.tmp"]
    assert [path.name for path in tmp_path.iterdir()] == ["iter_0000010"]
    assert (tmp_path / "iter_0000010" / "weights").read_text() == "old"
    assert "iter_0000010 was interrupted while being replaced and is back" in caplog.text


def test_a_checkpoint_without_successor_gets_its_name_back_even_without_checksums(
    tmp_path: Path,
) -> None:
    # As format 1 wrote them.
    make(tmp_path, "iter_0000010.old.tmp")
    (tmp_path / "iter_0000010.old.tmp" / "checksums.json").unlink()
    assert remove_leftovers(tmp_path) == []
    assert [path.name for path in tmp_path.iterdir()] == ["iter_0000010"]


def test_a_replacement_that_cannot_be_finished_loses_neither_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    replacing(tmp_path)

    def refused(_self: Path, _target: Path) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(Path, "rename", refused)
    assert remove_leftovers(tmp_path) == []
    assert {path.name for path in tmp_path.iterdir()} == {
        "iter_0000010.old.tmp",
        "iter_0000010.tmp",
    }
    assert "iter_0000010 what a killed run left: [Errno 1] Operation not permitted" in caplog.text


def test_a_checkpoint_whose_successor_arrived_goes(tmp_path: Path) -> None:
    make(tmp_path, "iter_0000010.old.tmp", "old")
    make(tmp_path, "iter_0000010", "new")
    assert remove_leftovers(tmp_path) == ["iter_0000010.old.tmp"]
    assert (tmp_path / "iter_0000010" / "checksums.json").read_text() == "new"
