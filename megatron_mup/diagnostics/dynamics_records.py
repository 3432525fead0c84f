"""The file of measured update dynamics: names, place, writing, reading.

JSON lines, one row for each watched iteration, with the keys ``<quantity>/<role>/<tensor>``. Rows
are appended and a resumed run supersedes what was written beyond its checkpoint, as in
``logging.metrics_path``. Must not import torch or megatron.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from megatron_mup.config import RunConfig
from megatron_mup.errors import ConfigError, DataError
from megatron_mup.training.metrics import JsonLines, read_metrics

logger = logging.getLogger(__name__)

FILE_NAME = "dynamics.jsonl"
"""In ``checkpoint.save``, unless ``logging.diagnostics_path`` says otherwise."""


class Quantity(StrEnum):
    """What is measured of a tensor; formulas in docs/dynamics.md."""

    WEIGHT_NORM = "weight-norm"
    RELATIVE_UPDATE = "relative-update"
    UPDATE_ALIGNMENT = "update-alignment"
    WEIGHT_ALIGNMENT = "weight-alignment"
    ALIGNMENT_RATIO = "alignment-ratio"
    RELATIVE_CHANGE = "relative-representation-change"
    EFFECTIVE_DECAY = "effective-decay"


@dataclass(frozen=True)
class Measured:
    """The quantities of one logical tensor at one iteration; NaN where one is not defined."""

    tensor: str
    role: str
    values: Mapping[Quantity, float]


def dynamics_path(run: RunConfig) -> Path:
    """Where a run's dynamics are written.

    Args:
        run: the run's configuration.

    Raises:
        ConfigError: neither ``logging.diagnostics_path`` nor ``checkpoint.save`` is set, or the
            path is a folder.
    """
    given, save = run.logging.diagnostics_path, run.checkpoint.save
    if given is None and save is None:
        raise ConfigError(
            f"logging.diagnostics_interval={run.logging.diagnostics_interval} has no file to write "
            "to; set logging.diagnostics_path=FILE or checkpoint.save=FOLDER"
        )
    path = Path(given) if given is not None else Path(str(save)) / FILE_NAME
    if path.is_dir():
        raise ConfigError(
            f"logging.diagnostics_path '{path}' is a folder; give the name of a JSON lines file"
        )
    return path


class DynamicsFile:
    """Appends rows; a row that cannot be written is lost with a warning, never the run.

    Args:
        path: from ``dynamics_path``.
        start: iteration at which this process starts.
    """

    def __init__(self, path: Path, *, start: int) -> None:
        self._path = path
        self._failing = False
        self._lines: JsonLines | None = None
        try:
            self._lines = JsonLines(path, start=start)
        except OSError as error:
            self._warn(start, error)

    def write(self, iteration: int, measured: Iterable[Measured]) -> None:
        """Append the row of one iteration."""
        if self._lines is None:
            return
        row = {
            f"{quantity}/{item.role}/{item.tensor}": value
            for item in measured
            for quantity, value in item.values.items()
        }
        try:
            self._lines.write(iteration, row)
            self._failing = False
        except OSError as error:
            self._warn(iteration, error)

    def close(self) -> None:
        """Close the file."""
        if self._lines is not None:
            self._lines.close()

    def _warn(self, iteration: int, error: OSError) -> None:
        if not self._failing:
            logger.warning(
                "update dynamics from iteration %d on are lost: cannot write '%s' (%s)",
                iteration,
                self._path,
                error,
            )
        self._failing = True


def role_means(measured: Iterable[Measured]) -> dict[str, float]:
    """Means over the tensors of each role.

    Args:
        measured: of one iteration.

    Returns:
        ``<quantity>/<role>`` -> mean over the tensors for which the quantity is defined; without
        any, the name is absent.
    """
    values: dict[str, list[float]] = {}
    for item in measured:
        for quantity, value in item.values.items():
            if math.isfinite(value):
                values.setdefault(f"{quantity}/{item.role}", []).append(value)
    return {name: sum(found) / len(found) for name, found in values.items()}


def read_dynamics(source: Path) -> dict[int, list[Measured]]:
    """The rows of a run, each iteration once, in order.

    Args:
        source: a JSON lines file, or the folder that holds ``dynamics.jsonl``.

    Raises:
        DataError: there is no such file, or it holds no dynamics.
    """
    path = source / FILE_NAME if source.is_dir() else source
    if not path.is_file():
        raise DataError(
            f"'{path}' does not exist; give a folder of checkpoint.save or a file of "
            "logging.diagnostics_path of a run that was trained with --diagnostics-interval"
        )
    rows = {int(row["iteration"]): _measured(row) for row in read_metrics(path)}
    found = {iteration: measured for iteration, measured in rows.items() if measured}
    if not found:
        raise DataError(
            f"'{path}' holds no update dynamics; train with --diagnostics-interval N for more than "
            "N iterations"
        )
    return found


def _measured(row: Mapping[str, float]) -> list[Measured]:
    known = {quantity.value for quantity in Quantity}
    tensors: dict[tuple[str, str], dict[Quantity, float]] = {}
    for key, value in row.items():
        quantity, _, place = key.partition("/")
        role, _, tensor = place.partition("/")
        # Other files of rows, such as metrics, have names with at most one slash.
        if quantity in known and tensor:
            tensors.setdefault((role, tensor), {})[Quantity(quantity)] = value
    return [Measured(tensor, role, values) for (role, tensor), values in tensors.items()]
