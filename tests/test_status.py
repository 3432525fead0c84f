"""What a run says of itself, and what ``megatron-mup status`` makes of a folder, damaged or not."""

from __future__ import annotations

import json
import logging
import math
import os
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from megatron_mup import cli
from megatron_mup.checkpoint.lease import Owner
from megatron_mup.errors import CheckpointError
from megatron_mup.status import RunState, Status, StatusWriter, read_status, write_status
from megatron_mup.status_report import Report, inspect_folder, render
from tests.configurations import tiny

NOW = 1_700_000_000.0
STATUS = Status(
    state=RunState.TRAINING,
    iteration=1200,
    train_iters=10_000,
    log_interval=10,
    lease_timeout_seconds=120.0,
    world_size=64,
    host="node7",
    pid=4242,
    job_id="991",
    revision="0.1.0-abc",
    started=NOW - 5000,
    updated=NOW - 5,
    seconds_per_iteration=0.5,
    metrics={"lm loss": 2.0, "tokens/sec": 123456.0, "tflops/device": 412.34, "mfu": 0.4164},
    losses=((1170, 2.5), (1180, 2.3), (1190, 2.2), (1200, 2.0)),
    skipped_steps=3,
)


def checkpoint(folder: Path, iteration: int, *, age: float, train_iters: object = 10_000) -> None:
    """A published checkpoint, as far as it matters here."""
    path = folder / f"iter_{iteration:07d}"
    path.mkdir()
    record = {"config": {"training": {"train_iters": train_iters}}}
    (path / "parameterization.json").write_text(json.dumps(record))
    (path / "checksums.json").write_text("{}")
    os.utime(path / "checksums.json", (NOW - age, NOW - age))


def lease(folder: Path, *, age: float) -> None:
    """A heartbeat of that age in seconds."""
    path = folder / "lease.json"
    path.write_text("{}")
    os.utime(path, (NOW - age, NOW - age))


def inspect(folder: Path, *, at: float = NOW) -> Report:
    return inspect_folder(folder, clock=lambda: at)


def test_a_run_that_trains_is_shown_with_progress_health_and_time_left(tmp_path: Path) -> None:
    write_status(tmp_path, STATUS)
    checkpoint(tmp_path, 500, age=4000)
    checkpoint(tmp_path, 1000, age=120)
    lease(tmp_path, age=7)
    assert render(inspect(tmp_path)) == "\n".join(
        [
            # 8,800 iterations of half a second.
            "training, iteration 1,200 of 10,000 (12.0%), 0.5 s per iteration, 1:13:20 left",
            "loss 2.0000 at iteration 1,200, -0.3000 over the last 4 log lines",
            "123,456 tokens/s, 412.3 model TFLOP/s per device, MFU 41.6%",
            "last checkpoint: iteration 1,000, 0:02:00 old",
            "skipped steps: 3",
            "job 991, host node7, process 4242, 64 ranks, megatron_mup 0.1.0-abc; last report "
            "0:00:05 ago",
            "healthy",
        ]
    )


def test_json_holds_the_same_numbers(tmp_path: Path) -> None:
    write_status(tmp_path, replace(STATUS, metrics={"lm loss": math.nan}))
    lease(tmp_path, age=7)
    shown = inspect(tmp_path).to_json()
    assert json.loads(json.dumps(shown, allow_nan=False)) == {
        "healthy": False,
        "problems": ["the last loss is not a number"],
        "state": "training",
        "exit_reason": None,
        "iteration": 1200,
        "train_iters": 10000,
        "fraction": 0.12,
        "seconds_per_iteration": 0.5,
        "seconds_left": 4400.0,
        "last_checkpoint": None,
        "last_checkpoint_age_seconds": None,
        "heartbeat_age_seconds": 7.0,
        "status_age_seconds": 5.0,
        "loss_change": pytest.approx(-0.3),
        "skipped_steps": 3,
        "job_id": "991",
        "host": "node7",
        "pid": 4242,
        "world_size": 64,
        "revision": "0.1.0-abc",
        "launch": None,
        "metrics": {"lm loss": None},
    }


