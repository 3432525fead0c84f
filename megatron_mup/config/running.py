"""What a run reads and reports and how long it goes on: training, data, logging."""

from __future__ import annotations

from dataclasses import dataclass, field

from megatron_mup.config.checks import require, require_positive
from megatron_mup.config.choices import LossDenominator, SampleLayout


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """Length, batch, evaluation, profiling."""

    train_iters: int
    """Optimizer steps."""

    global_batch_size: int
    """Sequences per step over all ranks."""

    micro_batch_size: int
    """Sequences per forward pass of one data-parallel rank."""

    rampup_batch_size: list[int] | None = None
    """Megatron's [start, increment, samples]: the batch grows to global_batch_size."""

    loss_denominator: LossDenominator = LossDenominator.TOKENS
    """What the summed loss is divided by."""

    eval_interval: int | None = None
    """Evaluate every so many iterations; unset means only at the end."""

    eval_iters: int = 10
    """Global batches per evaluation; 0 switches evaluation off."""

    seed: int = 1234
    """Seed of initial weights and data order."""

    profile: bool = False
    """Trace iterations [profile_step_start, profile_step_end) with torch.profiler."""

    profile_step_start: int = 10
    """First iteration that is traced, counted from 0."""

    profile_step_end: int = 12
    """Iteration before which the trace ends."""

    profile_dir: str | None = None
    """Folder of the traces; required by ``profile``."""

    def __post_init__(self) -> None:
        """Check values; raises ConfigError."""
        require_positive("training", self, "train_iters", "global_batch_size", "micro_batch_size")
        require_positive("training", self, "eval_interval")
        require(
            self.eval_iters >= 0,
            f"training.eval_iters is {self.eval_iters}; it must not be negative",
        )
        require(self.seed >= 0, f"training.seed is {self.seed}; it must not be negative")
        if self.rampup_batch_size is not None:
            self._check_rampup(self.rampup_batch_size)
        if self.profile:
            require(
                0 <= self.profile_step_start < self.profile_step_end,
                f"training.profile_step_start {self.profile_step_start} is not before "
                f"profile_step_end {self.profile_step_end}",
            )
            require(
                self.profile_dir is not None,
                "training.profile needs training.profile_dir, the folder of the traces",
            )

    def _check_rampup(self, rampup: list[int]) -> None:
        require(
            len(rampup) == 3 and min(rampup) > 0,
            f"training.rampup_batch_size is {rampup}; give [start, increment, samples]",
        )
        start, increment, _ = rampup
        require(
            start < self.global_batch_size and (self.global_batch_size - start) % increment == 0,
            f"training.rampup_batch_size: from {start} in steps of {increment} does not end at "
            f"global_batch_size {self.global_batch_size}",
        )


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Token shards, named by their prefix (``.bin`` and ``.idx`` are added)."""

    train_data_path: list[str] = field(default_factory=list)
    """Prefixes of shards or shard sets, or Megatron's blend: weight, prefix, weight, prefix."""

    valid_data_path: list[str] = field(default_factory=list)
    """Prefixes of the held-out shards; may be empty when training.eval_iters is 0."""

    per_split_data_args_path: str | None = None
    """Blend file with both, as `data blend` writes it, in place of the two options."""

    data_cache_path: str | None = None
    """Folder for Megatron's dataset index; unset means beside the first training shard."""

    sample_layout: SampleLayout = SampleLayout.PACKED
    """``packed`` (Megatron's) or ``document``: one document a sequence, padded and masked."""

    bos_token: int | None = None
    """Id that ``document`` puts in front of each sequence; unset means ``eod_token``."""

    eod_mask_loss: bool = False
    """Do not train on the end-of-document token."""

    eod_token: int = 2
    """Id of the end-of-document token; `data tokenizer` makes 2."""

    max_epochs: float | None = None
    """Refuse to start a run that would read the training shards more often; unset: no limit."""

    def __post_init__(self) -> None:
        """Check values; raises ConfigError."""
        require(self.eod_token >= 0, f"data.eod_token is {self.eod_token}; it must not be negative")
        require(
            self.per_split_data_args_path is None
            or not (self.train_data_path or self.valid_data_path),
            f"data.per_split_data_args_path is {self.per_split_data_args_path}, and "
            "train_data_path or valid_data_path is given as well; give the file or the paths "
            "(data.train_data_path=[] data.valid_data_path=[] take a configuration's back)",
        )
        document = self.sample_layout is SampleLayout.DOCUMENT
        require(
            self.bos_token is None or (document and self.bos_token >= 0),
            f"data.bos_token is {self.bos_token} with sample_layout={self.sample_layout}; it must "
            "not be negative, and only sample_layout=document has a begin token",
        )
        require(
            not (document and self.eod_mask_loss),
            "data.eod_mask_loss=true leaves the end of document untrained, which sample_layout="
            "document trains; leave it at false",
        )
        require(
            self.max_epochs is None or self.max_epochs > 0,
            f"data.max_epochs is {self.max_epochs}; it must be positive",
        )


@dataclass(frozen=True, kw_only=True)
class LoggingConfig:
    """Progress and metric sinks; metric names are Megatron's."""

    log_interval: int = 10
    """Iterations between log lines."""

    peak_tflops_per_device: float | None = None
    """Peak of one device in TFLOP/s, for MFU; unset: known for A100, H100, H200, B200."""

    metrics_path: str | None = None
    """JSON lines file to append metrics to."""

    diagnostics_interval: int | None = None
    """Measure update dynamics every so many iterations, see docs/dynamics.md; unset: never."""

    diagnostics_path: str | None = None
    """JSON lines file to append them to; unset means `dynamics.jsonl` in checkpoint.save."""

    tensorboard_dir: str | None = None
    """Folder of TensorBoard's event files; unset means none."""

    wandb_project: str | None = None
    """wandb project; unset means that wandb is not used."""

    wandb_exp_name: str | None = None
    """Name of the run in wandb."""

    wandb_save_dir: str | None = None
    """Folder of wandb's files.

    wandb works offline when its own WANDB_MODE=offline is set, and then needs no network.
    """

    def __post_init__(self) -> None:
        """Check values; raises ConfigError."""
        require_positive("logging", self, "log_interval", "diagnostics_interval")
        require(
            self.diagnostics_path is None or self.diagnostics_interval is not None,
            f"logging.diagnostics_path is '{self.diagnostics_path}', but nothing is measured; set "
            "logging.diagnostics_interval as well",
        )
        require(
            self.peak_tflops_per_device is None or self.peak_tflops_per_device > 0,
            f"logging.peak_tflops_per_device is {self.peak_tflops_per_device}; it must be positive",
        )
