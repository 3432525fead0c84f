"""Names inside a ``save`` folder, and which of its checkpoints can be used.

``iter_0000100/`` is one checkpoint, with its record as JSON; it gets that name when it is complete.
``latest_checkpointed_iteration.txt`` names the newest one for Megatron's tools; this package goes
by the folders themselves. Must not import torch.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from megatron_mup.checkpoint.integrity import (
    CHECKSUMS,
    iteration_of,
    read_checksums,
    whole_iterations,
)
from megatron_mup.data.publication import publish_text
from megatron_mup.errors import CheckpointError

REPLACED = ".old.tmp"
"""Ending of a checkpoint that is being replaced by one of the same iteration."""
TRACKER = "latest_checkpointed_iteration.txt"
RECORD = "parameterization.json"
METADATA = "metadata.json"
"""Megatron's, written last by a save of format 1."""


def iterations_without_checksums(root: Path) -> list[int]:
    """Checkpoints of format 1, which came without checksums, newest first."""
    found = []
    for path in root.glob(f"iter_*/{METADATA}"):
        iteration = iteration_of(path.parent)
        if iteration is None or (path.parent / CHECKSUMS).exists():
            continue
        try:
            if read_record(path.parent).get("format") == 1:
                found.append(iteration)
        except CheckpointError:
            continue
    return sorted(found, reverse=True)


def usable_iterations(root: Path) -> list[int]:
    """Iterations that were saved to their end, newest first; their files are not read.

    Args:
        root: the folder of a run; may be missing.

    Raises:
        CheckpointError: the folder holds checkpoints, but none that was saved to its end.
    """
    usable = sorted({*whole_iterations(root), *iterations_without_checksums(root)}, reverse=True)
    if usable:
        return usable
    folders = sorted(path for path in root.glob("iter_*") if iteration_of(path) is not None)
    if folders:
        if (folders[-1] / METADATA).exists():
            read_record(folders[-1])
        raise CheckpointError(
            f"{folders[-1]} is incomplete ({CHECKSUMS} is missing), and '{root}' holds no whole "
            "checkpoint; copy one there, or remove the folder to start from scratch"
        )
    tracked = tracked_iteration(root)
    replaced = sorted(root.glob(f"iter_*{REPLACED}"))
    if replaced:
        final = replaced[-1].name.removesuffix(REPLACED)
        raise CheckpointError(
            f"a run was killed while it replaced {root / final}, and '{root}' holds no other "
            f"checkpoint; rename {replaced[-1]} to {final}"
        )
    if tracked is not None:
        raise CheckpointError(
            f"{root / TRACKER} names iteration {tracked} but no iter_* folder is there; copy the "
            "checkpoint there, or remove the file to start from scratch"
        )
    return []


def tracked_iteration(root: Path) -> str | None:
    """What the tracker says, whatever it is; None without one."""
    try:
        return (root / TRACKER).read_text(encoding="utf-8", errors="replace").strip()
    except FileNotFoundError:
        return None


def write_tracker(root: Path, iteration: int) -> None:
    """Name the newest checkpoint for Megatron's tools."""
    publish_text(root / TRACKER, str(iteration))


def read_record(folder: Path) -> dict[str, Any]:
    """The parameterization record of a checkpoint.

    Raises:
        CheckpointError: missing, changed since it was saved, or not written by this package.
    """
    path = folder / RECORD
    try:
        content = path.read_bytes()
    except FileNotFoundError as error:
        raise CheckpointError(
            f"{folder} has no parameterization record ({RECORD}); it was not written by "
            "megatron_mup, so its multipliers are unknown"
        ) from error
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from error
    if (folder / CHECKSUMS).exists():
        # It is read before the other files are checked, and decides what they mean.
        expected = read_checksums(folder).get(RECORD)
        if expected is None or hashlib.sha256(content).hexdigest() != expected.sha256:
            raise CheckpointError(f"{path} was changed: its SHA-256 is not that of the saved file")
    try:
        record = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"cannot read {path}: {error}") from error
    if not isinstance(record, dict):
        raise CheckpointError(f"{path} does not hold a record")
    return record