@pytest.mark.parametrize(
    ("changes", "heartbeat", "at", "problem"),
    [
        ({}, 121, NOW, "no sign of life for 121 s (faults.lease_timeout_seconds 120)"),
        ({}, None, NOW, "no process holds the folder (lease.json is gone)"),
        # The heartbeat goes on, but 10 steps of half a second have not come for 126 seconds.
        ({}, 6, NOW + 121, "logged nothing for 126 s (usually 5 s)"),
        ({"metrics": {"skipped-fraction": 1.0}}, 6, NOW, "every step of the last log interval"),
        ({"state": RunState.DIVERGED, "exit_reason": "loss is nan"}, None, NOW,
         "the run diverged: loss is nan"),
        ({"state": RunState.FAILED}, None, NOW, "the run failed: no reason is given"),
        ({"last_checkpoint": 1000}, 6, NOW, "the checkpoint of iteration 1000 is gone"),
        (
            {"state": RunState.FINISHED, "metrics": {"lm loss validation": math.nan}},
            None,
            NOW,
            "the last held-out loss is not a number",
        ),
    ],
)  # fmt: skip
def test_a_run_that_is_not_well_is_told_why(
    changes: dict[str, Any], heartbeat: float | None, at: float, problem: str, tmp_path: Path
) -> None:
    write_status(tmp_path, replace(STATUS, **changes))
    if heartbeat is not None:
        lease(tmp_path, age=heartbeat - (at - NOW))
    (told,) = inspect(tmp_path, at=at).problems
    assert problem in told


@pytest.mark.parametrize(
    ("changes", "heartbeat"),
    [
        ({"state": RunState.FINISHED}, None),
        ({"state": RunState.STOPPED, "exit_reason": "SIGTERM"}, None),
        ({"state": RunState.SAVING, "updated": NOW - 1000}, 119),
        ({"state": RunState.EVALUATING, "updated": NOW - 1000}, 6),
        ({"state": RunState.STARTING, "seconds_per_iteration": None, "updated": NOW - 1000}, 6),
        # Ten intervals of 100 s are longer than the lease's time limit.
        ({"seconds_per_iteration": 10.0, "updated": NOW - 999}, 6),
    ],
)
def test_a_run_that_ended_well_or_has_reason_to_be_silent_is_healthy(
    changes: dict[str, Any], heartbeat: float | None, tmp_path: Path
) -> None:
    write_status(tmp_path, replace(STATUS, **changes))
    if heartbeat is not None:
        lease(tmp_path, age=heartbeat)
    assert inspect(tmp_path).problems == ()


def test_the_reason_of_a_stop_is_shown_and_no_time_left(tmp_path: Path) -> None:
    write_status(tmp_path, replace(STATUS, state=RunState.STOPPED, exit_reason="SIGTERM"))
    text = render(inspect(tmp_path))
    assert text.startswith("stopped (SIGTERM), iteration 1,200 of 10,000 (12.0%)")
    assert "left" not in text


def test_a_folder_of_checkpoints_alone_tells_how_far_the_run_came(tmp_path: Path) -> None:
    checkpoint(tmp_path, 2500, age=90)
    report = inspect(tmp_path)
    assert render(report).splitlines() == [
        "unknown state, iteration 2,500 of 10,000 (25.0%)",
        "last checkpoint: iteration 2,500, 0:01:30 old",
        "problem: without status.json and lease.json, nothing says that the run goes on",
        "not healthy",
    ]


def test_a_folder_of_checkpoints_of_a_finished_run_is_healthy(tmp_path: Path) -> None:
    checkpoint(tmp_path, 2500, age=90, train_iters=2500)
    assert inspect(tmp_path).problems == ()


@pytest.mark.parametrize("train_iters", ["x", None, -1, True, 1.5, [], 10**30])
def test_a_record_that_says_nothing_sensible_leaves_the_length_open(
    train_iters: object, tmp_path: Path
) -> None:
    checkpoint(tmp_path, 2500, age=90, train_iters=train_iters)
    assert inspect(tmp_path).train_iters is None


def test_an_incomplete_checkpoint_does_not_count(tmp_path: Path) -> None:
    checkpoint(tmp_path, 500, age=10)
    (tmp_path / "iter_0001000.tmp").mkdir()
    (tmp_path / "iter_0002000").mkdir()
    assert inspect(tmp_path).checkpoint == 500


def test_nothing_of_a_run_is_an_error_with_a_cure(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"holds neither status\.json nor a checkpoint; give"):
        inspect(tmp_path)
    with pytest.raises(CheckpointError, match="is not a folder; give the folder that checkpoint"):
        inspect(tmp_path / "missing")


