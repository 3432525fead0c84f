"""How a run ends when it is asked to, or has to: exit code, message, and what is left on disk."""

from __future__ import annotations

import dataclasses
import json
import signal
from pathlib import Path

import numpy as np
import pytest

from megatron_mup.checkpoint.lease import Owner
from tests.faults.command_line import Process, pause
from tests.faults.runs import TRAIN_ITERS, Run

pytestmark = [pytest.mark.dist]

LONG = ["train_iters=100000", "lr_decay_iters=100000", "log_interval=1"]
"""More than any test waits for."""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_signal_saves_and_ends_and_the_next_start_continues(
    run: Run, number: signal.Signals
) -> None:
    process = run.start(*LONG)
    process.wait_for(process.output, "iteration      10/")
    process.send(number)
    assert process.wait() == 75
    assert f"{number.name}" in process.text
    (iteration,) = run.saved()
    assert iteration >= 10
    assert run.status["state"] == "stopped"
    assert run.status["last_checkpoint"] == iteration
    again = run.start(*LONG, log="again")
    again.wait_for(again.output, f"iteration {iteration + 2:>7}/")
    assert f"resuming from '{run.checkpoints}' at iteration {iteration}" in again.text
    again.kill()


def test_a_stopped_run_ends_in_the_uninterrupted_runs_losses(
    run: Run, uninterrupted: dict[int, float]
) -> None:
    process = run.start()
    process.wait_for(process.output, "iteration       3/")
    process.send(signal.SIGUSR1)
    code = process.wait()
    assert code in (75, 0)
    assert run.start().wait() == 0
    assert run.losses == uninterrupted


def test_a_signal_to_one_rank_stops_all_ranks_at_the_same_iteration(run: Run) -> None:
    ranks = run.start_ranks(2, *LONG, "tensor_model_parallel_size=2")
    ranks[0].wait_for(ranks[0].output, "iteration       5/")
    ranks[1].send(signal.SIGTERM)
    assert [rank.wait() for rank in ranks] == [75, 75]
    (iteration,) = run.saved()
    assert run.status["iteration"] == iteration


def test_the_time_limit_saves_and_ends(run: Run) -> None:
    process = run.start(*LONG, "exit_duration_in_mins=0.05")
    assert process.wait() == 75
    assert "exit_duration_in_mins" in process.text
    assert run.saved()


def test_a_rank_that_is_killed_ends_the_others_with_its_loss_in_words(run: Run) -> None:
    ranks = run.start_ranks(2, *LONG, "save_interval=5")
    ranks[0].wait_for(ranks[0].output, "iteration       8/")
    ranks[1].kill()
    assert ranks[0].wait() == 76
    assert "rank 0 lost another rank" in ranks[0].text
    assert max(run.saved()) >= 5
    assert run.status["state"] == "failed"


def test_a_full_disk_costs_only_the_checkpoint(run: Run, uninterrupted: dict[int, float]) -> None:
    first = run.start("save_interval=4")
    first.wait_for(run.checkpoints / "iter_0000008")
    first.kill()
    before = run.saved()
    # No file may grow beyond 20 kB: what a full disk does, where a test cannot fill one.
    full = run.start("save_interval=4", file_size_limit=20_000, log="full")
    assert full.wait() == 74
    assert "could not save iteration" in full.text
    assert f"iteration {TRAIN_ITERS:>7}/{TRAIN_ITERS}" in full.text
    assert run.saved() == before
    assert not list(run.checkpoints.glob("*.tmp"))
    assert run.start("save_interval=4").wait() == 0
    assert run.losses == uninterrupted


def test_divergence_stops_the_run_and_keeps_the_batch(run: Run) -> None:
    process = run.start("optimizer.lr=1e30", "lr_warmup_iters=0")
    assert process.wait() == 3
    assert "gradient norm is" in process.text
    assert not run.saved()
    assert run.status["state"] == "diverged"
    (kept,) = (run.checkpoints / "bad_batches").iterdir()
    with np.load(kept, allow_pickle=False) as batch:
        assert batch["tokens"].shape == batch["labels"].shape == (4, 16)
        assert (batch["tokens"][:, 1:] == batch["labels"][:, :-1]).all()
        assert "gradient norm" in str(batch["reason"])


