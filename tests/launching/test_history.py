"""What ``megatron-mup status`` tells of a run that a launch script began."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest

from megatron_mup.errors import CheckpointError
from megatron_mup.launching.history import find_history
from megatron_mup.status_report import inspect_folder, render
from tests.launching.run_folders import event_list

BEGINNINGS: list[dict[str, Any]] = [
    {"event": "begin", "attempt": 1, "lr": 0.5, "lr_source": "--lr 0.5", "snapshot": "snapshot"},
    {"event": "judge", "attempt": 1, "bad_nodes": {"n2": "disk: full"}},
    {"event": "decide", "attempt": 1, "decision": "resubmit", "reason": "exit 79: x",
     "charged": ["n2"], "excluded": ["n2"]},
    {"event": "begin", "attempt": 2, "lr": 0.25, "lr_source": "--lr-from best.yaml",
     "snapshot": "snapshot-0002"},
]  # fmt: skip


def stopped(reason: str) -> dict[str, Any]:
    return {"event": "decide", "attempt": 2, "decision": "stop", "reason": reason,
            "charged": ["n2", "n3"], "excluded": []}  # fmt: skip


def test_a_run_folder_shows_its_attempts(tmp_path: Path) -> None:
    event_list(tmp_path, *BEGINNINGS)
    (tmp_path / "checkpoints").mkdir()
    for folder in (tmp_path, tmp_path / "checkpoints"):
        report = inspect_folder(folder)
        assert render(report).splitlines() == [
            "not started",
            "no checkpoint yet",
            "attempt 2, 1 restarts; no decision on it yet; decision after attempt 1: resubmit exit "
            "79: x",
            "learning rate 0.25 by --lr-from best.yaml",
            "failed nodes: n2 (1)",
            "excluded nodes: n2",
            "snapshot: launch/snapshot-0002",
            "healthy",
        ]


def test_a_run_that_was_given_up_is_not_healthy(tmp_path: Path) -> None:
    event_list(tmp_path, *BEGINNINGS, stopped("exit 2: a mistake"))
    report = inspect_folder(tmp_path)
    assert report.problems == ("the launch script gave up: exit 2: a mistake",)
    found = report.to_json()["launch"]
    assert json.loads(json.dumps(found)) == {
        "save_folder": f"{tmp_path}/checkpoints",
        "attempts": 2,
        "decision": "stop exit 2: a mistake",
        "failures": {"n2": 2, "n3": 1},
        "excluded": ["n2"],
        "snapshot": "snapshot-0002",
        "lr": 0.25,
        "lr_source": "--lr-from best.yaml",
        "others": [],
        "decided": None,
    }


def test_an_old_stop_is_no_problem_of_a_new_attempt(tmp_path: Path) -> None:
    event_list(
        tmp_path, *BEGINNINGS, stopped("exit 2: a mistake"), {"event": "begin", "attempt": 3}
    )
    assert inspect_folder(tmp_path).problems == ()


def test_a_second_job_that_was_refused_is_no_problem_of_the_one_that_trains(
    tmp_path: Path,
) -> None:
    folder = event_list(
        tmp_path,
        {"event": "begin", "attempt": 1, "job": "7"},
        {"event": "decide", "attempt": 1, "decision": "requeue", "reason": "exit 76: x"},
        {"event": "begin", "attempt": 2, "job": "7", "lr": 0.5, "lr_source": "--lr 0.5"},
        {"event": "begin", "attempt": 3, "job": "8", "lr": 0.5, "lr_source": "--lr 0.5"},
        {"event": "judge", "attempt": 3, "bad_nodes": {"n2": "disk: full"}},
        {"event": "decide", "attempt": 3, "decision": "stop", "reason": "exit 2: in use"},
    )
    refused = (
        "the launch script gave up: exit 2: in use",
        "node n2 failed the preflight: disk: full",
    )
    lease = tmp_path / "checkpoints" / "lease.json"
    lease.parent.mkdir()
    lease.write_text('{"job_id": "7"}')
    found = find_history(tmp_path)
    assert found is not None
    assert found.problems == ()
    assert found.lines == [
        "attempt 3, 2 restarts; no decision on it yet; decision after attempt 1: requeue exit 76: "
        "x",
        "attempt 3, of job 8, does not train: job 7 holds the folder",
        "learning rate 0.5 by --lr 0.5",
    ]
    # Without a lease, with that of an unknown job, or an old or damaged one, the last one counts.
    damaged = ('{"job_id": "9"}', '{"job_id": null}', '{"job_id": ["7"]}', "[", "")
    for text in damaged:
        lease.write_text(text)
        found = find_history(tmp_path)
        assert found is not None
        assert (found.problems, found.others) == (refused, ())
    lease.write_text('{"job_id": "7"}')
    # The usual 120 seconds are over; then the run's own limit.
    os.utime(lease, (time.time() - 130, time.time() - 130))
    assert inspect_folder(tmp_path).problems[:2] == refused
    folder.config.write_text('{"faults": {"lease_timeout_seconds": 600}}')
    assert not set(refused) & set(inspect_folder(tmp_path).problems)


def test_a_run_that_no_node_could_start_has_not_started_and_says_why(tmp_path: Path) -> None:
    judged = {"event": "judge", "attempt": 1, "bad_nodes": {"n2": "clock: late"},
              "everywhere": ["checkpoint disk: full"], "stuck": "n1 hangs"}  # fmt: skip
    event_list(tmp_path, {"event": "begin", "attempt": 1}, judged)
    report = inspect_folder(tmp_path)
    assert report.problems == (
        "every node failed the preflight: checkpoint disk: full",
        "the preflight did not end: n1 hangs",
        "node n2 failed the preflight: clock: late",
    )
    assert render(report).splitlines()[0] == "not started"


def test_a_launch_folder_before_its_first_attempt_points_to_the_log(tmp_path: Path) -> None:
    (tmp_path / "launch").mkdir()
    with pytest.raises(CheckpointError, match="no attempt has begun yet; see slurm-NAME-JOB"):
        inspect_folder(tmp_path)


def test_nodes_that_failed_now_are_problems(tmp_path: Path) -> None:
    event_list(tmp_path, *BEGINNINGS[:2])
    assert inspect_folder(tmp_path).problems == ("node n2 failed the preflight: disk: full",)


def test_a_save_folder_elsewhere_is_found_and_a_stranger_s_is_not(tmp_path: Path) -> None:
    folder = event_list(tmp_path / "run", *BEGINNINGS)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    folder.config.write_text(json.dumps({"checkpoint": {"save": str(elsewhere)}}))
    found = find_history(tmp_path / "run")
    assert found is not None
    assert found.save_folder == elsewhere
    # A folder beside it that is not of this run.
    (tmp_path / "run" / "other").mkdir()
    assert find_history(tmp_path / "run" / "other") is None


@pytest.mark.parametrize("text", ["", "[]\n", '{"event": "judge", "attempt": 1}\n'])
def test_a_folder_without_a_beginning_is_no_run(text: str, tmp_path: Path) -> None:
    event_list(tmp_path).attempts.write_text(text)
    assert find_history(tmp_path) is None
    with pytest.raises(CheckpointError):
        inspect_folder(tmp_path)


@pytest.mark.parametrize(
    "odd", [{"lr": "x", "lr_source": 3, "snapshot": []}, {"lr": None, "extra": {}}]
)
def test_odd_values_are_left_out(odd: dict[str, Any], tmp_path: Path) -> None:
    event_list(
        tmp_path,
        {"event": "begin", "attempt": 1, **odd},
        {"event": "judge", "attempt": 1, "bad_nodes": "n2"},
        {"event": "decide", "attempt": 0, "charged": "n2", "excluded": [3], "decision": None},
    )
    found = find_history(tmp_path)
    assert found is not None
    assert (found.lr, found.lr_source, found.snapshot, found.excluded) == (None, None, None, ())
    assert found.failures == {}


def test_a_damaged_configuration_is_no_traceback(tmp_path: Path) -> None:
    event_list(tmp_path, *BEGINNINGS).config.write_text("a: [")
    assert find_history(tmp_path) is None
