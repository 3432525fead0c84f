"""Checkpoints lose their name at once and their files later, on a thread of its own."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from megatron_mup.checkpoint.retention import Remover, remove_leftovers

LONG = 20.0
"""Seconds after which a test that waits has failed."""


def make(root: Path, name: str = "iter_0000010") -> Path:
    """A folder with a file in it."""
    (root / name).mkdir()
    (root / name / "weights").write_text("w")
    return root / name


def found(root: Path) -> list[str]:
    """Names in a folder."""
    return sorted(path.name for path in root.iterdir())


@pytest.fixture
def remover() -> Iterator[Remover]:
    """A remover whose thread ends with the test."""
    remover = Remover()
    yield remover
    remover.close()


@dataclass
class Held:
    """Deletion that begins when it is let go."""

    reached: threading.Event = field(default_factory=threading.Event)
    released: threading.Event = field(default_factory=threading.Event)


@pytest.fixture
def held(monkeypatch: pytest.MonkeyPatch) -> Iterator[Held]:
    """Nothing is deleted in this test before it says so."""
    held, rmtree = Held(), shutil.rmtree

    def late(path: Path) -> None:
        held.reached.set()
        held.released.wait(LONG)
        rmtree(path)

    monkeypatch.setattr(shutil, "rmtree", late)
    yield held
    held.released.set()


def test_a_removed_folder_leaves_nothing(tmp_path: Path, remover: Remover) -> None:
    make(tmp_path, "iter_0000020")
    remover.remove(make(tmp_path))
    remover.wait(LONG)
    assert found(tmp_path) == ["iter_0000020"]


def test_a_folder_loses_its_name_before_its_first_file_and_nobody_waits(
    tmp_path: Path, remover: Remover, held: Held
) -> None:
    remover.remove(make(tmp_path))
    assert found(tmp_path) == [".iter_0000010.deleted.0.tmp"]
    assert found(tmp_path / ".iter_0000010.deleted.0.tmp") == ["weights"]
    # Saved and deleted again while the first one is still on its way out.
    remover.remove(make(tmp_path))
    assert found(tmp_path) == [".iter_0000010.deleted.0.tmp", ".iter_0000010.deleted.1.tmp"]
    held.released.set()
    remover.wait(LONG)
    assert found(tmp_path) == []


def test_what_a_killed_run_did_not_delete_goes_at_the_next_start(
    tmp_path: Path,
    remover: Remover,
    held: Held,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    remover.remove(make(tmp_path))
    assert held.reached.wait(LONG)
    # The thread of the killed run goes no further: it still waits in the test's rmtree.
    monkeypatch.undo()
    assert remove_leftovers(tmp_path) == [".iter_0000010.deleted.0.tmp"]
    assert found(tmp_path) == []


def test_waiting_for_the_deletion_has_an_end(
    tmp_path: Path, remover: Remover, held: Held, caplog: pytest.LogCaptureFixture
) -> None:
    remover.remove(make(tmp_path))
    remover.wait(0.01)
    assert "1 old checkpoint folders (.iter_*.tmp) are still being deleted" in caplog.text


def test_a_folder_that_cannot_be_deleted_is_told_by_the_calling_thread(
    tmp_path: Path,
    remover: Remover,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def busy(path: Path) -> None:
        raise OSError(16, "Device or resource busy")

    monkeypatch.setattr(shutil, "rmtree", busy)
    remover.remove(make(tmp_path))
    remover.wait(LONG)
    (record,) = caplog.records
    assert record.threadName == "MainThread"
    assert "cannot delete " in record.message
    assert "Device or resource busy; the next start tries again" in record.message
    monkeypatch.undo()
    # One failure does not end the thread.
    remover.remove(make(tmp_path))
    remover.wait(LONG)
    assert found(tmp_path) == [".iter_0000010.deleted.0.tmp"]


def test_a_folder_that_cannot_be_renamed_stays_and_costs_no_run_its_life(
    tmp_path: Path,
    remover: Remover,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def busy(_self: Path, _target: Path) -> None:
        raise OSError(16, "Device or resource busy")

    monkeypatch.setattr(Path, "rename", busy)
    remover.remove(make(tmp_path))
    remover.wait(LONG)
    assert "iter_0000010: [Errno 16] Device or resource busy" in caplog.text
    assert found(tmp_path) == ["iter_0000010"]


def test_a_missing_folder_is_no_error(
    tmp_path: Path, remover: Remover, caplog: pytest.LogCaptureFixture
) -> None:
    remover.remove(tmp_path / "iter_0000010")
    remover.wait(LONG)
    assert caplog.text == ""


def test_a_thread_that_cannot_start_leaves_the_deletion_to_the_next_start(
    tmp_path: Path,
    remover: Remover,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def refused(_self: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refused)
    remover.remove(make(tmp_path))
    remover.wait(LONG)
    assert "cannot delete old checkpoints now: can't start new thread" in caplog.text
    assert found(tmp_path) == [".iter_0000010.deleted.0.tmp"]


def test_the_thread_ends_when_the_remover_is_closed(tmp_path: Path, held: Held) -> None:
    remover, before = Remover(), threading.enumerate()
    remover.remove(make(tmp_path))
    (thread,) = [thread for thread in threading.enumerate() if thread not in before]
    assert thread.name == "remover"
    assert thread.daemon
    remover.close()
    assert thread.is_alive()
    held.released.set()
    thread.join(LONG)
    assert not thread.is_alive()
    assert found(tmp_path) == []
