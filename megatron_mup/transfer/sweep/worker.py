"""A process that trains one cell after another: ``python -m megatron_mup.transfer.sweep.worker``.

Requests come as JSON lines on the standard input, answers go out on the standard output; whatever
libraries print goes to the standard error. torch and Megatron are imported once. SIGUSR1 or SIGTERM
stops a running cell after its step, saved if it saves. Without its parent a worker ends at once.
"""

from __future__ import annotations

import json
import os
import queue
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from megatron_mup.config_io import config_from_dict
from megatron_mup.errors import MupError
from megatron_mup.os_processes import processor_name
from megatron_mup.transfer.sweep.curves import losses_by_step, write_curve
from megatron_mup.transfer.sweep.losses import count_spikes, final_train_loss
from megatron_mup.transfer.sweep.stopping import Contest

if TYPE_CHECKING:
    from megatron_mup.training.outcome import TrainResult
    from megatron_mup.training.state import TrainState

_SECONDS_BETWEEN_REPORTS = 1.0

Answer = dict[str, Any]


class Watch:
    """An observer of ``train`` that reports progress and passes on requests to stop.

    Args:
        report: receives the iteration, about once a second.
        stopping: whether a request to stop has come.
        contest: says when the run is not worth its end; None: it has no rivals.

    Attributes:
        stopped_early: whether the contest has ended the run.
    """

    def __init__(
        self,
        report: Callable[[int], None],
        stopping: Callable[[], bool],
        contest: Contest | None = None,
    ) -> None:
        self._report, self._stopping, self._contest = report, stopping, contest
        self.stopped_early = False
        self._reported = time.monotonic()

    @contextmanager
    def opened(self, state: TrainState) -> Iterator[None]:
        """A request that came before the loop listened is repeated now that it does."""
        if self._stopping():
            signal.raise_signal(signal.SIGUSR1)
        yield

    def due(self, iteration: int) -> bool:
        """Report, and end the run after this step if the last one showed that it is the worse."""
        # The metrics of the step before are written: every step is logged.
        if self._contest is not None and self._contest.ends_after(iteration - 1):
            self.stopped_early = True
            signal.raise_signal(signal.SIGUSR1)
        now = time.monotonic()
        if now - self._reported >= _SECONDS_BETWEEN_REPORTS:
            self._reported = now
            self._report(iteration)
        return False

    def forward(self, state: TrainState) -> AbstractContextManager[None]:
        """Nothing."""
        return nullcontext()

    def update(self, state: TrainState) -> AbstractContextManager[None]:
        """Nothing."""
        return nullcontext()

    def report(self, iteration: int) -> dict[str, float]:
        """Nothing."""
        return {}


def run_cell(config: Mapping[str, Any], watch: Watch, *, curve: Path | None = None) -> Answer:
    """Train one cell in this process.

    Args:
        config: every section of its configuration.
        watch: looks on.
        curve: where the losses of a run that is through are kept; None: nowhere.

    Returns:
        How it ended and its losses.

    Raises:
        MupError: the configuration or its data do not fit.
    """
    from megatron_mup.training.loop import train
    from megatron_mup.training.processes import Launch

    run = config_from_dict(dict(config))
    result = train(run, launch=Launch(), observer=watch, echo=_silent)
    rows = _rows(result, run.logging.metrics_path)
    losses = [row["lm loss"] for row in rows if "lm loss" in row]
    end = _end(result, watch)
    if curve is not None and end in ("finished", "stopped_early"):
        write_curve(curve, losses_by_step(rows))
    return {
        "end": end,
        "steps": result.iteration,
        "validation_loss": result.validation_loss,
        "train_loss": None if result.diverged else final_train_loss(losses),
        "loss_spikes": count_spikes(losses),
    }


def _end(result: TrainResult, watch: Watch) -> str:
    if result.diverged:
        return "diverged"
    if result.stopped is None:
        return "finished"
    return "stopped_early" if watch.stopped_early else "stopped"


def _rows(result: TrainResult, metrics: str | None) -> list[dict[str, float]]:
    """Metrics of every step; the file knows those before a resume as well."""
    from megatron_mup.training.metrics import read_metrics

    return result.history if metrics is None else read_metrics(Path(metrics))


def _silent(_line: str) -> None:
    """Runs report through their answers."""


def _machine() -> str:
    """Device or processor that trains."""
    import torch

    from megatron_mup import platform

    return str(torch.cuda.get_device_name()) if platform.has_cuda() else processor_name()


class _Server:
    """The worker's loop: one request, one answer."""

    def __init__(self, answers: TextIO) -> None:
        self._answers = answers
        self._requests: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._stopping = False

    def serve(self) -> None:
        for number in (signal.SIGUSR1, signal.SIGTERM):
            signal.signal(number, self._stop)
        threading.Thread(target=self._read, daemon=True).start()
        # The heavy imports, once.
        import megatron_mup.training.loop  # noqa: F401

        self._say({"ready": True, "machine": _machine()})
        while True:
            request = self._requests.get()
            self._say({"cell": request["cell"], **self._answer(request)})

    def _stop(self, _number: int, _frame: object) -> None:
        self._stopping = True

    def _read(self) -> None:
        for line in sys.stdin:
            self._requests.put(json.loads(line))
        # The parent is gone or wants no more. Another sweep may take the folder over at once.
        os._exit(0)

    def _say(self, message: Answer) -> None:
        self._answers.write(json.dumps(message) + "\n")
        self._answers.flush()

    def _answer(self, request: Mapping[str, Any]) -> Answer:
        def report(iteration: int) -> None:
            self._say({"cell": request["cell"], "iteration": iteration})

        try:
            contest = Contest(request["contest"]) if "contest" in request else None
            watch = Watch(report, lambda: self._stopping, contest)
            curve = Path(request["curve"])
            return {"outcome": run_cell(request["config"], watch, curve=curve)}
        except MupError as error:
            return {"error": str(error), "final": True}
        except Exception as error:
            traceback.print_exc()
            return {"error": f"{type(error).__name__}: {error}", "final": False}


def main() -> None:
    """Serve the parent process until it closes the pipe."""
    # Libraries that print must not write between the answers.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    _Server(answers).serve()


if __name__ == "__main__":
    main()
