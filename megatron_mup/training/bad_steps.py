"""Steps that went wrong: what counts as one, what follows, and which batch it was.

A step is bad when its loss or gradient norm is not finite, or when its loss is a spike: above
``loss_spike_factor`` times the mean of recent good losses (ours). ``judge`` is a pure function of
numbers that every rank knows, so all ranks reach the same verdict without asking each other.
"""

from __future__ import annotations

import logging
import math
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megatron_mup.config import BadStepPolicy, FaultConfig
from megatron_mup.data.publication import published
from megatron_mup.errors import CheckpointError

logger = logging.getLogger(__name__)

HISTORY = 100
"""Good losses that the mean of a spike is taken over (assumption)."""

ENOUGH = 20
"""Good losses below which no loss is a spike: the first ones fall too fast (assumption)."""

BAD_BATCH_FOLDER = "bad_batches"


class Outcome(StrEnum):
    """What to do with a step."""

    GOOD = "good"
    SKIP = "skip"
    STOP = "stop"


@dataclass(frozen=True)
class Verdict:
    """What to do with a step, and why.

    Attributes:
        outcome: update, leave the update out, or leave it out and stop.
        reason: what is wrong, in words; empty for a good step.
    """

    outcome: Outcome
    reason: str = ""

    @property
    def vetoed(self) -> bool:
        """Whether the update is left out."""
        return self.outcome is not Outcome.GOOD


class BadSteps:
    """Judges every step, and remembers what it needs for that.

    Args:
        faults: policy and thresholds.
    """

    def __init__(self, faults: FaultConfig) -> None:
        self._faults = faults
        self._losses: deque[float] = deque(maxlen=HISTORY)
        self._in_a_row = 0
        self.skipped = 0
        """Steps left out so far, over restarts."""

    def judge(self, loss: float | None, grad_norm: float) -> Verdict:
        """Judge one step before its update; call it once per step, with the same numbers anywhere.

        Args:
            loss: mean over the unmasked tokens of the global batch, in nats; None if not known.
            grad_norm: global gradient norm before clipping.

        Returns:
            The verdict; a skipped step has been counted.
        """
        wrong = self._what_is_wrong(loss, grad_norm)
        if wrong is None:
            self._in_a_row = 0
            if loss is not None:
                self._losses.append(loss)
            return Verdict(Outcome.GOOD)
        if self._faults.bad_step_policy is BadStepPolicy.STOP:
            return Verdict(Outcome.STOP, wrong)
        if self._in_a_row >= self._faults.max_skipped_steps:
            return Verdict(
                Outcome.STOP,
                f"{wrong}, after {self._in_a_row} skipped steps in a row, all that "
                "faults.max_skipped_steps allows",
            )
        self._in_a_row += 1
        self.skipped += 1
        return Verdict(Outcome.SKIP, wrong)

    def _what_is_wrong(self, loss: float | None, grad_norm: float) -> str | None:
        """None for a good step."""
        if loss is not None and not math.isfinite(loss):
            return f"loss is {loss}"
        if not math.isfinite(grad_norm):
            return f"gradient norm is {grad_norm}"
        factor = self._faults.loss_spike_factor
        if loss is None or factor is None or len(self._losses) < ENOUGH:
            return None
        mean = math.fsum(self._losses) / len(self._losses)
        if loss <= factor * mean:
            return None
        return (
            f"loss {loss:.4g} is a spike: more than faults.loss_spike_factor {factor:g} x "
            f"{mean:.4g}, the mean of the last {len(self._losses)} good steps"
        )

    def state_dict(self) -> dict[str, Any]:
        """Plain data from which a resumed run judges as the uninterrupted one would."""
        return {
            "recent_losses": list(self._losses),
            "skipped_in_a_row": self._in_a_row,
            "skipped": self.skipped,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what ``state_dict`` gave.

        Raises:
            CheckpointError: it is not what ``state_dict`` gives.
        """
        try:
            losses = [float(loss) for loss in state["recent_losses"]]
            in_a_row, skipped = int(state["skipped_in_a_row"]), int(state["skipped"])
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(
                f"the checkpoint's record of bad steps is damaged ({type(error).__name__}: "
                f"{error}); resume from another one with checkpoint.ckpt_step"
            ) from error
        self._losses = deque(losses, maxlen=HISTORY)
        self._in_a_row, self.skipped = in_a_row, skipped


def save_bad_batch(
    folder: Path,
    iteration: int,
    *,
    rank: int,
    batches: Sequence[Mapping[str, Tensor]],
    reason: str,
) -> Path | None:
    """Keep the batch of a bad step, to be looked at; each rank that reads data writes its part.

    The file holds ``tokens``, ``labels`` (int64) and ``loss_mask`` (uint8), [B, S] in the order
    that they were read, and ``reason``; ``numpy.load`` reads it without pickle.

    Args:
        folder: the ``save`` folder.
        iteration: number of the step, counted from 1 as in the log.
        rank: global rank of this process.
        batches: this rank's microbatches.
        reason: from the verdict.

    Returns:
        The finished file; None, with a warning, if the disk refused it: a run must not end of it.
    """
    target = folder / BAD_BATCH_FOLDER / f"iter_{iteration:07d}_rank{rank}.npz"
    arrays: dict[str, Any] = {
        name: torch.cat([batch[name].detach().cpu() for batch in batches]).numpy().astype(kind)
        for name, kind in (("tokens", np.int64), ("labels", np.int64), ("loss_mask", np.uint8))
    }
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with published(target) as stream:
            np.savez(stream, reason=np.array(reason), **arrays)
    except OSError as error:
        logger.warning("the bad batch of iteration %d is not saved: %s", iteration, error)
        return None
    return target
