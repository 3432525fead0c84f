"""Leases: who may write to a save folder, who is refused, who takes over."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from megatron_mup.checkpoint.lease import Lease, Owner
from megatron_mup.errors import CheckpointError
from megatron_mup.os_processes import machine_identity, process_start

LONG, SHORT = 600.0, 0.3
"""Timeouts in seconds: no heartbeat is missed in a test, or a test can wait for it."""


def owner(**changes: object) -> Owner:
    """This process as an owner, with changes."""
    return dataclasses.replace(Owner.this_process({}), **changes)  # type: ignore[arg-type]


def elsewhere(**changes: object) -> Owner:
    """An owner whose process cannot be seen from here."""
    return owner(host="node7", machine="another boot", pid=4242, **changes)


def leave(folder: Path, who: Owner, *, silent_seconds: float) -> None:
    """Write the lease of an owner who was last heard of so long ago."""
    path = folder / "lease.json"
    path.write_text(json.dumps(dataclasses.asdict(who)))
    heard = time.time() - silent_seconds
    os.utime(path, (heard, heard))


def holder(folder: Path) -> str:
    return str(json.loads((folder / "lease.json").read_text())["token"])


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def wait_until(condition: object, seconds: float = 60) -> None:
    assert callable(condition)
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited too long"


@contextmanager
def other_process(folder: Path) -> Iterator[subprocess.Popen[str]]:
    """A process that holds the lease until it is killed or told to leave."""
    code = (
        "import sys; from pathlib import Path; from megatron_mup.checkpoint.lease import Lease\n"
        "with Lease(Path(sys.argv[1]), timeout_seconds=600):\n"
        "    print('held', flush=True); sys.stdin.read()"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(folder)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "SLURM_JOB_ID": "77"},
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        yield process
    finally:
        process.kill()
        process.communicate()


def test_a_lease_says_who_writes_and_is_gone_afterwards(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "folder"
    who = Owner.this_process({"SLURM_JOB_ID": "12", "SLURM_RESTART_COUNT": "3"})
    with Lease(folder, timeout_seconds=LONG, owner=who) as lease:
        saved = json.loads((folder / "lease.json").read_text())
        assert saved["job_id"] == "12"
        assert saved["restart_count"] == 3
        assert saved["pid"] == os.getpid()
        assert saved["host"] == os.uname().nodename
        assert names(folder) == ["lease.json"]
        assert not lease.lost()
        assert lease.confirm()
    assert names(folder) == []


def test_a_second_job_is_refused_while_the_first_is_alive(tmp_path: Path) -> None:
    with other_process(tmp_path) as process:
        held = holder(tmp_path)
        expected = (
            rf"checkpoint\.save '{re.escape(str(tmp_path))}' is being written by Slurm job 77, "
            rf"host {re.escape(os.uname().nodename)}, process {process.pid} .*last heartbeat "
            r"\d+ s ago; stop that job, or save elsewhere with checkpoint\.save.*"
            r"faults\.lease_timeout_seconds=600"
        )
        with pytest.raises(CheckpointError, match=expected), Lease(tmp_path, timeout_seconds=LONG):
            pass
        assert holder(tmp_path) == held
        assert names(tmp_path) == ["lease.json"]


def test_a_killed_owner_on_this_machine_is_replaced_at_once(tmp_path: Path) -> None:
    with other_process(tmp_path) as process:
        # Not waited for: what is left of it is a zombie, which writes nothing either.
        os.kill(process.pid, signal.SIGKILL)
        wait_until(lambda: process_start(process.pid) is None)
        who = owner()
        with Lease(tmp_path, timeout_seconds=LONG, owner=who) as lease:
            assert holder(tmp_path) == who.token
            assert lease.confirm()
            assert names(tmp_path) == ["lease.json"]


def test_a_silent_owner_that_runs_on_this_machine_is_still_respected(tmp_path: Path) -> None:
    leave(tmp_path, owner(), silent_seconds=LONG + 5)
    refused = pytest.raises(CheckpointError, match=r"last heartbeat 60\d s ago; stop that job")
    with refused, Lease(tmp_path, timeout_seconds=LONG):
        pass


def test_a_finished_owner_leaves_a_free_folder(tmp_path: Path) -> None:
    with other_process(tmp_path) as process:
        process.communicate("")
        assert process.returncode == 0
        assert names(tmp_path) == []


def test_a_reused_pid_is_not_the_owner(tmp_path: Path) -> None:
    leave(tmp_path, owner(process_start=1), silent_seconds=0)
    with Lease(tmp_path, timeout_seconds=LONG) as lease:
        assert lease.confirm()


def test_a_requeued_job_takes_its_own_lease_back_at_once(tmp_path: Path) -> None:
    leave(tmp_path, elsewhere(job_id="5", restart_count=1), silent_seconds=0)
    who = owner(job_id="5", restart_count=2)
    with Lease(tmp_path, timeout_seconds=LONG, owner=who):
        assert holder(tmp_path) == who.token


@pytest.mark.parametrize(("job", "count"), [("5", 1), ("6", 2)])
def test_another_job_or_the_same_start_is_no_requeue(job: str, count: int) -> None:
    held = elsewhere(job_id="5", restart_count=1)
    assert held.is_alive(owner(job_id=job, restart_count=count)) is None


def test_a_foreign_owner_that_has_been_silent_too_long_is_replaced(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    leave(tmp_path, elsewhere(), silent_seconds=LONG + 5)
    who = owner()
    with caplog.at_level(logging.WARNING), Lease(tmp_path, timeout_seconds=LONG, owner=who):
        assert holder(tmp_path) == who.token
    # The dead owner is named, and nothing was waited for.
    assert "waiting" not in caplog.text
    assert "lease.json: taken over from host node7, process 4242" in caplog.text


def test_a_foreign_owner_whose_heartbeat_moves_is_alive(tmp_path: Path) -> None:
    # Both in one process: the machine's name makes them strangers to each other.
    with Lease(tmp_path, timeout_seconds=SHORT, owner=elsewhere(job_id="9")) as first:
        held = holder(tmp_path)
        refused = pytest.raises(CheckpointError, match="Slurm job 9, host node7, process 4242")
        # The second is patient: only the moving heartbeat can make it give up.
        with refused, Lease(tmp_path, timeout_seconds=LONG):
            pass
        assert holder(tmp_path) == held
        assert not first.lost()


def test_a_foreign_owner_that_died_just_now_is_watched_until_the_timeout(tmp_path: Path) -> None:
    leave(tmp_path, elsewhere(), silent_seconds=0)
    began = time.monotonic()
    with Lease(tmp_path, timeout_seconds=SHORT) as lease:
        assert time.monotonic() - began > SHORT / 2
        assert lease.confirm()


def test_a_heartbeat_in_the_future_does_not_block_the_folder_for_ever(tmp_path: Path) -> None:
    leave(tmp_path, elsewhere(), silent_seconds=-1e6)
    with Lease(tmp_path, timeout_seconds=SHORT) as lease:
        assert lease.confirm()


def test_the_heartbeat_moves(tmp_path: Path) -> None:
    with Lease(tmp_path, timeout_seconds=SHORT):
        begun = (tmp_path / "lease.json").stat().st_mtime_ns
        wait_until(lambda: (tmp_path / "lease.json").stat().st_mtime_ns > begun)


def test_an_owner_sees_that_it_was_replaced_and_leaves_the_new_one_alone(tmp_path: Path) -> None:
    with Lease(tmp_path, timeout_seconds=SHORT, owner=elsewhere(job_id="5")) as first:
        # Long enough, so that it is the requeued job and not the silence that decides.
        second = owner(job_id="5", restart_count=1)
        with Lease(tmp_path, timeout_seconds=LONG, owner=second) as lease:
            wait_until(first.lost)
            assert not first.confirm()
            first.__exit__(None, None, None)
            assert holder(tmp_path) == second.token
            assert lease.confirm()


def test_an_owner_that_slept_through_the_timeout_looks_before_it_answers(tmp_path: Path) -> None:
    with Lease(tmp_path, timeout_seconds=LONG) as lease:
        leave(tmp_path, elsewhere(), silent_seconds=0)
        assert not lease.lost()
        lease._last_beat -= 2 * LONG
        assert lease.lost()


def test_a_deleted_lease_is_a_lost_one(tmp_path: Path) -> None:
    with Lease(tmp_path, timeout_seconds=LONG) as lease:
        (tmp_path / "lease.json").unlink()
        assert not lease.confirm()
    assert names(tmp_path) == []


GARBAGE = [
    b"",
    b"\xff\xfe\x00garbage",
    b"[]",
    b'{"token": "../../escape", "pid": 1}',
    b"{" * 100_000,
    json.dumps({**dataclasses.asdict(Owner.this_process({})), "token": "../x"}).encode(),
    json.dumps({**dataclasses.asdict(Owner.this_process({})), "pid": "1"}).encode(),
]


@pytest.mark.parametrize("content", GARBAGE, ids=range(len(GARBAGE)))
def test_a_damaged_lease_is_judged_by_its_age(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "lease.json"
    path.write_bytes(content)
    assert Owner.parse(content) is None
    long_ago = time.time() - LONG - 5
    os.utime(path, (long_ago, long_ago))
    with Lease(tmp_path, timeout_seconds=LONG) as lease:
        assert lease.confirm()
    assert names(tmp_path) == []


def test_a_damaged_lease_that_somebody_renews_is_respected(tmp_path: Path) -> None:
    path = tmp_path / "lease.json"
    path.write_text("{}")
    done = threading.Event()

    def renew() -> None:
        while not done.wait(0.01):
            os.utime(path)

    thread = threading.Thread(target=renew)
    thread.start()
    try:
        refused = pytest.raises(CheckpointError, match="an unknown job")
        with refused, Lease(tmp_path, timeout_seconds=LONG):
            pass
    finally:
        done.set()
        thread.join()
    assert path.read_text() == "{}"


def test_a_link_or_a_pipe_in_the_place_of_the_lease_is_not_followed(tmp_path: Path) -> None:
    target = tmp_path / "elsewhere.json"
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "lease.json").symlink_to(target)
    refused = pytest.raises(CheckpointError, match=r"cannot write lease\.json")
    with refused, Lease(tmp_path / "a", timeout_seconds=SHORT):
        pass
    (tmp_path / "b").mkdir()
    os.mkfifo(tmp_path / "b" / "lease.json")
    with Lease(tmp_path / "b", timeout_seconds=SHORT):
        pass
    assert not target.exists()


def test_of_many_takers_of_a_dead_owners_lease_one_wins(tmp_path: Path) -> None:
    for attempt in range(20):
        folder = tmp_path / str(attempt)
        folder.mkdir()
        leave(folder, elsewhere(), silent_seconds=LONG + 5)
        start = threading.Barrier(8)
        winners: list[Lease] = []
        refused: list[str] = []
        with ExitStack() as stack:

            def take(
                place: Path = folder,
                gate: threading.Barrier = start,
                won: list[Lease] = winners,
                lost: list[str] = refused,
                held: ExitStack = stack,
            ) -> None:
                lease = Lease(place, timeout_seconds=LONG)
                gate.wait()
                try:
                    won.append(held.enter_context(lease))
                except CheckpointError as error:
                    lost.append(str(error))

            threads = [threading.Thread(target=take) for _ in range(8)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            assert (len(winners), len(refused)) == (1, 7)
            assert winners[0].confirm()
            assert all("is being written by" in message for message in refused)
            assert names(folder) == ["lease.json"]


def test_a_taker_that_died_while_taking_over_does_not_block_the_folder(tmp_path: Path) -> None:
    dead = elsewhere()
    leave(tmp_path, dead, silent_seconds=LONG + 5)
    claim = tmp_path / f".lease.json.taken.{dead.token}"
    claim.write_text(json.dumps(dataclasses.asdict(owner(process_start=1))))
    with Lease(tmp_path, timeout_seconds=LONG) as lease:
        assert lease.confirm()
        assert names(tmp_path) == ["lease.json"]


def test_a_taker_at_work_is_not_disturbed(tmp_path: Path) -> None:
    dead = elsewhere()
    leave(tmp_path, dead, silent_seconds=LONG + 5)
    claim = tmp_path / f".lease.json.taken.{dead.token}"
    claim.write_text(json.dumps(dataclasses.asdict(owner())))
    refused = pytest.raises(CheckpointError, match=f"process {os.getpid()}")
    with refused, Lease(tmp_path, timeout_seconds=LONG):
        pass
    assert holder(tmp_path) == dead.token


def test_a_forked_child_does_not_give_the_lease_away(tmp_path: Path) -> None:
    with Lease(tmp_path, timeout_seconds=LONG) as lease:
        child = os.fork()
        if child == 0:
            lease.__exit__(None, None, None)
            os._exit(0)
        os.waitpid(child, 0)
        assert lease.confirm()


@pytest.mark.parametrize("place", ["/proc/self/task", "/dev/null/folder"])
def test_a_folder_that_cannot_be_written_is_named(place: str) -> None:
    # The system itself forbids these, even to root.
    expected = rf"cannot write lease\.json in checkpoint\.save '{place}' \(.+\); checkpoint\.save"
    with pytest.raises(CheckpointError, match=expected), Lease(Path(place), timeout_seconds=LONG):
        pass


def test_a_process_is_named_by_its_pid_and_start() -> None:
    assert process_start(os.getpid()) == process_start(os.getpid())
    assert process_start(2**22 + 1) is None
    assert re.fullmatch(r"[0-9a-f-]{36} pid:\[\d+\]", machine_identity() or "")
