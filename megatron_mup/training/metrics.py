"""Where metrics go: console line, JSON lines, TensorBoard, wandb. Names are Megatron's.

Only the log rank owns sinks; the others hold an empty list.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from datetime import timedelta
from pathlib import Path
from typing import IO, Any, Protocol

from megatron_mup.config import LoggingConfig, RunConfig
from megatron_mup.config_io import config_to_dict
from megatron_mup.describe import describe_json
from megatron_mup.errors import ConfigError

Metrics = Mapping[str, float]


class Sink(Protocol):
    """Receives the metrics of one logged iteration."""

    def write(self, iteration: int, metrics: Metrics) -> None:
        """Record the metrics."""
        ...

    def close(self) -> None:
        """Flush and release."""
        ...


class JsonLines:
    """One JSON object a line, appended, so that a resumed run continues the file."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file: IO[str] = path.open("a", encoding="utf-8")

    def write(self, iteration: int, metrics: Metrics) -> None:
        """Append one line; non-finite values become null, which JSON can hold."""
        row = {key: value if math.isfinite(value) else None for key, value in metrics.items()}
        self._file.write(json.dumps({"iteration": iteration, **row}) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class TensorBoard:
    """TensorBoard scalars, and the parameter table as text."""

    def __init__(self, folder: str, table: str) -> None:
        from torch.utils.tensorboard.writer import SummaryWriter

        self._writer: Any = SummaryWriter(log_dir=folder)
        self._writer.add_text("parameters", f"```json\n{table}\n```")

    def write(self, iteration: int, metrics: Metrics) -> None:
        """Add every metric as a scalar."""
        for key, value in metrics.items():
            self._writer.add_scalar(key, value, iteration)

    def close(self) -> None:
        """Flush and close."""
        self._writer.close()


class Wandb:
    """wandb run with configuration and table; offline when the user's WANDB_MODE says so."""

    def __init__(self, logging: LoggingConfig, config: dict[str, Any]) -> None:
        import wandb

        try:
            self._run: Any = wandb.init(
                project=logging.wandb_project,
                name=logging.wandb_exp_name,
                dir=logging.wandb_save_dir,
                config=config,
            )
        except wandb.Error as error:
            raise ConfigError(
                f"logging.wandb_project '{logging.wandb_project}': {error}; run 'wandb login', or "
                "set WANDB_MODE=offline, or leave logging.wandb_project unset"
            ) from error

    def write(self, iteration: int, metrics: Metrics) -> None:
        """Log all metrics at one step."""
        self._run.log(dict(metrics), step=iteration)

    def close(self) -> None:
        """Finish the run."""
        self._run.finish()


def open_sinks(run: RunConfig, stack: ExitStack) -> list[Sink]:
    """Open the sinks that the configuration asks for; ``stack`` closes them."""
    logging = run.logging
    sinks: list[Sink] = []
    if logging.metrics_path is not None:
        sinks.append(JsonLines(Path(logging.metrics_path)))
    if logging.tensorboard_dir is not None:
        sinks.append(TensorBoard(logging.tensorboard_dir, describe_json(run.table)))
    if logging.wandb_project is not None:
        sinks.append(Wandb(logging, {**config_to_dict(run), "parameters": run.table.to_json()}))
    for sink in sinks:
        stack.callback(sink.close)
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
        self._last = self._started
        self._start = start

    def lap(self) -> float:
        """Seconds since the previous lap."""
        now = time.perf_counter()
        seconds, self._last = now - self._last, now
        return seconds

    def seconds_left(self, iteration: int) -> float:
        """Expected seconds to the end, at the mean rate of this process."""
        done = max(1, iteration - self._start)
        return (time.perf_counter() - self._started) / done * (self._train_iters - iteration)


def console_line(iteration: int, train_iters: int, metrics: Metrics, seconds_left: float) -> str:
    """One line of progress with rate and time left."""
    parts = [f"iteration {iteration:>7}/{train_iters}"]
    for key, form in _CONSOLE:
        if key in metrics:
            parts.append(f"{key} {metrics[key]:{form}}")
    left = str(timedelta(seconds=round(seconds_left))) if math.isfinite(seconds_left) else "?"
    return " | ".join([*parts, f"left {left}"])


_CONSOLE: Sequence[tuple[str, str]] = (
    ("lm loss", ".4f"),
    ("lm loss validation", ".4f"),
    ("learning-rate", ".3e"),
    ("grad-norm", ".3f"),
    ("batch-size", ".0f"),
    ("tokens/sec", ".0f"),
)
