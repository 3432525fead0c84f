"""Runs cells in worker processes, one row each as they end. Must not import torch.

Nothing that happens to one cell ends the others: a diverged run is a row, a worker that dies is
replaced and its cell goes on, and a cell that fails for good is a row as well.
"""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from megatron_mup.config_io import config_to_dict
from megatron_mup.errors import InstallationError
from megatron_mup.transfer.runs import Row, Status, append_row
from megatron_mup.transfer.sweep.cells import Cell
from megatron_mup.transfer.sweep.folder import SweepFolder
from megatron_mup.transfer.sweep.order import Strategy, ended
from megatron_mup.transfer.sweep.pool import Pool, Share, Worker
from megatron_mup.transfer.sweep.progress import Progress
from megatron_mup.transfer.sweep.results import Attempted, Origin, make_row
from megatron_mup.transfer.sweep.spec import StopEarly
from megatron_mup.transfer.sweep.stopping import contest

ATTEMPTS = 3
"""Times that a cell is started in one command; its worker may die twice."""

_SECONDS_BETWEEN_STATES = 1.0
_POLL_SECONDS = 0.2

Print = Callable[[str], None]
Recorded = Callable[[Mapping[str, Row]], None]


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What a command runs of what is wanted.

    Attributes:
        only: cell ids; None: all.
        max_cells: start no more than so many; None: no limit.
        checkpoint_fraction: part of a run between checkpoints; None: no checkpoints.
        keep_checkpoints: keep each run's last checkpoint.
        stop_early: end runs that are surely not the best; None: all run to their end.
    """

    only: Collection[str] | None = None
    max_cells: int | None = None
    checkpoint_fraction: float | None = None
    keep_checkpoints: bool = False
    stop_early: StopEarly | None = None


@dataclass
class Ending:
    """How a command ended.

    Attributes:
        rows: cell id -> row, of everything on record.
        made: ids of cells that ended in this command.
        interrupted: a request to stop came.
    """

    rows: dict[str, Row]
    made: list[str] = field(default_factory=list)
    interrupted: bool = False


@dataclass
class _Task:
    """A cell that a worker trains."""

    cell: Cell
    began: float
    started: str
    iteration: int = 0


def run_cells(
    strategy: Strategy,
    rows: Mapping[str, Row],
    *,
    folder: SweepFolder,
    origin: Origin,
    share: Share,
    limits: Limits,
    echo: Print,
    recorded: Recorded = lambda _rows: None,
) -> Ending:
    """Run what a strategy wants and has no row yet.

    Args:
        strategy: decides which cells run.
        rows: cell id -> row, of what is on record.
        folder: locked by this process.
        origin: of the rows to come.
        share: processes to use.
        limits: what to leave out.
        echo: receives progress lines.
        recorded: receives all rows (cell id -> row) when some were added.

    Returns:
        All rows, and whether a request to stop came.

    Raises:
        InstallationError: a worker process cannot start.
    """
    runner = _Runner(strategy, Ending(dict(rows)), folder=folder, origin=origin, limits=limits)
    runner.echo, runner.recorded = echo, recorded
    if runner.missing():
        with _stop_requests(runner):
            runner.run(Pool(share, folder.workers), share.workers)
    return runner.ending


@contextmanager
def _stop_requests(runner: _Runner) -> Iterator[None]:
    """The first request stops cells after their step, the second ends everything at once."""

    def note(_number: int, _frame: object) -> None:
        runner.stops += 1

    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
    before = {number: signal.signal(number, note) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class _Runner:
    """The command's own variables: what runs, what was tried how often."""

    def __init__(
        self,
        strategy: Strategy,
        ending: Ending,
        *,
        folder: SweepFolder,
        origin: Origin,
        limits: Limits,
    ) -> None:
        self.strategy, self.ending, self.limits = strategy, ending, limits
        self.folder, self.origin = folder, origin
        self.echo: Print = lambda _line: None
        self.recorded: Recorded = lambda _rows: None
        self.stops = 0
        self._asked = False
        self._slots = 0
        self._tasks: dict[Worker, _Task] = {}
        self._attempts: dict[str, int] = {}
        self._retry: list[Cell] = []
        self._machines: dict[Worker, str] = {}
        self._lines: list[tuple[Cell, Row, str]] = []
        self._progress = Progress(strategy, ending.rows, selected=limits.only)
        self._state_written = 0.0

    def missing(self) -> list[Cell]:
        """Cells to start, in order; a cell that failed in this command is through."""
        done = set(self.ending.made)
        only, most = self.limits.only, self.limits.max_cells
        cells = [
            cell
            for cell in self.strategy.wanted(self.ending.rows)
            if cell.id not in done
            and not ended(self.ending.rows.get(cell.id))
            and (only is None or cell.id in only)
        ]
        running = {task.cell.id for task in self._tasks.values()}
        free = [cell for cell in cells if cell.id not in running]
        # Those that were begun and lost their worker first.
        free.sort(key=lambda cell: cell.id not in self._attempts)
        if most is None:
            return free
        begun = len(self._attempts)
        return [cell for cell in free if cell.id in self._attempts or begun < most]

    def run(self, pool: Pool, workers: int) -> None:
        """Until nothing is left to start and nothing runs."""
        try:
            while True:
                self._start_workers(pool, workers)
                self._give_work(pool)
                self._tell()
                if not self._tasks and (self.stops or not self.missing()):
                    break
                self._write_state()
                for worker, message in pool.messages(_POLL_SECONDS):
                    if message is None:
                        self._died(pool, worker)
                    else:
                        self._heard(pool, worker, message)
                self._pass_on_stops(pool)
        finally:
            # Cells that still run were not asked to stop, or the second request came.
            pool.close(kill=bool(self._tasks))
            self.ending.interrupted = bool(self.stops)
            self._write_state(last=True)

    def _start_workers(self, pool: Pool, workers: int) -> None:
        """As many as there is work for, which may become more; one that cannot start only once."""
        count, most = len(self.missing()), self.limits.max_cells
        if most is not None:
            count = min(count, max(1, most - len(self._attempts)))
        free = len(pool.workers) - len(self._tasks)
        for _ in range(0 if self.stops else min(workers - self._slots, count - free)):
            pool.start(self._slots)
            self._slots += 1

    def _give_work(self, pool: Pool) -> None:
        idle = [
            worker for worker in pool.workers.values() if worker.ready and worker not in self._tasks
        ]
        if self.stops or not idle:
            return
        for worker in idle:
            cells = self.missing()
            if not cells:
                return
            self._start(worker, cells[0])

    def _start(self, worker: Worker, cell: Cell) -> None:
        self._attempts[cell.id] = self._attempts.get(cell.id, 0) + 1
        self.folder.write_config(cell)
        started = datetime.now(UTC).isoformat(timespec="seconds")
        self._tasks[worker] = _Task(cell, time.monotonic(), started)
        request: dict[str, Any] = {
            "cell": cell.id,
            "config": self._placed(cell, worker.slot),
            "curve": str(self.folder.curve(cell.id)),
        }
        rule = self.limits.stop_early
        if rule is not None:
            # Files of the rivals are looked for when the time comes.
            wanted = self.strategy.wanted(self.ending.rows)
            request["contest"] = contest(cell, wanted, rule=rule, folder=self.folder)
        worker.send(request)

    def _placed(self, cell: Cell, slot: int) -> dict[str, Any]:
        """The cell's configuration with its places."""
        config = config_to_dict(cell.run)
        # Megatron writes its dataset index in place, so that two processes share none.
        config["data"]["data_cache_path"] = str(self.folder.cache / str(slot))
        # Of every step, for spikes and the mean at the end.
        config["logging"]["log_interval"] = 1
        fraction, keep = self.limits.checkpoint_fraction, self.limits.keep_checkpoints
        saves = fraction is not None or keep
        if saves or self.limits.stop_early is not None:
            config["logging"]["metrics_path"] = str(self.folder.metrics(cell.id))
        if not saves:
            return config
        place = self.folder.cell(cell.id)
        config["checkpoint"] |= {"save": str(place / "checkpoints"), "keep_last": 1}
        config["checkpoint"]["load"] = config["checkpoint"]["save"]
        if fraction is not None:
            interval = math.ceil(fraction * cell.run.training.train_iters)
            config["checkpoint"]["save_interval"] = interval
        return config

    def _heard(self, pool: Pool, worker: Worker, message: dict[str, Any]) -> None:
        if message.get("ready"):
            worker.ready = True
            self._machines[worker] = message["machine"]
        elif worker not in self._tasks:
            return
        elif "iteration" in message:
            self._tasks[worker].iteration = message["iteration"]
        elif "error" in message:
            task = self._tasks[worker]
            if message["final"]:
                del self._tasks[worker]
                self._failed(task, message["error"])
            else:
                # What a process has done after an unexpected error is not to be relied on.
                self._replace(pool, worker, message["error"])
        else:
            self._answered(pool, worker, message["outcome"])

    def _answered(self, pool: Pool, worker: Worker, outcome: Mapping[str, Any]) -> None:
        task = self._tasks[worker]
        if outcome["end"] == "stopped" and not self.stops:
            self._replace(pool, worker, "its worker was told to stop")
            return
        del self._tasks[worker]
        seconds = time.monotonic() - task.began
        if outcome["end"] == "stopped":
            self.folder.add_seconds(task.cell.id, seconds)
            at = f"iteration {outcome['steps']} of {task.cell.run.training.train_iters}"
            self.echo(f"stopped at {at}: {task.cell.words}")
            return
        attempted = Attempted(
            status=Status(outcome["end"]),
            outcome=outcome,
            seconds=seconds + self.folder.earlier_seconds(task.cell.id),
            machine=self._machines[worker],
            started=task.started,
        )
        self._record(task.cell, attempted)

    def _record(self, cell: Cell, attempted: Attempted, reason: str = "") -> None:
        row = make_row(cell, attempted, self.origin)
        append_row(self.folder.table, row)
        self.ending.rows[cell.id] = row
        self.ending.made.append(cell.id)
        if not self.limits.keep_checkpoints and attempted.status is not Status.FAILED:
            self.folder.drop_cell(cell.id)
        self._lines.append((cell, row, reason))

    def _tell(self) -> None:
        """Progress lines, once the free workers have their next cells."""
        for cell, row, reason in self._lines:
            self.echo(self._progress.line(cell, row, running=len(self._tasks), reason=reason))
        if self._lines:
            self.recorded(self.ending.rows)
        self._lines.clear()

    def _died(self, pool: Pool, worker: Worker) -> None:
        if not worker.ready:
            words = worker.last_words()
            pool.remove(worker, kill=True)
            message = f"a worker process cannot start: {words}; its log is {worker.log}"
            if not self.stops and not pool.workers:
                raise InstallationError(message)
            self.echo(f"{message}; the sweep goes on without it")
            return
        self._replace(pool, worker, None)

    def _replace(self, pool: Pool, worker: Worker, reason: str | None) -> None:
        """A fresh worker in the slot; what the old one trained goes on, or fails for good."""
        task = self._tasks.pop(worker, None)
        status = pool.remove(worker, kill=True)
        if not self.stops:
            pool.start(worker.slot)
        if task is None:
            return
        if reason is None:
            how = f"signal {-status}" if status < 0 else f"exit code {status}"
            reason = f"its worker died ({how}; log: {worker.log})"
        if self._attempts[task.cell.id] >= ATTEMPTS:
            self._failed(task, reason)
            return
        self.folder.add_seconds(task.cell.id, time.monotonic() - task.began)
        if not self.stops:
            self.echo(f"{task.cell.words}: {reason}; it is started again")

    def _failed(self, task: _Task, reason: str) -> None:
        seconds = self.folder.earlier_seconds(task.cell.id) + time.monotonic() - task.began
        attempted = Attempted(
            status=Status.FAILED,
            outcome={"steps": task.iteration},
            seconds=seconds,
            machine="",
            started=task.started,
        )
        self._record(task.cell, attempted, reason)

    def _pass_on_stops(self, pool: Pool) -> None:
        if self.stops == 1 and not self._asked:
            self._asked = True
            self.echo(f"stopping: {len(self._tasks)} running cells end after their step")
            for worker in list(self._tasks):
                worker.ask_to_stop()
        elif self.stops > 1 and self._tasks:
            self.echo("stopping at once")
            for worker, task in list(self._tasks.items()):
                self.folder.add_seconds(task.cell.id, time.monotonic() - task.began)
                del self._tasks[worker]
                pool.remove(worker, kill=True)

    def _write_state(self, *, last: bool = False) -> None:
        now = time.monotonic()
        if not last and now - self._state_written < _SECONDS_BETWEEN_STATES:
            return
        self._state_written = now
        running = [
            {
                "cell": task.cell.id,
                "words": task.cell.words,
                "pid": worker.process.pid,
                "iteration": task.iteration,
                "train_iters": task.cell.run.training.train_iters,
                "seconds": round(now - task.began, 1),
            }
            for worker, task in self._tasks.items()
        ]
        self.folder.write_state(
            {
                "updated": datetime.now(UTC).isoformat(timespec="seconds"),
                "running": running,
                **self._progress.summary(len(running)),
            }
        )
