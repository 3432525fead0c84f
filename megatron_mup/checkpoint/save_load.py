"""Save and load training state: Megatron's folders, torch_dist format.

``<save>/iter_0000100/`` holds a complete checkpoint, with its parameterization record as JSON, and
``latest_checkpointed_iteration.txt`` names the newest one. A checkpoint is written under a
temporary name, renamed when all ranks are done, and named in the tracker last, so the newest named
one is always whole.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state
from torch.distributed.checkpoint.api import CheckpointException

from megatron_mup.checkpoint.record import check_record, length_warning, make_record
from megatron_mup.config import RunConfig
from megatron_mup.data.publication import published, sync_folder
from megatron_mup.errors import CheckpointError
from megatron_mup.training.state import TrainState

logger = logging.getLogger(__name__)

TRACKER = "latest_checkpointed_iteration.txt"
RECORD = "parameterization.json"
CHECKPOINT_VERSION = 3.0
"""Megatron-LM's version of the query-key-value row order that 0.19.2 writes."""


def checkpoint_folder(root: Path, iteration: int) -> Path:
    """Megatron's folder name of one checkpoint."""
    return root / f"iter_{iteration:07d}"


def latest_iteration(root: Path) -> int | None:
    """Iteration of the newest complete checkpoint; None when there is none.

    Raises:
        CheckpointError: the tracker is damaged, or names a folder that is not there.
    """
    tracker = root / TRACKER
    if not tracker.exists():
        return None
    text = tracker.read_text(encoding="utf-8").strip()
    if not text.isdigit():
        raise CheckpointError(
            f"{tracker} holds '{text}' instead of an iteration number; write the number of the "
            "newest iter_* folder into it"
        )
    iteration = int(text)
    if not (checkpoint_folder(root, iteration) / "metadata.json").exists():
        raise CheckpointError(
            f"{tracker} names iteration {iteration} but {checkpoint_folder(root, iteration)} is "
            "missing or incomplete; write the number of another iter_* folder into the tracker"
        )
    return iteration


def _sharded_state(state: TrainState, *, loading: bool, with_optimizer: bool) -> dict[str, Any]:
    """What is saved, as Megatron's sharded state dict; keys are Megatron-LM's."""
    metadata = {"dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True)}
    bare: Any = state.model_chunks[0]
    tree: dict[str, Any] = {"model": bare.sharded_state_dict(metadata=metadata)}
    if with_optimizer:
        tree["optimizer"] = state.optimizer.sharded_state_dict(
            tree["model"], is_loading=loading, metadata=metadata
        )
    return tree


def save_checkpoint(state: TrainState, root: Path) -> Path:
    """Write a checkpoint of the current step; every rank must call it.

    Args:
        state: model, optimizer and counters.
        root: the ``save`` folder.

    Returns:
        The finished folder.
    """
    final = checkpoint_folder(root, state.iteration)
    temporary = final.with_name(final.name + ".tmp")
    first = dist.get_rank() == 0
    if first:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
    dist.barrier()
    tree = _sharded_state(state, loading=False, with_optimizer=True)
    tree["checkpoint_version"] = CHECKPOINT_VERSION
    tree["iteration"] = state.iteration
    tree["consumed_train_samples"] = state.consumed_samples
    dist_checkpointing.save(tree, str(temporary))
    dist.barrier()
    if first:
        (temporary / RECORD).write_text(json.dumps(make_record(state.run), indent=1))
        _publish(temporary, final)
        with published(root / TRACKER) as stream:
            stream.write(str(state.iteration).encode())
    dist.barrier()
    return final


def _publish(temporary: Path, final: Path) -> None:
    """Give a complete checkpoint its name, once the disk holds all of it.

    A folder of that name (the same iteration, saved before) is moved aside first and deleted last,
    so at no moment is its content gone before the new one is whole.
    """
    for path in temporary.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
    sync_folder(temporary)
    aside = final.with_name(final.name + ".old.tmp")
    shutil.rmtree(aside, ignore_errors=True)
    if final.exists():
        final.rename(aside)
    temporary.rename(final)
    sync_folder(final.parent)
    shutil.rmtree(aside, ignore_errors=True)


def check_resumable(run: RunConfig) -> int | None:
    """Check a checkpoint against a configuration before anything is built.

    Args:
        run: the configuration; ``checkpoint.load`` names the folder.

    Returns:
        The iteration to load, None when the folder holds no checkpoint.

    Raises:
        CheckpointError: damaged folder or another parameterization; or ``finetune`` without one.
    """
    if run.checkpoint.load is None:
        return None
    root = Path(run.checkpoint.load)
    if root.name.startswith("iter_"):
        raise CheckpointError(
            f"checkpoint.load '{root}' is one checkpoint; give the folder that holds it, "
            f"'{root.parent}', whose {TRACKER} names the iteration"
        )
    iteration = latest_iteration(root)
    if iteration is None:
        if run.checkpoint.finetune:
            raise CheckpointError(
                f"checkpoint.finetune: '{root}' holds no checkpoint (no {TRACKER}); "
                "set checkpoint.load to a folder that training saved to"
            )
        return None
    record = read_record(checkpoint_folder(root, iteration))
    check_record(record, run, weights_only=run.checkpoint.finetune)
    warning = None if run.checkpoint.finetune else length_warning(record, run)
    if warning is not None:
        logger.warning(warning)
    return iteration


def check_save_folder(run: RunConfig) -> None:
    """Refuse to save into the folder of a run that this one does not continue.

    Raises:
        CheckpointError: the folder holds checkpoints of another run.
    """
    save, load = run.checkpoint.save, run.checkpoint.load
    continues = load is not None and save is not None and Path(load) == Path(save)
    if save is None or (continues and not run.checkpoint.finetune):
        return
    held = latest_iteration(Path(save))
    if held is not None:
        raise CheckpointError(
            f"checkpoint.save '{save}' already holds iteration {held} of a run that this one does "
            f"not continue; continue it with checkpoint.load={save}, or save elsewhere"
        )


def read_record(folder: Path) -> dict[str, Any]:
    """The parameterization record of a checkpoint.

    Raises:
        CheckpointError: unreadable, or not written by this package.
    """
    path = folder / RECORD
    if not path.exists():
        raise CheckpointError(
            f"{folder} has no parameterization record ({RECORD}); it was not written by "
            "megatron_mup, so its multipliers are unknown"
        )
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"cannot read {path}: {error}") from error
    if not isinstance(record, dict):
        raise CheckpointError(f"{path} does not hold a record")
    return record


def load_checkpoint(state: TrainState, folder: Path, *, weights_only: bool) -> None:
    """Load weights, and unless ``weights_only`` optimizer and counters; every rank must call it.

    Raises:
        CheckpointError: the folder cannot be read.
    """
    tree = _sharded_state(state, loading=True, with_optimizer=not weights_only)
    try:
        loaded = dist_checkpointing.load(tree, str(folder))
    except (Exception, CheckpointException) as error:
        # torch's CheckpointException derives from BaseException.
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise CheckpointError(
            f"cannot load checkpoint {folder}, a file of it is cut or damaged "
            f"({lines[-1].strip()}); write the number of another iter_* folder into {TRACKER}"
        ) from error
    state.model_chunks[0].load_state_dict(loaded["model"])
    if weights_only:
        # bf16 runs keep fp32 main weights that were copied before loading.
        state.optimizer.reload_model_params()
        return
    state.optimizer.load_state_dict(loaded["optimizer"])
    state.iteration = int(loaded["iteration"])
    state.consumed_samples = int(loaded["consumed_train_samples"])
