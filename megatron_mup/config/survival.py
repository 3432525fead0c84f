"""Checkpoints, and what a run does when something goes wrong."""

from __future__ import annotations

from dataclasses import dataclass, field

from megatron_mup.config.checks import require, require_positive
from megatron_mup.config.choices import BadStepPolicy


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """Saving and resuming, in Megatron's layout (``iter_0000100``, torch_dist)."""

    save: str | None = None
    """Folder to save to; unset means no checkpoints."""

    save_interval: int | None = None
    """Iterations between checkpoints; unset means only at the end."""

    async_save: bool = False
    """Write checkpoints in the background while training goes on."""

    keep_last: int | None = None
    """Delete all but this many newest checkpoints; unset keeps all."""

    save_retain_interval: int | None = None
    """Never delete checkpoints of multiples of this iteration."""

    load: str | None = None
    """Folder to resume from; an empty or missing one starts from scratch, as in Megatron."""

    ckpt_step: int | None = None
    """Iteration to resume from; unset means the newest whole checkpoint."""

    finetune: bool = False
    """Load weights only: iteration, optimizer and data order start anew."""

    override: list[str] = field(default_factory=list)
    """Options that may differ from the checkpoint's, by name: ``[optimizer.lr]``."""

    def __post_init__(self) -> None:
        """Check values; raises ConfigError."""
        require_positive(
            "checkpoint", self, "save_interval", "keep_last", "save_retain_interval", "ckpt_step"
        )
        for name in ("finetune", "ckpt_step", "override"):
            require(
                not getattr(self, name) or self.load is not None,
                f"checkpoint.{name} needs checkpoint.load, the folder with the weights",
            )
        require(
            self.save_retain_interval is None or self.keep_last is not None,
            f"checkpoint.save_retain_interval={self.save_retain_interval} keeps checkpoints from "
            "deletion, but nothing is deleted; set checkpoint.keep_last",
        )
        for name in ("async_save", "keep_last", "save_interval"):
            require(
                not getattr(self, name) or self.save is not None,
                f"checkpoint.{name} needs checkpoint.save, the folder to save to",
            )


@dataclass(frozen=True, kw_only=True)
class FaultConfig:
    """Signals, time limits, bad steps, and who may write to a folder."""

    exit_duration_in_mins: float | None = None
    """Save and exit after so many minutes, counted from the start of the process."""

    bad_step_policy: BadStepPolicy = BadStepPolicy.STOP
    """What happens at a loss or gradient that is not finite, or at a spike."""

    loss_spike_factor: float | None = None
    """A step whose loss exceeds this times the mean of the last 100 good steps is a spike (ours);
    unset: no loss is one."""

    max_skipped_steps: int = 10
    """Steps in a row that may be skipped; one bad step more stops the run."""

    lease_timeout_seconds: float = 120.0
    """A save folder whose owner has not been heard of for so long may be taken over."""

    def __post_init__(self) -> None:
        """Check values; raises ConfigError."""
        require_positive("faults", self, "max_skipped_steps")
        duration, factor = self.exit_duration_in_mins, self.loss_spike_factor
        require(
            duration is None or duration > 0,
            f"faults.exit_duration_in_mins is {duration}; it must be positive",
        )
        require(
            factor is None or factor > 1,
            f"faults.loss_spike_factor is {factor}; it must be above 1",
        )
        require(
            self.lease_timeout_seconds > 0,
            f"faults.lease_timeout_seconds is {self.lease_timeout_seconds}; it must be positive",
        )
