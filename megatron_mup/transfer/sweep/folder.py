"""The sweep's folder: who may write to it, what lies where.

    runs.csv, runs.parquet   the table
    sweep.yaml               what was run last, with the base in it
    configs/<cell>.json      what each cell's name is the hash of
    cells/<cell>/            checkpoints and metrics of a cell that runs or was interrupted
    data/                    tokenizer and shards, where the sweep makes them
    state.json               what runs now, for ``sweep status``
    workers/                 logs of the worker processes
Must not import torch.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from megatron_mup.data.publication import publish_text
from megatron_mup.errors import ConfigError, DataError
from megatron_mup.transfer.sweep.base import portable_document
from megatron_mup.transfer.sweep.cells import Cell
from megatron_mup.transfer.sweep.spec import Sweep, load_sweep

LOCK = ".lock"


@dataclass(frozen=True)
class SweepFolder:
    """Names of what lies in a sweep's folder.

    Attributes:
        path: the folder.
    """

    path: Path

    @property
    def table(self) -> Path:
        """The CSV table."""
        return self.path / "runs.csv"

    @property
    def parquet(self) -> Path:
        """The same table as Parquet."""
        return self.path / "runs.parquet"

    @property
    def data(self) -> Path:
        """Shards that the sweep makes."""
        return self.path / "data"

    @property
    def cache(self) -> Path:
        """Index caches of the workers."""
        return self.path / "cache"

    @property
    def workers(self) -> Path:
        """Logs of the workers."""
        return self.path / "workers"

    def cell(self, cell_id: str) -> Path:
        """What an interrupted cell has left."""
        return self.path / "cells" / cell_id

    def config(self, cell_id: str) -> Path:
        """The canonical configuration of a cell."""
        return self.path / "configs" / f"{cell_id}.json"

    @property
    def _yaml(self) -> Path:
        return self.path / "sweep.yaml"

    @property
    def _state(self) -> Path:
        return self.path / "state.json"

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the folder; the system gives it back when the process dies.

        Raises:
            ConfigError: another process holds it.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        with (self.path / LOCK).open("a+", encoding="utf-8") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                lock.seek(0)
                raise ConfigError(
                    f"{self.path} is in use by another sweep ({lock.read().strip()}); wait for it, "
                    "stop it, or choose another --out"
                ) from None
            lock.truncate(0)
            lock.write(f"pid {os.getpid()} on {socket.gethostname()}\n")
            lock.flush()
            yield

    def owner(self) -> str | None:
        """Who holds the folder, in words; None if nobody does."""
        try:
            with (self.path / LOCK).open("r", encoding="utf-8") as lock:
                try:
                    fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
                except BlockingIOError:
                    return lock.read().strip()
        except OSError:
            return None
        return None

    def write_sweep(self, sweep: Sweep) -> None:
        """Keep what is run."""
        for folder in (self.workers, self.path / "cells", self.path / "configs"):
            folder.mkdir(exist_ok=True)
        publish_text(self._yaml, yaml.safe_dump(portable_document(sweep), sort_keys=False))

    def read_sweep(self) -> Sweep:
        """What was run last.

        Raises:
            ConfigError: this is no sweep's folder.
        """
        if not self._yaml.is_file():
            raise ConfigError(
                f"'{self.path}' holds no sweep.yaml; give the --out folder of 'megatron-mup sweep "
                "run'"
            )
        return load_sweep(self._yaml)

    def write_config(self, cell: Cell) -> None:
        """Keep what a cell's name is made of."""
        if not self.config(cell.id).exists():
            publish_text(self.config(cell.id), cell.canonical)

    def write_state(self, state: dict[str, Any]) -> None:
        """Replace the state; readers see the old or the new one."""
        temporary = self._state.with_name(".state.json.tmp")
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
