"""The newest checkpoints and every Nth stay; a kill while deleting leaves no half checkpoint."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from megatron_mup.checkpoint.integrity import whole_iterations
from megatron_mup.checkpoint.retention import (
    delete_checkpoint,
    iterations_to_delete,
    remove_leftovers,
)


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


def test_a_deleted_checkpoint_leaves_nothing(tmp_path: Path) -> None:
    make(tmp_path, "iter_0000010")
    make(tmp_path, "iter_0000020")
    delete_checkpoint(tmp_path, 10)
    assert [path.name for path in tmp_path.iterdir()] == ["iter_0000020"]


def test_a_kill_while_deleting_leaves_nothing_that_looks_like_a_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(tmp_path, "iter_0000010")

    def killed(path: Path, ignore_errors: bool = False) -> None:
        if Path(path).exists():
            raise KeyboardInterrupt

    monkeypatch.setattr(shutil, "rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        delete_checkpoint(tmp_path, 10)
    monkeypatch.undo()
    assert whole_iterations(tmp_path) == []
    assert remove_leftovers(tmp_path) == [".iter_0000010.deleted.tmp"]
    assert list(tmp_path.iterdir()) == []


def test_a_checkpoint_that_cannot_be_deleted_costs_no_run_its_life(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(tmp_path, "iter_0000010")

    def busy(self: Path, target: Path) -> None:
        raise OSError(16, "Device or resource busy")

    monkeypatch.setattr(Path, "rename", busy)
    delete_checkpoint(tmp_path, 10)
    delete_checkpoint(tmp_path, 30)
    assert "cannot delete checkpoint" in caplog.text
    assert whole_iterations(tmp_path) == [10]


def test_a_checkpoint_that_is_gone_is_no_error(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    delete_checkpoint(tmp_path, 30)
    assert "iter_0000030 is gone already" in caplog.text


def test_leftovers_of_killed_runs_go_and_everything_else_stays(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("iter_0000010", "iter_0000020.tmp", ".iter_0000005.deleted.tmp", "notes"):
        make(tmp_path, name)
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("10")
    for name in (".latest_checkpointed_iteration.txt.17.tmp", ".lease.json.abc.tmp", "mine.tmp"):
        (tmp_path / name).write_text("1")
    elsewhere = make(tmp_path / "notes", "data")
    (tmp_path / "link.tmp").symlink_to(elsewhere)
    assert remove_leftovers(tmp_path) == [
        ".iter_0000005.deleted.tmp",
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


def test_a_checkpoint_whose_successor_did_not_arrive_gets_its_name_back(tmp_path: Path) -> None:
    make(tmp_path, "iter_0000010.old.tmp")
    make(tmp_path, "iter_0000010.tmp")
    assert remove_leftovers(tmp_path) == ["iter_0000010.tmp"]
    assert whole_iterations(tmp_path) == [10]


def test_a_checkpoint_whose_successor_arrived_goes(tmp_path: Path) -> None:
    make(tmp_path, "iter_0000010.old.tmp", "old")
    make(tmp_path, "iter_0000010", "new")
    assert remove_leftovers(tmp_path) == ["iter_0000010.old.tmp"]
    assert (tmp_path / "iter_0000010" / "checksums.json").read_text() == "new"
