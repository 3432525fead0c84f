"""What follows an attempt: by its exit code, its ranks' notes, its progress and its nodes."""

from __future__ import annotations

import errno
import json
from pathlib import Path
from typing import Any

import pytest

from megatron_mup.launching import decision
from megatron_mup.launching.decision import Ended, Limits, decide, decide_and_record
from megatron_mup.launching.run_folder import RunFolder
from megatron_mup.rank_outcomes import RankOutcome
from megatron_mup.status import RunState, Status, write_status
from tests.launching.run_folders import checkpoint, event_list, events


def begin(attempt: int, iteration: int | None) -> dict[str, Any]:
    return {"event": "begin", "attempt": attempt, "iteration": iteration}


def charged(attempt: int, *nodes: str, excluded: tuple[str, ...] = ()) -> dict[str, Any]:
    return {"event": "decide", "attempt": attempt, "charged": list(nodes),
            "excluded": list(excluded)}  # fmt: skip


def note(
    exit_code: int, reason: str = "RuntimeError: x", *, node: str = "n1", time: float = 0.0
) -> RankOutcome:
    return RankOutcome(rank=3, node=node, exit_code=exit_code, reason=reason, time=time)


def when(outcome: RankOutcome) -> float:
    return outcome.time


def signalled(attempt: int) -> dict[str, Any]:
    return {"event": "decide", "attempt": attempt, "signalled": True}


def line(
    exit_code: int,
    *notes: RankOutcome,
    before: tuple[dict[str, Any], ...] = (begin(1, None),),
    max_restarts: int = 3,
    exclude_after: int | None = None,
    iteration: int | None = None,
) -> str:
    ended = Ended(attempt=1, exit_code=exit_code, outcomes=notes, iteration=iteration)
    limits = Limits(max_restarts=max_restarts, exclude_after=exclude_after)
    return decide(ended, before, limits).line


def test_a_finished_run_is_finished() -> None:
    assert line(0) == "finished"


@pytest.mark.parametrize("exit_code", [2, 3, 77, 126, 127])
def test_what_another_start_cannot_mend_stops(exit_code: int) -> None:
    assert line(exit_code).startswith(f"stop exit {exit_code}: ")


def test_an_error_of_a_rank_stops_but_one_of_srun_itself_is_started_again_and_counted() -> None:
    assert line(1, note(1)).startswith("stop exit 1: ")
    assert line(1) == (
        "requeue exit 76: the ranks could not be started, or not be watched (the job step said 1)"
    )
    assert line(1, max_restarts=0).startswith("stop exit 76")


@pytest.mark.parametrize("exit_code", [74, 75, 76, 78, 79, 129, 134, 135, 137, 139, 143, 5])
def test_what_another_start_can_mend_is_started_again(exit_code: int) -> None:
    assert line(exit_code).startswith(f"requeue exit {exit_code}: ")


def test_a_signal_is_named() -> None:
    assert line(137) == "requeue exit 137: killed by signal 9"


@pytest.mark.parametrize("exit_code", [74, 75, 76, 79, 137])
def test_restarts_without_progress_are_counted_and_end(exit_code: int) -> None:
    # Three restarts are allowed: the fourth start in a row at iteration 100 is the last.
    before = (begin(1, None), begin(2, 100), begin(3, 100), begin(4, 100))
    assert line(exit_code, before=before, iteration=100).startswith("requeue")
    before = (*before, begin(5, 100))
    stopped = line(exit_code, before=before, iteration=100)
    assert stopped.startswith("stop")
    assert "4 starts in a row left no checkpoint after iteration 100" in stopped


def test_progress_starts_the_count_anew() -> None:
    before = tuple(begin(number, 100) for number in range(1, 9))
    assert line(75, before=before, iteration=101).startswith("requeue")


def test_attempts_that_ended_without_a_decision_count_too() -> None:
    # A node that dies takes the batch script with it: Slurm requeues, nobody decides.
    before = tuple(begin(number, None) for number in (1, 2, 3, 4))
    assert line(76, before=before).startswith("stop")


def test_ends_after_a_signal_are_no_failures() -> None:
    # Four preemptions, three failures: one more is allowed, and then none.
    before: tuple[dict[str, Any], ...] = ()
    for attempt in (1, 2, 3, 4):
        before += (begin(attempt, None), signalled(attempt))
    before += (begin(5, None), begin(6, None), begin(7, None))
    assert line(76, before=before).startswith("requeue")
    stopped = line(76, before=(*before, begin(8, None)))
    assert stopped.startswith("stop")
    assert "4 starts in a row left no checkpoint" in stopped