def test_skipping_gives_up_after_too_many_bad_steps(run: Run) -> None:
    process = run.start(
        "optimizer.lr=1e30",
        "lr_warmup_iters=0",
        "bad_step_policy=skip",
        "max_skipped_steps=3",
    )
    assert process.wait() == 3
    assert process.text.count("its update is left out") == 3
    assert "faults.max_skipped_steps allows" in process.text


def test_data_that_runs_out_is_refused_before_training(run: Run) -> None:
    process = run.start("data.max_epochs=0.5")
    assert process.wait() == 2
    assert "the training data runs out" in process.text
    assert "iteration " not in process.text.split("error:")[0]


@pytest.mark.parametrize("folder", ["/proc/nowhere", "/dev/null/checkpoints"])
def test_a_folder_that_cannot_be_written_is_refused_before_training(run: Run, folder: str) -> None:
    process = run.start(f"checkpoint.save={folder}", f"checkpoint.load={folder}")
    assert process.wait() == 2
    assert f"cannot write to '{folder}' of checkpoint.save" in process.text


def test_a_second_job_is_refused_while_the_first_lives_and_takes_over_when_it_is_dead(
    run: Run,
) -> None:
    first = run.start(*LONG, "save_interval=5")
    first.wait_for(run.checkpoints / "iter_0000005")
    second = run.start(*LONG, log="second")
    assert second.wait() == 2
    assert f"process {first.pid}" in second.text
    first.kill()
    newest = max(run.saved())
    third = run.start(*LONG, log="third")
    third.wait_for(third.output, f"iteration {newest + 2:>7}/")
    assert "taken over from" in third.text
    third.send(signal.SIGTERM)
    assert third.wait() == 75


def test_the_newest_whole_checkpoint_is_used_when_one_is_damaged(
    run: Run, uninterrupted: dict[int, float]
) -> None:
    process = run.start("save_interval=4")
    process.wait_for(run.checkpoints / "iter_0000012")
    process.kill()
    *_, before, last = run.saved()
    newest = run.checkpoints / f"iter_{last:07d}"
    flip_one_bit(next(newest.glob("*.distcp")))
    again = run.start("save_interval=4", log="again")
    assert again.wait() == 0
    assert f"{newest} is not used" in again.text
    assert f"resuming from '{run.checkpoints}' at iteration {before}" in again.text
    assert run.losses == uninterrupted


def test_a_run_whose_folder_another_job_has_taken_ends_and_leaves_it_as_it_is(run: Run) -> None:
    options = ["train_iters=300", "lr_decay_iters=300", "save_interval=50"]
    ranks = run.start_ranks(2, *options, f"lease_timeout_seconds={SHORT_SECONDS}")
    ranks[0].wait_for(ranks[0].output, "iteration      55/")
    freeze_between_writes(ranks[0], run)
    # Without a sign of life for longer than the timeout, the first rank counts as dead.
    pause(2 * SHORT_SECONDS)
    theirs = take_over(run.checkpoints)
    ranks[0].send(signal.SIGCONT)
    assert [rank.wait() for rank in ranks] == [77, 77]
    assert "another job has taken the save folder over" in ranks[0].text
    assert contents(run.checkpoints) == theirs


SHORT_SECONDS = 0.5
"""faults.lease_timeout_seconds of a run that is stopped for longer."""


def freeze_between_writes(process: Process, run: Run) -> None:
    """Stop a process while it is replacing no file: that it would do when it goes on."""
    while True:
        process.send(signal.SIGSTOP)
        process.wait_until(lambda: "T (stopped)" in state_of(process.pid), "stop")
        if not list(run.checkpoints.rglob("*.tmp")):
            return
        process.send(signal.SIGCONT)


def state_of(pid: int) -> str:
    """What the kernel says of a process."""
    return Path(f"/proc/{pid}/status").read_text()


def take_over(folder: Path) -> dict[str, bytes]:
    """Write what a job does that takes a folder over and saves; the folder's contents then."""
    owner = dataclasses.replace(Owner.this_process({}), job_id="4711")
    lease = folder / "second.tmp"
    lease.write_text(json.dumps(dataclasses.asdict(owner)))
    lease.replace(folder / "lease.json")
    (folder / "status.json").write_text('{"state": "training"}')
    for name in ("iter_0000100", "iter_0000150.tmp"):
        (folder / name).mkdir()
        (folder / name / "theirs").write_bytes(b"theirs")
    return contents(folder)


def contents(folder: Path) -> dict[str, bytes]:
    """All files below a folder."""
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def flip_one_bit(path: Path) -> None:
    """Change the middle of a file, not its length."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
