"""Which checkpoints are deleted, and how: nothing half deleted ever looks like a checkpoint.

A folder loses its name before it loses its first file. One rank calls these functions, and only
while its run owns the ``save`` folder.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterable
from pathlib import Path

from megatron_mup.checkpoint.integrity import CHECKSUMS, checkpoint_folder
from megatron_mup.data.publication import sync_folder

logger = logging.getLogger(__name__)

TEMPORARY = ".tmp"
ASIDE = ".old.tmp"
"""A checkpoint that waits for its successor of the same name."""


def iterations_to_delete(
    iterations: Iterable[int], *, keep_last: int | None, retain_interval: int | None
) -> list[int]:
    """Choose the checkpoints that are no longer needed.

    Args:
        iterations: saved iterations.
        keep_last: how many newest ones stay; None keeps all.
        retain_interval: multiples of this iteration stay as well.

    Returns:
        Iterations to delete, oldest first.
    """
    if keep_last is None:
        return []
    older = sorted(set(iterations))[:-keep_last]
    return [i for i in older if retain_interval is None or i % retain_interval != 0]


def delete_checkpoint(root: Path, iteration: int) -> None:
    """Delete a checkpoint; one that cannot be deleted is logged and costs no run its life.

    Args:
        root: the ``save`` folder.
        iteration: the checkpoint; a missing one is no error.
    """
    folder = checkpoint_folder(root, iteration)
    doomed = root / f".{folder.name}.deleted{TEMPORARY}"
    try:
        shutil.rmtree(doomed, ignore_errors=True)
        folder.rename(doomed)
        # Otherwise a crash could bring back the old name with some of the files.
        sync_folder(root)
        shutil.rmtree(doomed)
    except FileNotFoundError:
        logger.warning("checkpoint %s is gone already", folder)
    except OSError as error:
        logger.warning("cannot delete checkpoint %s: %s", folder, error)


def remove_leftovers(root: Path) -> list[str]:
    """Remove what a killed run left; to be called before anything is loaded or saved.

    A whole checkpoint that had been moved aside for its successor gets its name back if the
    successor did not arrive.

    Args:
        root: the ``save`` folder; may be missing.

    Returns:
        Names of what was removed, for the log.
    """
    if not root.is_dir():
        return []
    removed = []
    for path in sorted(root.iterdir()):
        if path.is_symlink() or not _is_leftover(path):
            continue
        final = path.with_name(path.name.removesuffix(ASIDE))
        try:
            if path.name.endswith(ASIDE) and not final.exists() and (path / CHECKSUMS).is_file():
                path.rename(final)
                logger.warning("%s was interrupted while being replaced and is back", final)
                continue
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()
            removed.append(path.name)
        except OSError as error:
            logger.warning("cannot remove %s, left by a killed run: %s", path, error)
    return removed


def _is_leftover(path: Path) -> bool:
    """A checkpoint's folder without its final name, or a small file that was not renamed yet."""
    if not path.name.endswith(TEMPORARY):
        return False
    if path.is_dir():
        return path.name.startswith(("iter_", ".iter_"))
    # Not the lease's: another job may be about to take it.
    return path.name.startswith((".latest_", ".status.json.", ".wandb_run_id."))