def test_time_limits_that_are_shorter_than_the_start_end_after_ten_times_as_many() -> None:
    before: tuple[dict[str, Any], ...] = ()
    for attempt in range(1, 20):
        before += (begin(attempt, 5), signalled(attempt))
    limits = Limits(max_restarts=2)
    for last, action in ((20, "requeue"), (21, "stop")):
        before += (begin(last, 5),)
        ended = Ended(attempt=last, exit_code=75, signalled=True, iteration=5)
        found = decide(ended, before, limits)
        assert found.action == action
        before += (signalled(last),)
    assert "21 starts that a signal ended in a row left no checkpoint" in found.reason


def test_zero_restarts_stops_at_the_first_failure() -> None:
    assert line(76, max_restarts=0).startswith("stop")


def test_the_first_rank_that_failed_by_itself_decides_whatever_the_step_says() -> None:
    # srun gives the highest code, of ranks that it killed; torchrun always 1.
    mistake = note(2, "ConfigError: no such option", node="n4", time=5.0)
    lost = note(76, "PeerLostError: another rank died", node="n1", time=6.0)
    for said in (137, 76, 1):
        found = line(said, lost, mistake)
        assert found.startswith("stop exit 2: a mistake that has to be mended first")
        assert "first rank 3 on n4: ConfigError: no such option" in found


def test_ranks_that_were_stopped_under_torchrun_are_started_again() -> None:
    assert line(1, note(75, "SIGUSR1"), note(75, "SIGUSR1")).startswith("requeue exit 75")
    assert line(1, note(76), note(75)).startswith("requeue exit 76")


def test_a_fault_of_the_machine_is_no_defect_and_counts_against_its_node() -> None:
    fault = note(1, "RuntimeError: CUDA error: uncorrectable ECC error encountered", node="n7")
    ended = Ended(attempt=1, exit_code=1, outcomes=(fault,))
    found = decide(ended, (begin(1, None),), Limits(max_restarts=3))
    assert found.action == "requeue"
    assert found.charged == ("n7",)
    assert "a machine failed" in found.reason


@pytest.mark.parametrize("exit_code", [132, 135, 136, 137, 139])
def test_a_rank_that_its_machine_ended_comes_before_what_its_peers_made_of_that(
    exit_code: int,
) -> None:
    peer = note(1, "RuntimeError: Connection closed by peer", node="n1", time=100.4)
    for time in (100.0, 102.0):
        killed = note(exit_code, f"ended with {exit_code}", node="n7", time=time)
        ended = Ended(attempt=1, exit_code=137, outcomes=sorted((peer, killed), key=when))
        found = decide(ended, (begin(1, None),), Limits(max_restarts=3, exclude_after=1))
        assert (found.action, found.charged) == ("resubmit", ("n7",))
        assert found.line.startswith(f"resubmit n7 exit {exit_code}: killed by signal")


def test_a_rank_that_is_killed_long_after_an_error_is_not_the_cause() -> None:
    # Slurm kills what is left two minutes after the first rank left.
    mistake = note(1, "KeyError: 'x'", node="n1", time=100.0)
    assert line(137, mistake, note(137, node="n7", time=103.0)).startswith("stop exit 1: ")


@pytest.mark.parametrize("follower", [76, 134, 143])
def test_ranks_that_only_follow_are_not_the_cause_and_cost_no_node(follower: int) -> None:
    # A rank notes its error and leaves 20 s later; a peer's watchdog was faster.
    mistake = note(1, "KeyError: 'x'", time=20.0)
    assert line(134, note(follower, node="n5", time=10.0), mistake).startswith("stop exit 1: ")
    alone = Ended(attempt=1, exit_code=1, outcomes=(note(follower, node="n5"),))
    found = decide(alone, (begin(1, None),), Limits(max_restarts=3, exclude_after=1))
    assert (found.action, found.charged) == ("requeue", ())
    assert found.reason.startswith(f"exit {follower}: ")


