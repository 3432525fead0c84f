"""How a run ended, and the exit code that says so."""

from __future__ import annotations

from dataclasses import dataclass, field

from megatron_mup import exit_codes
from megatron_mup.training.exit_requests import ExitReason


@dataclass
class TrainResult:
    """What a run did; the same on every rank.

    Attributes:
        iteration: last finished iteration.
        history: metrics of every logged iteration, by Megatron's names plus ``iteration``.
        validation_loss: last held-out loss in nats per token; None without evaluation.
        diverged: the loss stopped being finite, or spiked, and the policy ended the run.
        stopped: why the run ended early though nothing was wrong with it; None if it did not.
        save_failed: why the last checkpoint could not be written, in words.
        saves: whether the run has a folder to save to.
    """

    iteration: int = 0
    history: list[dict[str, float]] = field(default_factory=list)
    validation_loss: float | None = None
    diverged: bool = False
    stopped: ExitReason | None = None
    save_failed: str | None = None
    saves: bool = False

    @property
    def exit_code(self) -> int:
        """What the process says of the run, from ``exit_codes``."""
        if self.diverged:
            return exit_codes.BAD_STEPS
        if self.stopped is ExitReason.LEASE_LOST:
            return exit_codes.LEASE_LOST
        if self.save_failed is not None:
            return exit_codes.SAVE_FAILED
        if self.stopped is not None:
            return exit_codes.STOPPED_SAVED if self.saves else exit_codes.STOPPED_UNSAVED
        return exit_codes.FINISHED
