"""Read a checkpoint into a built state, on any layout."""

from __future__ import annotations

from pathlib import Path

from megatron.core import dist_checkpointing
from torch.distributed.checkpoint.api import CheckpointException

from megatron_mup.checkpoint.contents import take_over, wanted_tree
from megatron_mup.checkpoint.safe_pickle import loading_extra_states, safe_reading
from megatron_mup.errors import CheckpointError, MupError
from megatron_mup.training.state import TrainState


def load_checkpoint(state: TrainState, folder: Path, *, weights_only: bool) -> None:
    """Load weights, and unless ``weights_only`` optimizer and counters; every rank must call it.

    Args:
        state: built for this run; changed in place.
        folder: one checkpoint, from ``resume.choose_checkpoint``.
        weights_only: finetuning.

    Raises:
        CheckpointError: the folder cannot be read, or wants to run code.
    """
    tree = wanted_tree(state, weights_only=weights_only)
    try:
        with safe_reading(folder):
            loaded = dist_checkpointing.load(tree, str(folder))
    except MupError:
        raise
    except (Exception, CheckpointException) as error:
        # torch's CheckpointException derives from BaseException.
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise CheckpointError(
            f"cannot load checkpoint {folder}, a file of it is damaged or it is of another model "
            f"({lines[-1].strip()}); choose another one with checkpoint.ckpt_step"
        ) from error
    with loading_extra_states(loaded):
        take_over(state, loaded, weights_only=weights_only)