def test_a_clean_stop_stays_one_though_a_rank_fails_when_it_leaves() -> None:
    for late in (note(1, "RuntimeError: NCCL", time=9.0), note(139, "ended with 139", time=9.0)):
        for signalled, action in ((True, "requeue exit 75: "), (False, late.exit_code)):
            ended = Ended(attempt=1, exit_code=139, signalled=signalled, outcomes=(note(75), late))
            found = decide(ended, (begin(1, None),), Limits(max_restarts=3, exclude_after=1))
            if signalled:
                assert found.line.startswith(str(action))
                assert found.charged == ()
            else:
                assert f"exit {action}: " in found.line


def test_the_scheduler_s_own_kill_counts_against_no_node() -> None:
    ended = Ended(attempt=1, exit_code=137, signalled=True, outcomes=(note(137),))
    assert decide(ended, (begin(1, None),), Limits(max_restarts=3)).charged == ()


@pytest.mark.parametrize(
    "reason",
    ["DistNetworkError: The server socket has failed to listen: Address already in use",
     "RuntimeError: code: -98, name: EADDRINUSE"],
)  # fmt: skip
def test_a_port_that_is_taken_is_nobody_s_fault_and_starts_again(reason: str) -> None:
    ended = Ended(attempt=1, exit_code=1, outcomes=(note(1, reason),))
    found = decide(ended, (begin(1, None),), Limits(max_restarts=3, exclude_after=1))
    assert (found.action, found.charged) == ("requeue", ())
    assert found.reason.startswith("exit 1: another process had the port")


def test_a_defect_counts_against_no_node() -> None:
    ended = Ended(attempt=1, exit_code=1, outcomes=(note(1, "KeyError: 'x'"),))
    found = decide(ended, (begin(1, None),), Limits(max_restarts=3, exclude_after=1))
    assert (found.action, found.charged) == ("stop", ())


def judged(attempt: int, *nodes: str) -> dict[str, Any]:
    return {"event": "judge", "attempt": attempt, "bad_nodes": dict.fromkeys(nodes, "disk full")}


def test_a_node_is_avoided_after_so_many_failures_and_not_before() -> None:
    history = (begin(1, None), judged(1, "n2"))
    assert line(79, before=history, exclude_after=2).startswith("requeue")
    assert line(79, before=history, exclude_after=1).startswith("resubmit n2 exit 79: ")
    again = (charged(1, "n2"), begin(1, 5), judged(1, "n2", "n9"))
    assert line(79, before=again, exclude_after=2, iteration=5).startswith("resubmit n2 exit 79")
    assert line(79, before=again, exclude_after=None, iteration=5).startswith("requeue exit 79")


def test_nodes_that_are_avoided_already_stay_so_and_cause_no_second_resubmission() -> None:
    history = (charged(0, "n2", excluded=("n2",)), begin(1, None))
    assert line(76, before=history, exclude_after=1).startswith("requeue")
    history = (*history, judged(1, "n5"))
    assert line(79, before=history, exclude_after=1).startswith("resubmit n2,n5 ")


def test_nodes_stay_avoided_when_the_limit_is_raised_later() -> None:
    history = (charged(0, "n2", "n5", excluded=("n2",)), begin(1, None), judged(1, "n5"))
    assert line(79, before=history, exclude_after=2).startswith("resubmit n2,n5 ")


def test_another_attempt_s_bad_nodes_are_not_charged() -> None:
    history = (judged(7, "n2"), begin(1, None))
    assert line(79, before=history, exclude_after=1).startswith("requeue")


def test_the_answer_is_one_line_whatever_the_error_said() -> None:
    found = line(74, note(74, "first\nsecond line\n"))
    assert "\n" not in found
    assert found.endswith("first")


def test_a_start_that_left_nothing_is_told_without_an_iteration() -> None:
    before = tuple(begin(number, None) for number in (1, 2, 3, 4))
    assert line(76, before=before) == (
        "stop exit 76: a rank died or hung; 4 starts in a row left no checkpoint"
    )


def test_a_signal_before_training_saved_nothing() -> None:
    for iteration in (None, 40):
        assert line(75, iteration=iteration) == "requeue exit 75: stopped in time, without saving"
    assert line(75, note(75, "SIGUSR1"), iteration=40) == (
        "requeue exit 75: stopped in time, and saved"
    )


def test_what_every_node_failed_is_in_the_reason() -> None:
    found = {"event": "judge", "attempt": 1, "everywhere": ["checkpoint disk: full"]}
    before = (begin(1, None), found)
    assert line(2, before=before) == (
        "stop exit 2: every node failed the preflight: checkpoint disk: full"
    )
    # Passed, and then a rank found a mistake.
    assert "a mistake that has to be mended" in line(2, note(2), before=before)


