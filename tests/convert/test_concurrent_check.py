"""A check beside the work is waited for, and its error comes before the work's own."""

from __future__ import annotations

import subprocess
import sys
import threading

import pytest

from megatron_mup.convert.concurrent_check import checked_meanwhile
from megatron_mup.errors import CheckpointError


def test_the_work_goes_on_while_the_check_runs_and_its_end_is_waited_for() -> None:
    go, passed = threading.Event(), []

    def check() -> None:
        assert go.wait(60)
        passed.append(True)

    with checked_meanwhile(check) as finish:
        assert not passed
        go.set()
        finish()
        assert passed == [True]
        finish()


def damaged() -> None:
    raise CheckpointError("a file is damaged")


def test_what_the_check_finds_is_raised_when_it_is_asked_for() -> None:
    with (
        pytest.raises(CheckpointError, match="a file is damaged"),
        checked_meanwhile(damaged) as finish,
    ):
        finish()


def test_whatever_ends_the_check_is_raised() -> None:
    def lost() -> None:
        raise OSError("the network disk is gone")

    with pytest.raises(OSError, match="is gone"), checked_meanwhile(lost) as finish:
        finish()


def test_damage_explains_an_error_of_the_work() -> None:
    with pytest.raises(CheckpointError, match="a file is damaged"), checked_meanwhile(damaged):
        raise CheckpointError("the weights are not finite")
    with pytest.raises(CheckpointError, match="not finite"), checked_meanwhile(lambda: None):
        raise CheckpointError("the weights are not finite")


def test_other_errors_wait_for_no_check() -> None:
    go = threading.Event()
    with pytest.raises(KeyboardInterrupt), checked_meanwhile(lambda: go.wait(60) and None):
        raise KeyboardInterrupt
    go.set()


def test_an_interrupted_process_ends_though_the_check_goes_on() -> None:
    work = (
        "import threading\n"
        "from megatron_mup.convert.concurrent_check import checked_meanwhile\n"
        "with checked_meanwhile(threading.Event().wait):\n"
        "    raise KeyboardInterrupt\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", work], capture_output=True, timeout=60, check=False
    )
    assert done.stderr.endswith(b"KeyboardInterrupt\n")


def test_without_a_check_there_is_nothing_to_wait_for() -> None:
    with checked_meanwhile(None) as finish:
        finish()
    with pytest.raises(CheckpointError, match="full"), checked_meanwhile(None):
        raise CheckpointError("the disk is full")