VALID = {
    "state": "training", "iteration": 5, "train_iters": 10, "log_interval": 1,
    "lease_timeout_seconds": 120.0, "world_size": 1, "host": "h", "pid": 1, "job_id": None,
    "revision": "r", "started": 1.0, "updated": 2.0, "seconds_per_iteration": None, "metrics": {},
    "losses": [], "last_checkpoint": None, "skipped_steps": 0, "exit_reason": None,
}  # fmt: skip


def test_the_valid_example_is_read_and_unknown_fields_are_passed_over(tmp_path: Path) -> None:
    (tmp_path / "status.json").write_text(json.dumps({**VALID, "of a later version": 1}))
    assert read_status(tmp_path).iteration == 5


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("state", "dancing"), ("state", ["training"]), ("iteration", -1), ("iteration", True),
        ("iteration", 2**60), ("train_iters", 0), ("train_iters", "10"), ("log_interval", 0),
        ("lease_timeout_seconds", -1), ("updated", 1e200), ("started", None), ("host", 5),
        ("host", "x" * 5000), ("metrics", []), ("metrics", {"a": "b"}), ("losses", [[1]]),
        ("metrics", {"a": math.inf}), ("metrics", {"tokens/sec": 10**400}),
        ("losses", [[1, "x"]]), ("losses", {}), ("exit_reason", 3), ("seconds_per_iteration", "1"),
    ],
)  # fmt: skip
def test_a_field_with_a_senseless_value_is_named(field: str, value: object, tmp_path: Path) -> None:
    (tmp_path / "status.json").write_text(json.dumps({**VALID, field: value}))
    (first, *_) = inspect(tmp_path).problems
    assert first.startswith("status.json holds ")
    assert first.endswith(f" as '{field}'")


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"", "is not JSON"),
        (b"\xff\xfe", "is not text"),
        (b"{", "is not JSON"),
        (b"[1]", "does not hold a JSON object"),
        (b"{}", "holds nothing as 'state'"),
        (b'{"a":' + b"[" * 200_000, "is not JSON"),
        (b'{"pid": ' + b"9" * 5000 + b"}", "is not JSON"),
        (b" " * 1_000_001, "is larger than 1000000 bytes"),
        (b"cos\nsystem\n(S'touch ran'\ntR.", "is not JSON"),
        (json.dumps(VALID).replace('"pid": 1', '"pid": NaN').encode(), "holds nan as 'pid'"),
    ],
)
def test_a_damaged_status_is_a_sentence_beside_what_the_checkpoints_say(
    content: bytes, sentence: str, tmp_path: Path
) -> None:
    (tmp_path / "status.json").write_bytes(content)
    checkpoint(tmp_path, 2500, age=90)
    report = inspect(tmp_path)
    assert report.problems[0] == f"status.json {sentence}"
    assert (report.iteration, report.train_iters) == (2500, 10000)


def test_a_pipe_or_a_folder_of_that_name_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "status.json")
    assert inspect(tmp_path).problems[0] == "status.json is not a file"
    (tmp_path / "status.json").unlink()
    (tmp_path / "status.json").mkdir()
    assert inspect(tmp_path).problems[0] == "status.json is not a file"


def test_text_from_a_file_cannot_drive_the_terminal(tmp_path: Path) -> None:
    data = {**VALID, "host": "\x1b[2Jnode\n7\ud800", "state": "failed", "exit_reason": "\r\x07bad"}
    (tmp_path / "status.json").write_text(json.dumps(data))
    text = render(inspect(tmp_path))
    assert "host ?[2Jnode?7?," in text
    assert "failed (??bad)" in text
    text.encode()


def test_looking_writes_nothing(tmp_path: Path) -> None:
    write_status(tmp_path, STATUS)
    checkpoint(tmp_path, 500, age=10)
    before = sorted((path, path.stat().st_mtime_ns) for path in tmp_path.rglob("*"))
    inspect(tmp_path)
    assert sorted((path, path.stat().st_mtime_ns) for path in tmp_path.rglob("*")) == before


