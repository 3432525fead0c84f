"""Checkpoints of this package as a source of weights.

Reads one logical tensor at a time, from whatever layout saved it, with the memory of that tensor
and of one stored block. Needs no process group and builds no model.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from megatron_mup.checkpoint.folders import read_record, usable_iterations
from megatron_mup.checkpoint.integrity import (
    CHECKSUMS,
    check_files,
    checkpoint_folder,
    iteration_of,
    read_checksums,
)
from megatron_mup.checkpoint.record import check_record
from megatron_mup.config import ModelConfig, RunConfig
from megatron_mup.config_io import config_from_dict
from megatron_mup.convert.concurrent_check import checked_meanwhile
from megatron_mup.convert.stored_blocks import Sizes
from megatron_mup.convert.stored_places import COMMON_STATE, MAIN_WEIGHT, Place, place_of, read_rows
from megatron_mup.convert.stored_tensors import METADATA, StoredTensors
from megatron_mup.errors import CheckpointError, ConfigError, ParameterizationError
from megatron_mup.parameterization.evaluation import Multipliers
from megatron_mup.parameterization.roles import logical_tensors


class MegatronSource:
    """The weights of a checkpoint that this package saved; a ``WeightSource``.

    Args:
        path: a run's ``save`` folder, or one ``iter_*`` folder of it.
        iteration: which checkpoint of a run's folder; unset means the newest.
        check: compare the SHA-256 of all files first, which reads all of them, the optimizer's
            state too. Without it each tensor's own checksum is compared when it is read.

    Attributes:
        folder: the checkpoint.
        record: its parameterization record.
        run: the configuration that saved it.
        iteration: finished iterations.
        stored: its tensors as Megatron names them, the optimizer's too.

    Raises:
        CheckpointError: no checkpoint, an incomplete or damaged one, or one without a record.
    """

    model: ModelConfig
    multipliers: Multipliers

    def __init__(self, path: Path, iteration: int | None = None, *, check: bool = True) -> None:
        self.folder = find_folder(path, iteration)
        self.record = read_record(self.folder)
        self.run = recorded_run(self.record, self.folder)
        self.model, self.multipliers = self.run.model, self.run.table.multipliers
        self.where = str(self.folder)
        listed = _has_checksums(self.folder, self.record)
        if check and listed:
            _check(self.folder)
        self.stored = StoredTensors(self.folder, trusted=check and listed)
        self.common: Mapping[str, Any] = _common_state(self.stored)
        self.iteration = int(self.common["iteration"])
        self.provenance: Mapping[str, Any] = self._provenance()
        self._places = {
            tensor.name: (tensor, place_of(tensor, self.model.shape))
            for tensor in logical_tensors(self.model.shape)
        }

    @contextlib.contextmanager
    def checked_meanwhile(self, *, wanted: bool) -> Iterator[Callable[[], None]]:
        """Compare the SHA-256 of all files while a block reads them; see ``concurrent_check``.

        Args:
            wanted: else every tensor's own checksum is compared when it is read.

        Yields:
            A function that waits for the comparison and raises what it found.

        Raises:
            CheckpointError: a file is not what was saved; names the tensors in it.
        """
        listed = wanted and _has_checksums(self.folder, self.record)
        self.stored.trusted = self.stored.trusted or listed
        check = partial(_check, self.folder) if listed else None
        with checked_meanwhile(check) as finish:
            yield finish

    def read(self, name: str) -> Tensor:
        """One logical tensor; see ``WeightSource.read``."""
        if name not in self._places:
            raise CheckpointError(f"{self.where} has no tensor {name}")
        tensor, place = self._places[name]
        key = self._checked_key(name, place)
        return read_rows(self.stored, key, place, tensor.shape)

    def read_stored(
        self, key: str, offset: Sizes | None = None, size: Sizes | None = None
    ) -> Tensor:
        """Read a box of any stored tensor, an optimizer's moment for example, as it is stored.

        Args:
            key: one of ``stored.tensors``.
            offset: of the box; unset means zeros.
            size: of the box; unset means all that follows.

        Raises:
            CheckpointError: as ``read``.
        """
        return self.stored.read(key, offset, size)

    def _checked_key(self, name: str, place: Place) -> str:
        """The stored tensor to read, after its shape was compared."""
        main = MAIN_WEIGHT + place.key
        key = main if main in self.stored.tensors else place.key
        stored = self.stored.tensors.get(key)
        if stored is None:
            raise CheckpointError(
                f"{self.folder / METADATA} has no tensor {key}, which holds {name}; the "
                "checkpoint is incomplete: copy it again or use another one"
            )
        if stored.shape != place.shape:
            raise CheckpointError(
                f"{self.folder / METADATA}: {key} has shape {list(stored.shape)}, but the model of "
                f"the record needs {list(place.shape)} for {name}; the folder mixes two checkpoints"
            )
        return key

    def _provenance(self) -> dict[str, Any]:
        samples = int(self.common.get("consumed_train_samples", 0))
        return {
            **self.record.get("provenance", {}),
            "checkpoint": self.folder.name,
            "iteration": self.iteration,
            "consumed_train_samples": samples,
            "consumed_train_tokens": samples * self.model.seq_length,
            "version": self.record.get("version"),
            "parameterization": self.record["config"].get("parameterization", {}),
        }


def find_folder(path: Path, iteration: int | None = None) -> Path:
    """One checkpoint: the folder itself, or a checkpoint of a run's folder.

    Args:
        path: an ``iter_*`` folder, or a folder that holds such.
        iteration: which one; unset means the newest that was saved to its end.

    Raises:
        CheckpointError: there is none.
    """
    if not path.is_dir():
        raise CheckpointError(f"{path} is no folder; give a run's save folder or one iter_* folder")
    if (path / METADATA).exists() or iteration_of(path) is not None:
        if iteration is not None and iteration_of(path) != iteration:
            raise CheckpointError(
                f"{path} is one checkpoint and not iteration {iteration}; give the folder that "
                "holds it, or leave the iteration out"
            )
        return path
    usable = usable_iterations(path)
    if not usable:
        raise CheckpointError(
            f"{path} holds no checkpoint; give a run's save folder or one iter_* folder"
        )
    if iteration is not None and iteration not in usable:
        raise CheckpointError(f"{path} holds no whole iteration {iteration}, but {usable}")
    return checkpoint_folder(path, usable[0] if iteration is None else iteration)


def recorded_run(record: Mapping[str, Any], folder: Path) -> RunConfig:
    """The configuration of a checkpoint's record.

    Raises:
        CheckpointError: this version cannot read it, or it contradicts the record's numbers.
    """
    config = record.get("config")
    try:
        if not isinstance(config, dict):
            raise ConfigError("it is no mapping")
        run = config_from_dict(config, origin=f"the configuration in the record of {folder}")
    except (ConfigError, ParameterizationError) as error:
        raise CheckpointError(
            f"cannot use the configuration in the record of {folder}, which megatron_mup "
            f"{record.get('version')} wrote: {error}"
        ) from error
    # The multipliers that training used must be those that this version derives.
    check_record(record, run, weights_only=True)
    return run


def _has_checksums(folder: Path, record: Mapping[str, Any]) -> bool:
    """Whether there are checksums; only checkpoints of format 1 came without.

    Raises:
        CheckpointError: there should be.
    """
    if not (folder / CHECKSUMS).exists() and record.get("format") == 1:
        return False
    read_checksums(folder)
    return True


def _check(folder: Path) -> None:
    problems = check_files(folder)
    if problems:
        # Proving every part anew finds the tensors, which a file's checksum cannot name.
        stored = StoredTensors(folder)
        listed = "\n  ".join(stored.explain(problem) for problem in problems)
        raise CheckpointError(
            f"{folder} is not what was saved:\n  {listed}\nrestore the named files from a copy, or "
            "use another iter_* folder"
        )


def _common_state(stored: StoredTensors) -> Mapping[str, Any]:
    common = stored.read_object(COMMON_STATE)
    if not isinstance(common, dict) or not isinstance(common.get("iteration"), int):
        raise CheckpointError(f"{stored.folder}: {COMMON_STATE} names no iteration")
    return common
