"""A whole run: all sections and the relations between them."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

from megatron_mup.config.checks import require
from megatron_mup.config.choices import ExtraWarmup, OptimizerName
from megatron_mup.config.layout import ParallelConfig, PrecisionConfig, RecomputeConfig
from megatron_mup.config.layout_checks import check_layout_relations
from megatron_mup.config.model import ModelConfig
from megatron_mup.config.optimization import OptimizerSection, ScheduleConfig
from megatron_mup.config.running import DataConfig, LoggingConfig, TrainingConfig
from megatron_mup.config.survival import CheckpointConfig, FaultConfig
from megatron_mup.parameterization.horizon import Horizon, scaled_for_horizon
from megatron_mup.parameterization.options import (
    HorizonRule,
    OptimizerNumbers,
    ParameterizationConfig,
)
from megatron_mup.parameterization.table import ParameterTable, resolve


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """A whole run. Construction checks every section and every relation between them."""

    model: ModelConfig
    optimizer: OptimizerSection
    training: TrainingConfig
    parameterization: ParameterizationConfig = field(default_factory=ParameterizationConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    data: DataConfig = field(default_factory=DataConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    precision: PrecisionConfig = field(default_factory=PrecisionConfig)
    recompute: RecomputeConfig = field(default_factory=RecomputeConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    faults: FaultConfig = field(default_factory=FaultConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)

    def __post_init__(self) -> None:
        """Check relations between sections; raises ConfigError or ParameterizationError."""
        check_layout_relations(self)
        self._check_training()
        self._check_schedule()
        self._check_waiting()
        self.table  # noqa: B018  resolving refuses a parameterization without a rule

    def _check_training(self) -> None:
        require(
            self.training.rampup_batch_size is None
            or self.parameterization.horizon_rule is HorizonRule.NONE,
            f"parameterization.horizon_rule={self.parameterization.horizon_rule} needs a constant "
            "batch; leave training.rampup_batch_size unset",
        )
        start = self.training.profile_step_start
        require(
            not self.training.profile or start < self.training.train_iters,
            f"training.profile_step_start {start} is not below train_iters "
            f"{self.training.train_iters}: nothing would be profiled",
        )
        batch, micro = self.training.global_batch_size, self.training.micro_batch_size
        require(
            batch % micro == 0,
            f"training.global_batch_size {batch} is not divisible by micro_batch_size {micro}; "
            "change one of them",
        )

    def _check_waiting(self) -> None:
        # The other ranks wait for the first one while it watches a silent owner.
        lease, limit = self.faults.lease_timeout_seconds, self.parallel.distributed_timeout_minutes
        require(
            self.checkpoint.save is None or lease < 60 * limit,
            f"faults.lease_timeout_seconds {lease:g} is not below "
            f"parallel.distributed_timeout_minutes {limit:g}: ranks would give up while the first "
            "one waits for a dead owner of checkpoint.save; lower the first or raise the second",
        )

    def _check_schedule(self) -> None:
        warmup, end = self.schedule.lr_warmup_iters, self.decay_iters
        require(
            warmup <= end,
            f"schedule.lr_warmup_iters {warmup} exceeds lr_decay_iters {end} (unset means "
            f"train_iters {self.training.train_iters}); shorten the warmup",
        )
        wsd = self.schedule.lr_wsd_decay_iters or 0
        require(
            warmup + wsd <= end,
            f"schedule: warmup {warmup} and lr_wsd_decay_iters {wsd} together exceed {end} "
            "iterations; shorten one of them",
        )
        self._check_extra_warmup()

    def _check_extra_warmup(self) -> None:
        kind = self.schedule.extra_warmup
        if kind is ExtraWarmup.NONE:
            return
        require(
            self.parameterization.base_hidden_size is not None,
            f"schedule.extra_warmup={kind} starts at base width / width: set "
            "parameterization.base_hidden_size",
        )
        decay = self.optimizer.weight_decay
        require(
            kind is not ExtraWarmup.IMPLIED_MUP or (decay > 0 and self.optimizer.lr > 0),
            f"schedule.extra_warmup=implied_mup rises as weight decay forgets the initial weights, "
            f"but optimizer.weight_decay is {decay} and lr {self.optimizer.lr}; set both above 0 "
            "or use exponential",
        )

    @property
    def decay_iters(self) -> int:
        """Iteration at which the schedule reaches its minimum."""
        return self.schedule.lr_decay_iters or self.training.train_iters

    @property
    def planned_iters(self) -> int:
        """Iterations that data is shuffled for: the run's, or the schedule's if that is longer."""
        return max(self.training.train_iters, self.decay_iters)

    # Cached: the sections are frozen, and the loop asks in every step and log line.
    @cached_property
    def table(self) -> ParameterTable:
        """The resolved parameter table of this run."""
        return resolve(self.model.shape, self.parameterization, self.optimizer_numbers)

    @cached_property
    def optimizer_numbers(self) -> OptimizerNumbers:
        """The optimizer's scalars for this run's batch and length; what the rules start from."""
        batch_tokens = self.training.global_batch_size * self.model.seq_length
        return scaled_for_horizon(
            self.optimizer.numbers,
            self.parameterization,
            Horizon(batch_tokens, batch_tokens * self.training.train_iters),
            adam=self.optimizer.optimizer is OptimizerName.ADAM,
        )
