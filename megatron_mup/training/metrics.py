"""Where metrics go: console line, JSON lines, TensorBoard, wandb. Names are Megatron's.

Only the log rank owns sinks; the others hold an empty list. A run that was killed and resumed goes
back to its checkpoint's iteration: what was written beyond it is superseded, and every sink is told
so when it is opened. A sink that fails costs its rows, never the run.
"""

from __future__ import annotations

import json
import logging
import math
import os
import re
import secrets
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from datetime import timedelta
from pathlib import Path
from typing import Any, Protocol

from megatron_mup.config import LoggingConfig, RunConfig
from megatron_mup.config_io import config_to_dict
from megatron_mup.data.publication import publish_text
from megatron_mup.describe import describe_json
from megatron_mup.errors import ConfigError, DataError

logger = logging.getLogger(__name__)

Metrics = Mapping[str, float]

WANDB_RUN_ID = "wandb_run_id.txt"
"""File in the save folder that holds the id of the wandb run, for the next process."""

_RESUMED = "resumed"


class Sink(Protocol):
    """Receives the metrics of one logged iteration."""

    def write(self, iteration: int, metrics: Metrics) -> None:
        """Record the metrics."""
        ...

    def close(self) -> None:
        """Flush and release."""
        ...


class JsonLines:
    """One JSON object a line, appended, so that a resumed run continues the file.

    Args:
        path: the file.
        start: iteration at which this process starts; a row that says so is written to a file that
            holds rows already, see ``read_metrics``.
    """

    def __init__(self, path: Path, *, start: int = 0) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        # Unbuffered: a row that a full disk refuses must not come out later, in pieces.
        self._file = path.open("ab", buffering=0)
        # A killed process may have left half a row, which stays as a line of its own.
        last = _last_byte(path)
        self._line_open = last not in (b"", b"\n")
        if last:
            self._append({"iteration": start, _RESUMED: True})

    def write(self, iteration: int, metrics: Metrics) -> None:
        """Append one line; non-finite values become null, which JSON can hold."""
        row = {key: value if math.isfinite(value) else None for key, value in metrics.items()}
        self._append({"iteration": iteration, **row})

    def _append(self, row: Mapping[str, Any]) -> None:
        line = (b"\n" if self._line_open else b"") + json.dumps(row).encode() + b"\n"
        self._line_open = True
        if self._file.write(line) != len(line):
            raise OSError(f"only part of a row fits into {self._file.name}")
        self._line_open = False

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def _last_byte(path: Path) -> bytes:
    with path.open("rb") as file:
        # Of an empty file, the last byte is none.
        file.seek(max(0, file.seek(0, os.SEEK_END) - 1))
        return file.read(1)


def read_metrics(path: Path) -> list[dict[str, float]]:
    """Rows of a JSON lines file, one for each iteration, in order; the last word counts.

    Rows of one iteration (training, validation) are joined. Where a process resumed at iteration N,
    rows beyond N that stand before are dropped. Lines cut by a kill are passed over.

    Args:
        path: ``logging.metrics_path`` of a run, finished or not.

    Returns:
        Rows with ``iteration`` and the metrics; null becomes NaN.

    Raises:
        DataError: the file cannot be read.
    """
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError as error:
        raise DataError(
            f"cannot read metrics from '{path}': {error.strerror or error}; give the file that "
            "logging.metrics_path names"
        ) from error
    rows: dict[int, dict[str, float]] = {}
    for row in _whole_rows(lines):
        iteration = row["iteration"]
        if row.pop(_RESUMED, False):
            rows = {at: kept for at, kept in rows.items() if at <= iteration}
        else:
            values = {key: math.nan if value is None else value for key, value in row.items()}
            rows.setdefault(iteration, {}).update(values)
    return [rows[iteration] for iteration in sorted(rows)]


def _whole_rows(lines: Sequence[str]) -> Iterator[dict[str, Any]]:
    for line in lines:
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(row, dict) and isinstance(row.get("iteration"), int):
            yield row


class TensorBoard:
    """TensorBoard scalars, and the parameter table as text.

    Args:
        folder: of the event files.
        table: the parameter table as JSON.
        start: iteration at which this process starts; later points of a killed one are hidden.
    """

    def __init__(self, folder: str, table: str, *, start: int = 0) -> None:
        from torch.utils.tensorboard.writer import SummaryWriter

        self._writer: Any = SummaryWriter(log_dir=folder, purge_step=start + 1)
        self._writer.add_text("parameters", f"```json\n{table}\n```", start)

    def write(self, iteration: int, metrics: Metrics) -> None:
        """Add every metric as a scalar."""
        for key, value in metrics.items():
            self._writer.add_scalar(key, value, iteration)

    def close(self) -> None:
        """Flush and close."""
        self._writer.close()


class Wandb:
    """wandb run with configuration and table; offline when the user's WANDB_MODE says so.

    Args:
        logging: the logging options.
        config: what wandb shows as the run's configuration.
        run_id: wandb's id of the run; an existing run of that id is continued.
    """

    def __init__(self, logging: LoggingConfig, config: dict[str, Any], *, run_id: str) -> None:
        import wandb

        try:
            self._run: Any = wandb.init(
                project=logging.wandb_project,
                name=logging.wandb_exp_name,
                dir=logging.wandb_save_dir,
                config=config,
                id=run_id,
                resume="allow",
            )
        except wandb.Error as error:
            raise ConfigError(
                f"logging.wandb_project '{logging.wandb_project}': {error}; run 'wandb login', or "
                "set WANDB_MODE=offline, or leave logging.wandb_project unset"
            ) from error
        # wandb's own step only grows: it would drop what a resumed run logs until it has caught up
        # with the killed one. The iteration is a value of its own and the axis of the others.
        self._run.define_metric("iteration")
        self._run.define_metric("*", step_metric="iteration")

    def write(self, iteration: int, metrics: Metrics) -> None:
        """Log all metrics of one iteration."""
        self._run.log({"iteration": iteration, **metrics})

    def close(self) -> None:
        """Finish the run."""
        self._run.finish()


