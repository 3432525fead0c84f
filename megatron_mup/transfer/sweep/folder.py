"""The sweep's folder: who may write to it, what lies where.

    runs.csv, runs.parquet   the table
    sweep.yaml               what was run last, with the base in it
    configs/<cell>.json      what each cell's name is the hash of
    cells/<cell>/            checkpoints and metrics of a cell that runs or was interrupted
    data/                    tokenizer and shards, where the sweep makes them
    curves/<cell>.npy        training loss of each step of a run that is through
    refinement.jsonl         what was decided on further runs
    state.json               what runs now, for ``sweep status``
    workers/                 logs of the worker processes
    tasks/                   tables and states of the tasks of an array of jobs
Must not import torch.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from megatron_mup.data.publication import publish_text
from megatron_mup.errors import ConfigError, DataError
from megatron_mup.transfer.runs import Row, Status, read_rows
from megatron_mup.transfer.sweep.base import portable_document
from megatron_mup.transfer.sweep.cells import Cell
from megatron_mup.transfer.sweep.folder_lock import LOCK, held, owner_of
from megatron_mup.transfer.sweep.spec import Sweep, load_sweep
from megatron_mup.transfer.sweep.text_source import has_shards

_HOLDER = "sweep"
_OF_CELLS = ("cells", "configs", "curves")


def _rank(row: Row) -> tuple[bool, str]:
    """Which of two rows of a cell counts."""
    return row.status is not Status.FAILED, row.started


@dataclass(frozen=True)
class SweepFolder:
    """Names of what lies in a sweep's folder.

    Attributes:
        path: the folder.
        task: number of the task of an array that writes; None: a command that has the folder for
            itself.
    """

    path: Path
    task: int | None = None

    def _own(self, name: str, of_task: str) -> Path:
        """A place that each task has for itself."""
        if self.task is None:
            return self.path / name
        return self.path / of_task.format(f"task-{self.task}")

    @property
    def table(self) -> Path:
        """The CSV table to append to."""
        return self._own("runs.csv", "tasks/{}.csv")

    def writers(self) -> list[SweepFolder]:
        """The folder as a command has it that is no task, and as each task has it."""
        numbers = sorted({int(path.stem[5:]) for path in self.path.glob("tasks/task-*.*")})
        return [SweepFolder(self.path), *(SweepFolder(self.path, task) for task in numbers)]

    def rows(self) -> list[Row]:
        """Rows of all tables; of a cell that is in several the last one that did not fail.

        Raises:
            DataError: a table cannot be read.
        """
        rows = [row for writer in self.writers() for row in read_rows(writer.table)]
        best: dict[str, Row] = {}
        for row in rows:
            other = best.get(row.cell)
            if other is None or _rank(row) >= _rank(other):
                best[row.cell] = row
        return list(best.values())

    @property
    def parquet(self) -> Path:
        """The same table as Parquet."""
        return self.path / "runs.parquet"

    @property
    def data(self) -> Path:
        """Shards that the sweep makes."""
        return self.path / "data"

    def has_shards(self) -> bool:
        """Whether the shards are there and whole."""
        return has_shards(self.data)

    @property
    def cache(self) -> Path:
        """Index caches of the workers."""
        return self._own("cache", "cache/{}")

    @property
    def workers(self) -> Path:
        """Logs of the workers."""
        return self._own("workers", "workers/{}")

    @property
    def refinement(self) -> Path:
        """What was decided on further runs."""
        return self.path / "refinement.jsonl"

    def curve(self, cell_id: str) -> Path:
        """Training losses of a cell that is through."""
        return self.path / "curves" / f"{cell_id}.npy"

    def metrics(self, cell_id: str) -> Path:
        """Metrics of a cell that runs or was interrupted."""
        return self.cell(cell_id) / "metrics.jsonl"

    def cell(self, cell_id: str) -> Path:
        """What an interrupted cell has left."""
        return self.path / "cells" / cell_id

    def config(self, cell_id: str) -> Path:
        """The canonical configuration of a cell."""
        return self.path / "configs" / f"{cell_id}.json"

    @property
    def sweep_yaml(self) -> Path:
        """What was run last."""
        return self.path / "sweep.yaml"

    @property
    def _state(self) -> Path:
        return self._own("state.json", "tasks/{}.json")

    @property
    def _lock(self) -> Path:
        return self.path / self._lock_name

    @property
    def _lock_name(self) -> str:
        return LOCK if self.task is None else f"tasks/.task-{self.task}.lock"

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the folder; the system gives it back when the process dies.

        Tasks hold it together, each one its own part of it alone.

        Raises:
            ConfigError: another process holds it.
        """
        with contextlib.ExitStack() as locks:
            if self.task is not None:
                locks.enter_context(held(self.path, LOCK, by=_HOLDER, together=True))
            locks.enter_context(held(self.path, self._lock_name, by=_HOLDER))
            yield

    @contextlib.contextmanager
    def shared(self) -> Iterator[None]:
        """Keep away commands that have the folder for themselves, but not tasks.

        Raises:
            ConfigError: one of them holds it.
        """
        with held(self.path, LOCK, by=_HOLDER, together=True):
            yield

    def owner(self) -> str | None:
        """Who holds the folder, in words; None if nobody does."""
        return owner_of(self._lock)

    def write_sweep(self, sweep: Sweep) -> None:
        """Keep what is run."""
        for folder in (self.workers, *(self.path / name for name in _OF_CELLS)):
            folder.mkdir(parents=True, exist_ok=True)
        publish_text(self.sweep_yaml, yaml.safe_dump(portable_document(sweep), sort_keys=False))

    def read_sweep(self) -> Sweep:
        """What was run last.

        Raises:
            ConfigError: this is no sweep's folder.
        """
        if not self.sweep_yaml.is_file():
            raise ConfigError(
                f"'{self.path}' holds no sweep.yaml; give the --out folder of 'megatron-mup sweep "
                "run'"
            )
        return load_sweep(self.sweep_yaml)

    def write_config(self, cell: Cell) -> None:
        """Keep what a cell's name is made of."""
        if not self.config(cell.id).exists():
            publish_text(self.config(cell.id), cell.canonical)

    def write_state(self, state: dict[str, Any]) -> None:
        """Replace the state; readers see the old or the new one."""
        temporary = self._state.with_name(f".{self._state.name}.tmp")
        temporary.write_text(json.dumps(state), encoding="utf-8")
        # Not synced: it is of no use after the machine went down.
        os.replace(temporary, self._state)

    def read_state(self) -> dict[str, Any]:
        """The last state; empty without one."""
        try:
            state = json.loads(self._state.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return {}
        except (OSError, ValueError) as error:
            raise DataError(f"cannot read '{self._state}': {error}; delete it") from error
        return dict(state)

    def add_seconds(self, cell_id: str, seconds: float) -> None:
        """Add to the time that a cell has taken in attempts that did not end it."""
        total = self.earlier_seconds(cell_id) + seconds
        self.cell(cell_id).mkdir(parents=True, exist_ok=True)
        (self.cell(cell_id) / "seconds").write_text(repr(total), encoding="utf-8")

    def earlier_seconds(self, cell_id: str) -> float:
        """What ``add_seconds`` summed up."""
        try:
            return float((self.cell(cell_id) / "seconds").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return 0.0

    def drop_cell(self, cell_id: str) -> None:
        """Delete what a cell left behind."""
        shutil.rmtree(self.cell(cell_id), ignore_errors=True)