def reported(run_dir: Path, **changes: Any) -> None:
    """A run's own words: 20 of 20 iterations, at time 50."""
    facts: dict[str, Any] = {
        "state": RunState.FINISHED, "iteration": 20, "train_iters": 20, "log_interval": 1,
        "lease_timeout_seconds": 60.0, "world_size": 1, "host": "n1", "pid": 1, "job_id": None,
        "revision": "r", "started": 1.0, "updated": 50.0,
    }  # fmt: skip
    write_status(run_dir / "checkpoints", Status(**facts | changes))


@pytest.mark.parametrize(
    ("begun", "saved", "changes", "action"),
    [
        (10.0, 20, {}, "finished"),
        (10.0, 15, {}, "requeue"),
        (10.0, 20, {"state": RunState.SAVING}, "requeue"),
        # Of the attempt before; this one is to train for longer.
        (60.0, 20, {}, "requeue"),
    ],
)
def test_a_signal_behind_the_last_checkpoint_does_not_bring_a_finished_run_back(
    tmp_path: Path, begun: float, saved: int, changes: dict[str, Any], action: str
) -> None:
    folder = event_list(tmp_path, {**begin(1, None), "time": begun})
    checkpoint(tmp_path, saved)
    reported(tmp_path, **changes)
    found = decide_and_record(
        folder, 1, 138, signalled=True, limits=Limits(max_restarts=3), environment={}, say=print
    )
    assert found.action == action
    assert events(tmp_path)[-1]["decision"] == action


def test_the_decision_is_remembered_with_what_it_was_made_from(tmp_path: Path) -> None:
    folder = event_list(tmp_path, begin(1, 10))
    checkpoint(tmp_path, 20)
    folder.outcomes(1).mkdir(parents=True)
    (folder.outcomes(1) / "rank-00003.json").write_text(
        json.dumps({"rank": 3, "node": "n7", "exit_code": 1, "time": 1.0,
                    "reason": "RuntimeError: CUDA error: unspecified launch failure"})
    )  # fmt: skip
    found = decide_and_record(
        folder,
        1,
        137,
        signalled=True,
        limits=Limits(max_restarts=1, exclude_after=1),
        environment={},
        say=print,
    )
    assert found.line.startswith("resubmit n7 exit 1: a machine failed (the job step said 137)")
    last = events(tmp_path)[-1]
    assert (last["event"], last["attempt"], last["exit_code"]) == ("decide", 1, 137)
    assert (last["signalled"], last["iteration"]) == (True, 20)
    assert (last["decision"], last["charged"], last["excluded"]) == ("resubmit", ["n7"], ["n7"])


def noted(folder: RunFolder, reason: str) -> None:
    folder.outcomes(1).mkdir(parents=True)
    # As the shell around a rank writes it.
    (folder.outcomes(1) / "rank-00003.json").write_text(
        f'{{"rank":3,"node":"n7","exit_code":1,"reason":"{reason}","time":1}}'
    )


def test_a_disk_that_is_full_costs_the_note_of_a_decision_and_not_the_decision(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, said = event_list(tmp_path, begin(1, 10)), list[str]()

    def full(*_arguments: object, **_facts: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(decision, "append_event", full)
    found = decide_and_record(
        folder, 1, 74, signalled=False, limits=Limits(max_restarts=1), environment={},
        say=said.append,
    )  # fmt: skip
    assert found.line == "requeue exit 74: a checkpoint could not be written"
    assert said == [
        f"warning: cannot note the decision in {folder.attempts}: No space left on device"
    ]


def test_secrets_in_a_rank_s_words_reach_neither_log_nor_list(tmp_path: Path) -> None:
    folder = event_list(tmp_path, begin(1, None))
    noted(folder, "HTTPError: plainword99 at https://me:s3cr3t@host, api_key=s3cr3t")
    found = decide_and_record(
        folder, 1, 1, signalled=False, limits=Limits(max_restarts=1),
        environment={"WANDB_API_KEY": "plainword99"}, say=print,
    )  # fmt: skip
    assert found.line == (
        "stop exit 1: an error that the log shows; first rank 3 on n7: HTTPError: *** at "
        "https://***@host, api_key=***"
    )
    assert events(tmp_path)[-1]["reason"] == found.reason
