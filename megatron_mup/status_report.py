"""``megatron-mup status DIR``: what the save folder of a run tells about it.

Looks at ``status.json`` (the run's own words), the age of ``lease.json`` (the heartbeat of the
process that owns the folder), the checkpoints and, where a launch script began the run, what
``launching`` remembers of its attempts. Nothing is written or executed,
and every file may hold anything: what is wrong with one is a sentence of the report. Ages compare
file times with this machine's clock.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

from megatron_mup.checkpoint.folders import RECORD, usable_iterations
from megatron_mup.checkpoint.integrity import CHECKSUMS, checkpoint_folder
from megatron_mup.checkpoint.lease import LEASE, owner_is_gone
from megatron_mup.config import FaultConfig
from megatron_mup.errors import CheckpointError, MupError
from megatron_mup.launching.history import LaunchHistory, find_history
from megatron_mup.status import STATUS, RunState, Status, is_count, read_json, read_status

STALL_FACTOR = 10.0
"""A process that lives but has been silent for this many times its usual interval hangs
(assumption: evaluation and saving are states of their own)."""


@dataclass(frozen=True, kw_only=True)
class Report:
    """What a save folder tells.

    Attributes:
        folder: the save folder.
        problems: sentences; none means healthy.
        status: the run's own last words, if they can be read.
        iteration: last known iteration: of the status, else of the newest checkpoint.
        train_iters: iterations of the whole run, if known.
        checkpoint: iteration of the newest whole checkpoint.
        checkpoint_age: seconds since it was written.
        heartbeat_age: seconds since the owning process was heard of; None without a lease.
        status_age: seconds since the last words.
        launch: attempts of the launch script; None where none began the run.
    """

    folder: Path
    problems: tuple[str, ...]
    status: Status | None
    iteration: int | None
    train_iters: int | None
    checkpoint: int | None
    checkpoint_age: float | None
    heartbeat_age: float | None
    status_age: float | None
    launch: LaunchHistory | None = None

    @property
    def healthy(self) -> bool:
        """Whether the run goes on, or has ended as it should."""
        return not self.problems

    @property
    def fraction(self) -> float | None:
        """Share of the iterations that is done, at most 1."""
        if self.iteration is None or self.train_iters is None:
            return None
        return min(1.0, self.iteration / self.train_iters)

    @property
    def seconds_left(self) -> float | None:
        """Expected seconds to the end of a run that is active."""
        status = self.status
        if status is None or not status.state.active or status.seconds_per_iteration is None:
            return None
        return status.seconds_per_iteration * max(0, status.train_iters - status.iteration)

    @property
    def loss_change(self) -> float | None:
        """Mean loss of the newer half of the remembered log lines minus that of the older half."""
        losses = [loss for _, loss in self.status.losses] if self.status is not None else []
        half = len(losses) // 2
        if half == 0:
            return None
        return sum(losses[-half:]) / half - sum(losses[:half]) / half

    def to_json(self) -> dict[str, Any]:
        """Plain data; what is unknown or not finite is None."""
        status = self.status
        return {
            "healthy": self.healthy,
            "problems": list(self.problems),
            "state": None if status is None else status.state.value,
            "exit_reason": None if status is None else status.exit_reason,
            "iteration": self.iteration,
            "train_iters": self.train_iters,
            "fraction": self.fraction,
            "seconds_per_iteration": None if status is None else status.seconds_per_iteration,
            "seconds_left": self.seconds_left,
            "last_checkpoint": self.checkpoint,
            "last_checkpoint_age_seconds": self.checkpoint_age,
            "heartbeat_age_seconds": self.heartbeat_age,
            "status_age_seconds": self.status_age,
            "loss_change": _finite(self.loss_change),
            "skipped_steps": None if status is None else status.skipped_steps,
            "job_id": None if status is None else status.job_id,
            "host": None if status is None else status.host,
            "pid": None if status is None else status.pid,
            "world_size": None if status is None else status.world_size,
            "revision": None if status is None else status.revision,
            "launch": None if self.launch is None else self.launch.to_json(),
            "metrics": {}
            if status is None
            else {name: _finite(value) for name, value in status.metrics.items()},
        }


def inspect_folder(folder: Path, *, clock: Callable[[], float] = time.time) -> Report:
    """Look at a save folder.

    Args:
        folder: ``checkpoint.save`` of a run, or the run folder of a launch script.
        clock: seconds since 1970.

    Raises:
        CheckpointError: nothing in it is of a run.
    """
    _require_folder(folder)
    now = clock()
    launch = find_history(folder)
    problems = [] if launch is None else list(launch.problems)
    folder = folder if launch is None else launch.save_folder
    status = _status(folder, problems)
    checkpoint = _checkpoint(folder, problems)
    heartbeat = _age(folder / LEASE, now)
    nothing = status is None and checkpoint is None and heartbeat is None
    if nothing and launch is None and not problems:
        raise _no_run(folder)
    planned = None if checkpoint is None else _planned(folder, checkpoint)
    if status is not None:
        problems += _run_problems(status, heartbeat, now, gone=owner_is_gone(folder))
        if status.last_checkpoint is not None and (checkpoint or 0) < status.last_checkpoint:
            problems.append(f"the checkpoint of iteration {status.last_checkpoint} is gone")
    elif not (nothing and launch is not None):
        problems += _silent_problems(checkpoint, planned, heartbeat)
    return Report(
        folder=folder,
        problems=tuple(problems),
        status=status,
        iteration=checkpoint if status is None else status.iteration,
        train_iters=planned if status is None else status.train_iters,
        checkpoint=checkpoint,
        checkpoint_age=None if checkpoint is None else _checkpoint_age(folder, checkpoint, now),
        heartbeat_age=heartbeat,
        status_age=None if status is None else max(0.0, now - status.updated),
        launch=launch,
    )


def _no_run(folder: Path) -> CheckpointError:
    if (folder / "launch").is_dir():
        return CheckpointError(
            f"'{folder}' is the folder of a launch script, but no attempt has begun yet; see "
            "slurm-NAME-JOB.out in the folder of submission"
        )
    return CheckpointError(
        f"'{folder}' holds neither {STATUS} nor a checkpoint; give the folder that "
        "checkpoint.save names"
    )


def _require_folder(folder: Path) -> None:
    try:
        found = "is not a folder" if not folder.is_dir() else None
    except OSError as error:
        found = f"cannot be looked at ({error.strerror})"
    if found is not None:
        raise CheckpointError(f"'{folder}' {found}; give the folder that checkpoint.save names")


def _status(folder: Path, problems: list[str]) -> Status | None:
    try:
        return read_status(folder)
    except FileNotFoundError:
        return None
    except ValueError as error:
        problems.append(f"{STATUS} {error}")
        return None


def _checkpoint(folder: Path, problems: list[str]) -> int | None:
    try:
        usable = usable_iterations(folder)
    except (MupError, OSError) as error:
        problems.append(str(error))
        return None
    return usable[0] if usable else None


def _checkpoint_age(folder: Path, iteration: int, now: float) -> float | None:
    path = checkpoint_folder(folder, iteration)
    age = _age(path / CHECKSUMS, now)
    return _age(path / RECORD, now) if age is None else age


def _age(path: Path, now: float) -> float | None:
    """Seconds since a file was written; None without the file."""
    try:
        return max(0.0, now - path.stat().st_mtime)
    except OSError:
        return None


def _planned(folder: Path, iteration: int) -> int | None:
    """Length of the run by the record of a checkpoint; None if that cannot be read."""
    try:
        record = read_json(checkpoint_folder(folder, iteration) / RECORD, limit_bytes=100_000_000)
        train_iters = record["config"]["training"]["train_iters"]
    except (OSError, ValueError, LookupError, TypeError):
        return None
    return train_iters if is_count(train_iters) and train_iters > 0 else None


def _run_problems(status: Status, heartbeat: float | None, now: float, *, gone: bool) -> list[str]:
    problems = []
    if status.state in (RunState.DIVERGED, RunState.FAILED):
        problems.append(f"the run {status.state}: {status.exit_reason or 'no reason is given'}")
    held_out = status.metrics.get("lm loss validation")
    if held_out is not None and not math.isfinite(held_out):
        problems.append("the last held-out loss is not a number")
    loss = status.metrics.get("lm loss")
    if status.state.active:
        if gone:
            problems.append(f"process {status.pid} on this machine is gone: it was killed")
        else:
            problems += _life_problems(status, heartbeat, now - status.updated)
        if loss is not None and not math.isfinite(loss):
            problems.append("the last loss is not a number")
        if status.metrics.get("skipped-fraction") == 1.0:
            problems.append("every step of the last log interval was skipped")
    return problems


def _life_problems(status: Status, heartbeat: float | None, age: float) -> list[str]:
    timeout = status.lease_timeout_seconds
    if heartbeat is None:
        return [f"no process holds the folder ({LEASE} is gone): it ended without saying why"]
    if heartbeat > timeout:
        return [f"no sign of life for {heartbeat:.0f} s (faults.lease_timeout_seconds {timeout:g})"]
    # The heartbeat goes on in a process whose training hangs.
    usual = status.log_interval * (status.seconds_per_iteration or 0.0)
    silent = status.state is RunState.TRAINING and usual > 0
    if silent and age > max(timeout, STALL_FACTOR * usual):
        return [f"the process lives, but logged nothing for {age:.0f} s (usually {usual:.0f} s)"]
    return []


def _silent_problems(
    iteration: int | None, train_iters: int | None, heartbeat: float | None
) -> list[str]:
    """Of a folder without a readable status."""
    done = iteration is not None and train_iters is not None and iteration >= train_iters
    timeout = FaultConfig().lease_timeout_seconds
    if done or (heartbeat is not None and heartbeat <= timeout):
        return []
    if heartbeat is not None:
        return [f"no sign of life for {heartbeat:.0f} s"]
    return [f"without {STATUS} and {LEASE}, nothing says that the run goes on"]


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def render(report: Report) -> str:
    """The report for people, several lines."""
    lines = [_progress_line(report)]
    status = report.status
    if status is not None:
        lines += [line for line in (_loss_line(report), _speed_line(status)) if line]
    lines.append(_checkpoint_line(report))
    if status is not None:
        if status.skipped_steps:
            lines.append(f"skipped steps: {status.skipped_steps:,}")
        job = f"job {_shown(status.job_id)}, " if status.job_id else ""
        lines.append(
            f"{job}host {_shown(status.host)}, process {status.pid}, {status.world_size} ranks, "
            f"megatron_mup {_shown(status.revision)}; last report {_span(report.status_age)} ago"
        )
    if report.launch is not None:
        lines += [_shown(line) for line in report.launch.lines]
    lines += [f"problem: {_shown(problem)}" for problem in report.problems]
    lines.append("healthy" if report.healthy else "not healthy")
    return "\n".join(lines)


def _progress_line(report: Report) -> str:
    status = report.status
    # A launch script begins an attempt before its checks, and training comes after them.
    silent = report.launch is not None and report.checkpoint is None
    unknown = "not started" if silent and report.heartbeat_age is None else "unknown state"
    parts = [unknown if status is None else status.state.value]
    if status is not None and status.exit_reason:
        parts[0] += f" ({_shown(status.exit_reason)})"
    if report.iteration is not None:
        done = f"iteration {report.iteration:,}"
        if report.train_iters is not None and report.fraction is not None:
            done += f" of {report.train_iters:,} ({report.fraction:.1%})"
        parts.append(done)
    if status is not None and status.seconds_per_iteration is not None:
        parts.append(f"{status.seconds_per_iteration:.3g} s per iteration")
    if report.seconds_left is not None:
        parts.append(f"{_span(report.seconds_left)} left")
    return ", ".join(parts)


def _loss_line(report: Report) -> str:
    status = report.status
    if status is None or not status.losses:
        return ""
    iteration, loss = status.losses[-1]
    line = f"loss {loss:.4f} at iteration {iteration:,}"
    if report.loss_change is not None:
        line += f", {report.loss_change:+.4f} over the last {len(status.losses)} log lines"
    return line


def _speed_line(status: Status) -> str:
    forms = (
        ("tokens/sec", "{:,.0f} tokens/s"),
        ("tflops/device", "{:.4g} model TFLOP/s per device"),
        ("mfu", "MFU {:.1%}"),
    )
    metrics = status.metrics
    return ", ".join(form.format(metrics[name]) for name, form in forms if name in metrics)


def _checkpoint_line(report: Report) -> str:
    if report.checkpoint is None:
        return "no checkpoint yet"
    age = "" if report.checkpoint_age is None else f", {_span(report.checkpoint_age)} old"
    return f"last checkpoint: iteration {report.checkpoint:,}{age}"


def _span(seconds: float | None) -> str:
    # Beyond 30 years a file is lying, and timedelta may overflow.
    if seconds is None or seconds > 1e9:
        return "very long"
    return str(timedelta(seconds=round(seconds)))


def _shown(text: str) -> str:
    """Text from a file with everything replaced that a terminal would obey."""
    return "".join(letter if letter.isprintable() else "?" for letter in text[:500])
