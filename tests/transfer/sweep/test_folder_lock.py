"""Holding a folder: alone, together, and where the file system has no locks."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
from pathlib import Path

import pytest

from megatron_mup.errors import ConfigError
from megatron_mup.transfer.sweep.folder_lock import held, owner_of


def test_a_folder_is_held_alone_or_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("megatron_mup.transfer.sweep.folder_lock._PATIENCE_SECONDS", 0.0)
    me = f"pid {os.getpid()} on {os.uname().nodename}"
    with held(tmp_path, "lock", by="sweep"):
        assert owner_of(tmp_path / "lock") == me
        for together in (False, True):
            with (
                pytest.raises(ConfigError) as raised,
                held(tmp_path, "lock", by="sweep", together=together),
            ):
                pass
            assert str(raised.value) == (
                f"{tmp_path} is in use by another sweep ({me}); wait for it, stop it, or choose "
                "another --out"
            )
    with (
        held(tmp_path, "lock", by="sweep", together=True),
        held(tmp_path, "lock", by="sweep", together=True),
    ):
        assert owner_of(tmp_path / "lock") is None
    assert owner_of(tmp_path / "none") is None


def test_a_question_who_has_a_folder_does_not_keep_a_command_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "lock").touch()
    waited: list[float] = []
    with (tmp_path / "lock").open() as asking:
        # As ``owner_of`` holds it for a moment.
        fcntl.flock(asking, fcntl.LOCK_SH)

        def answered(seconds: float) -> None:
            waited.append(seconds)
            if len(waited) == 3:
                fcntl.flock(asking, fcntl.LOCK_UN)

        monkeypatch.setattr("time.sleep", answered)
        with held(tmp_path, "lock", by="sweep"):
            assert owner_of(tmp_path / "lock") is not None
    assert len(waited) == 3
    assert sum(waited) < 2.0


def test_folders_that_are_missing_are_made(tmp_path: Path) -> None:
    with held(tmp_path / "a", "b/lock", by="sweep"):
        assert (tmp_path / "a/b/lock").exists()


def test_a_file_system_without_locks_is_used_with_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def no_lock(_file: object, _kind: int) -> None:
        raise OSError(errno.ENOSYS, "not here")

    monkeypatch.setattr("fcntl.flock", no_lock)
    with caplog.at_level(logging.WARNING), held(tmp_path, "lock", by="campaign"):
        pass
    assert f"the file system of {tmp_path} has no locks: do not start a campaign" in caplog.text