def test_the_writer_reports_every_change(tmp_path: Path) -> None:
    writer = StatusWriter(tmp_path, tiny(), iteration=2, world_size=4, job_id="17")
    first = read_status(tmp_path)
    assert (first.state, first.iteration, first.train_iters) == (RunState.STARTING, 2, 6)
    assert (first.pid, first.job_id, first.world_size) == (os.getpid(), "17", 4)
    assert first.revision.startswith("0.")
    writer.enter(RunState.TRAINING)
    for iteration in range(3, 30):
        loss = math.inf if iteration == 29 else float(iteration)
        writer.logged(iteration, {"lm loss": loss}, seconds_per_iteration=0.25, skipped_steps=1)
    writer.logged(29, {"lm loss validation": 1.0}, seconds_per_iteration=0.25, skipped_steps=1)
    writer.saved(29)
    writer.enter(RunState.STOPPED, exit_reason="SIGTERM")
    last = read_status(tmp_path)
    assert (last.state, last.exit_reason) == (RunState.STOPPED, "SIGTERM")
    assert (last.iteration, last.last_checkpoint, last.skipped_steps) == (29, 29, 1)
    assert last.seconds_per_iteration == 0.25
    # An evaluation's log line does not hide what training said.
    assert set(last.metrics) == {"lm loss", "lm loss validation"}
    # The newest 20; an infinite loss is not a number in JSON.
    assert [iteration for iteration, _ in last.losses] == list(range(10, 30))
    assert math.isnan(last.losses[-1][1])
    assert last.updated >= first.updated >= first.started
    assert [path.name for path in tmp_path.iterdir()] == ["status.json"]


def test_fast_log_lines_are_reported_once_a_second(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 50.0
    monkeypatch.setattr("megatron_mup.status.time.monotonic", lambda: now)
    writer = StatusWriter(tmp_path, tiny())
    seen = []
    for iteration in range(1, 6):
        now += 0.4
        writer.logged(iteration, {}, seconds_per_iteration=0.4)
        seen.append(read_status(tmp_path).iteration)
    assert seen == [0, 0, 3, 3, 3]
    writer.enter(RunState.SAVING)
    assert read_status(tmp_path).iteration == 5


def test_a_status_that_cannot_be_written_is_reported_once_and_costs_nothing_else(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    gone = tmp_path / "gone"
    with caplog.at_level(logging.WARNING):
        writer = StatusWriter(gone, tiny())
        writer.enter(RunState.TRAINING)
    (message,) = [record.getMessage() for record in caplog.records]
    assert message.startswith(f"cannot write {gone / 'status.json'}")
    gone.mkdir()
    writer.enter(RunState.SAVING)
    assert read_status(gone).state is RunState.SAVING


def test_without_a_save_folder_nothing_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    StatusWriter(None, tiny()).enter(RunState.TRAINING)
    assert list(tmp_path.iterdir()) == []


def command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: str
) -> tuple[object, str, str]:
    """Exit code, output and errors of ``megatron-mup status``."""
    monkeypatch.setattr(sys, "argv", ["megatron-mup", "status", *arguments])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    output = capsys.readouterr()
    return ended.value.code, output.out, output.err


def test_the_command_ends_with_0_1_or_2(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code, _, errors = command(monkeypatch, capsys, str(tmp_path))
    assert code == 2
    assert errors.startswith("error: ")
    write_status(tmp_path, replace(STATUS, state=RunState.FINISHED))
    code, text, _ = command(monkeypatch, capsys, str(tmp_path))
    assert (code, text.splitlines()[-1]) == (0, "healthy")
    write_status(tmp_path, replace(STATUS, state=RunState.FAILED, exit_reason="disk full"))
    code, text, _ = command(monkeypatch, capsys, str(tmp_path), "--json")
    assert code == 1
    assert json.loads(text)["problems"] == ["the run failed: disk full"]


def test_a_process_that_was_killed_on_this_machine_is_missed_at_once(tmp_path: Path) -> None:
    dead = replace(Owner.this_process(), process_start=1)
    write_status(tmp_path, STATUS)
    lease(tmp_path, age=1)
    (tmp_path / "lease.json").write_text(json.dumps(asdict(dead)))
    os.utime(tmp_path / "lease.json", (NOW - 1, NOW - 1))
    (told,) = inspect(tmp_path).problems
    assert told == "process 4242 on this machine is gone: it was killed"
    (tmp_path / "lease.json").write_text(json.dumps(asdict(Owner.this_process())))
    os.utime(tmp_path / "lease.json", (NOW - 1, NOW - 1))
    assert inspect(tmp_path).problems == ()


def test_a_stop_between_log_lines_is_told_by_its_checkpoint(tmp_path: Path) -> None:
    writer = StatusWriter(tmp_path, tiny(), iteration=0, world_size=1, job_id=None)
    writer.logged(200, {"lm loss": 2.0}, seconds_per_iteration=1.0)
    writer.saved(212)
    assert read_status(tmp_path).iteration == 212
