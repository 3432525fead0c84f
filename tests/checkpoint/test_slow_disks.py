"""A disk that is slow to write is told of, and one that is slow to delete holds nothing up."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_mup.checkpoint import save as save_module
from megatron_mup.checkpoint.folders import TRACKER
from megatron_mup.checkpoint.integrity import whole_iterations
from megatron_mup.checkpoint.save import CheckpointSaver
from megatron_mup.checkpoint.writing import SlowWait
from megatron_mup.training.state import TrainState
from tests.checkpoint.held_writers import Gate
from tests.checkpoint.short_runs import folders, names, run_training, step, trained
from tests.configurations import tiny

LONG = 20.0
"""Seconds after which a test that waits has failed."""


def test_a_long_wait_is_told_after_a_minute_and_whenever_it_has_doubled() -> None:
    now = [1000.0]
    slow = SlowWait(lambda: now[0])
    told = []
    for seconds in range(0, 500, 10):
        now[0] = 1000.0 + seconds
        told.append(slow.due())
    assert [seconds for seconds in told if seconds is not None] == [60.0, 120.0, 240.0, 480.0]


def passing_time(then: Callable[[], None], after: int) -> Callable[[], float]:
    """A clock that is 20 s later whenever it is read; at one reading something happens."""
    readings = [0]

    def clock() -> float:
        readings[0] += 1
        if readings[0] == after:
            then()
        return 20.0 * readings[0]

    return clock


def test_waiting_for_a_hung_file_system_is_told_with_folder_and_time(
    gate: Gate, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = tiny("async_save=true", f"save={tmp_path}")
    with trained(run, steps=1) as state:
        saver = CheckpointSaver(run, clock=passing_time(gate.open, after=15))
        saver.start(state)
        assert caplog.text == ""
        saver.wait()
        assert saver.failed is None
    warnings = [record.message for record in caplog.records]
    for seconds, warning in zip((60, 120, 240), warnings, strict=True):
        assert f"training has waited {seconds} s for {tmp_path}/iter_0000001.tmp to" in warning
    for words in ("first rank's part is not done", "faults.exit_duration_in_mins ends this wait"):
        assert words in warnings[0]
    assert names(tmp_path) == {"iter_0000001", TRACKER}


def save(saver: CheckpointSaver, state: TrainState) -> None:
    """Train a step and save it."""
    step(state)
    saver.start(state)


def test_training_goes_on_while_old_checkpoints_are_deleted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rmtree, released = shutil.rmtree, threading.Event()
    seen: list[tuple[str, str]] = []

    def slow(path: Path) -> None:
        released.wait(LONG)
        seen.append((path.name, threading.current_thread().name))
        rmtree(path)

    monkeypatch.setattr(shutil, "rmtree", slow)
    run = tiny("keep_last=1", "save_retain_interval=2", f"save={tmp_path}")
    with trained(run, steps=0) as state:
        saver = CheckpointSaver(run)
        for _ in range(4):
            save(saver, state)
        kept = {"iter_0000002", "iter_0000004", TRACKER}
        doomed = {".iter_0000001.deleted.0.tmp", ".iter_0000003.deleted.0.tmp"}
        assert names(tmp_path) == kept | doomed
        assert seen == []
        released.set()
        saver.wait()
    assert names(tmp_path) == kept
    assert seen == [
        (".iter_0000001.deleted.0.tmp", "remover"),
        (".iter_0000003.deleted.0.tmp", "remover"),
    ]


def test_a_checkpoint_is_deleted_only_after_its_successor_has_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    newest: list[int] = []
    rmtree = shutil.rmtree

    def noted(path: Path) -> None:
        newest.append(whole_iterations(tmp_path)[0])
        rmtree(path)

    monkeypatch.setattr(shutil, "rmtree", noted)
    run = tiny("keep_last=1", f"save={tmp_path}")
    with trained(run, steps=0) as state:
        saver = CheckpointSaver(run)
        for _ in range(2):
            save(saver, state)
        saver.wait()
    assert newest == [2]
    assert names(tmp_path) == {"iter_0000002", TRACKER}


def test_the_end_of_a_run_waits_for_a_slow_deletion_no_longer_than_it_should(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    released = threading.Event()
    monkeypatch.setattr(shutil, "rmtree", lambda _path: released.wait(LONG))
    monkeypatch.setattr(save_module, "_REMOVAL_SECONDS", 0.01)
    options = ["save_interval=1", "keep_last=1"]
    run_training(tiny(*options, "train_iters=2", *folders(tmp_path)))
    released.set()
    assert "are still being deleted" in caplog.text
    assert names(tmp_path) == {"iter_0000002", ".iter_0000001.deleted.0.tmp", TRACKER}
    monkeypatch.undo()
    run_training(tiny(*options, "train_iters=2", *folders(tmp_path, load=True)))
    assert names(tmp_path) == {"iter_0000002", TRACKER}


def test_a_failed_end_does_not_wait_for_a_deletion(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    released, deleted = threading.Event(), threading.Event()

    def slow(_path: Path) -> None:
        released.wait(LONG)
        deleted.set()

    monkeypatch.setattr(shutil, "rmtree", slow)
    run = tiny("keep_last=1", f"save={tmp_path}")
    with trained(run, steps=0) as state:
        saver = CheckpointSaver(run)
        save(saver, state)
        save(saver, state)
        saver.close()
        assert names(tmp_path) == {"iter_0000002", ".iter_0000001.deleted.0.tmp", TRACKER}
        assert not deleted.is_set()
    released.set()


def test_a_writer_can_be_forked_in_the_middle_of_a_deletion(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rmtree, busy = shutil.rmtree, threading.Event()

    def endless(path: Path) -> None:
        # As a long deletion: always in some call of the system, until two saves are published.
        busy.set()
        while len(whole_iterations(tmp_path)) < 2:
            list(path.iterdir())
        rmtree(path)

    monkeypatch.setattr(shutil, "rmtree", endless)
    run = tiny("async_save=true", f"save={tmp_path}")
    with trained(run, steps=1) as state:
        saver = CheckpointSaver(run)
        (tmp_path / "iter_0000001.tmp").mkdir()
        saver.start(state)
        assert busy.wait(LONG)
        for _ in range(2):
            save(saver, state)
        saver.wait()
        assert saver.failed is None
    assert names(tmp_path) == {"iter_0000001", "iter_0000002", "iter_0000003", TRACKER}