def wandb_run_id(save: str | None) -> str:
    """The id of this run in wandb: the save folder's, or a new one.

    Args:
        save: ``checkpoint.save``; a new id is kept there for the next process.

    Returns:
        The id; damaged ids are replaced, with a warning.
    """
    new = secrets.token_hex(4)
    if save is None:
        return new
    path = Path(save) / WANDB_RUN_ID
    try:
        if path.exists():
            kept = path.read_text(encoding="utf-8", errors="replace").strip()
            if re.fullmatch(r"[A-Za-z0-9_-]{1,64}", kept):
                return kept
            logger.warning("%s holds no wandb run id; a new wandb run is started", path)
        publish_text(path, new)
    except OSError as error:
        logger.warning("the wandb run will not be continued after a restart: %s", error)
    return new


class _Forgiving:
    """A sink whose failures are told once each time they begin, and cost only the rows."""

    def __init__(self, sink: Sink) -> None:
        self._sink = sink
        self._failing = False

    def write(self, iteration: int, metrics: Metrics) -> None:
        """Record the metrics, or warn; without metrics there is no row."""
        if not metrics:
            return
        try:
            self._sink.write(iteration, metrics)
            self._failing = False
        # A full disk, a writer thread that died, a server that is gone: none is worth a run.
        except Exception as error:
            if not self._failing:
                self._warn(f"metrics from iteration {iteration} on are lost", error)
            self._failing = True

    def close(self) -> None:
        """Flush and release, or warn."""
        try:
            self._sink.close()
        except Exception as error:
            self._warn("the last metrics may be lost", error)

    def _warn(self, what: str, error: Exception) -> None:
        logger.warning("%s: %s (%s)", type(self._sink).__name__, what, error)


def open_sinks(run: RunConfig, stack: ExitStack, *, start: int = 0) -> list[Sink]:
    """Open the sinks that the configuration asks for; ``stack`` closes them.

    Args:
        run: the run's configuration.
        stack: closes the sinks.
        start: iteration at which this process starts.

    Raises:
        ConfigError: wandb cannot be used, and the run is not a resumed one.
    """
    logging = run.logging
    sinks: list[Sink] = []

    def keep(sink: Sink) -> None:
        sinks.append(_Forgiving(sink))
        stack.callback(sinks[-1].close)

    if logging.metrics_path is not None:
        keep(JsonLines(Path(logging.metrics_path), start=start))
    if logging.tensorboard_dir is not None:
        keep(TensorBoard(logging.tensorboard_dir, describe_json(run.table), start=start))
    if logging.wandb_project is not None:
        config = {**config_to_dict(run), "parameters": run.table.to_json()}
        try:
            keep(Wandb(logging, config, run_id=wandb_run_id(run.checkpoint.save)))
        except ConfigError as error:
            # A run that could begin has a right configuration: it is wandb that is gone.
            if start == 0:
                raise
            logger.warning("the resumed run goes on without wandb: %s", error)
    return sinks


class Progress:
    """Rate and time left, from the wall clock of this process.

    Args:
        train_iters: iterations of the whole run.
        start: iteration at which this process starts.
    """

    def __init__(self, train_iters: int, start: int) -> None:
        self._train_iters = train_iters
        self._started = time.perf_counter()
        self._start = start

    def seconds_per_iteration(self, iteration: int) -> float:
        """Mean seconds of an iteration of this process, its share of saving and evaluation too."""
        done = max(1, iteration - self._start)
        return (time.perf_counter() - self._started) / done

    def seconds_left(self, iteration: int) -> float:
        """Expected seconds to the end, at the mean rate of this process."""
        return self.seconds_per_iteration(iteration) * (self._train_iters - iteration)


def console_line(iteration: int, train_iters: int, metrics: Metrics, seconds_left: float) -> str:
    """One line of progress with rate and time left."""
    parts = [f"iteration {iteration:>7}/{train_iters}"]
    for key, form in _CONSOLE:
        if key in metrics and (key not in _SHOWN_IF_ANY or metrics[key] > 0):
            parts.append(f"{key} {metrics[key]:{form}}")
    left = str(timedelta(seconds=round(seconds_left))) if math.isfinite(seconds_left) else "?"
    return " | ".join([*parts, f"left {left}"])


_CONSOLE: Sequence[tuple[str, str]] = (
    ("lm loss", ".4f"),
    ("lm loss validation", ".4f"),
    ("learning-rate", ".3e"),
    ("grad-norm", ".3f"),
    ("batch-size", ".0f"),
    ("skipped-fraction", ".2f"),
    ("iteration-time", ".3f"),
    ("tokens/sec", ".0f"),
    ("tflops/device", ".4g"),
    ("mfu", ".3f"),
)
_SHOWN_IF_ANY = {"skipped-fraction"}
