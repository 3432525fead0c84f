"""Optimizer, weight decay and schedule."""

from __future__ import annotations

import math
from dataclasses import dataclass

from megatron_mup.config.checks import require, require_positive, require_probability
from megatron_mup.config.choices import (
    DecayStyle,
    ExtraWarmup,
    ExtraWarmupRoles,
    MuonTpMode,
    OptimizerName,
    WsdDecayStyle,
)
from megatron_mup.parameterization.options import DecayMask, DecayMode, OptimizerNumbers


@dataclass(frozen=True, kw_only=True)
class OptimizerSection:
    """Optimizer, weight decay and clipping. Peak values; the schedule multiplies them."""

    lr: float
    """alpha: base peak learning rate; the rule table distributes it."""

    optimizer: OptimizerName = OptimizerName.ADAM
    """``adam`` (AdamW), ``lion``, or ``muon`` (with AdamW for embeddings, readout and vectors)."""

    adam_beta1: float = 0.9
    """Adam's decay of the gradient's running mean."""

    adam_beta2: float = 0.95
    """Adam's decay of the squared gradient's running mean; Megatron's default is 0.999."""

    adam_eps: float = 1e-8
    """Added to Adam's denominator; the rule table may scale it (``eps_scaling``)."""

    lion_beta1: float = 0.95
    """Lion's share of the momentum in the update's sign."""

    lion_beta2: float = 0.98
    """Lion's decay of the momentum."""

    muon_momentum: float = 0.95
    """Muon's decay of the gradient's running mean (Nesterov)."""

    muon_num_ns_steps: int = 5
    """Newton-Schulz steps of Muon's orthogonalization."""

    muon_tp_mode: MuonTpMode = MuonTpMode.DUPLICATED
    """How Muon treats a matrix that tensor parallelism splits."""

    weight_decay: float = 0.0
    """lambda; what it is a fraction of is ``weight_decay_mode``'s choice."""

    weight_decay_mode: DecayMode = DecayMode.INDEPENDENT
    """``coupled``, ``constant_product`` or ``independent`` (free of the peak LR)."""

    weight_decay_mask: DecayMask = DecayMask.MATRICES
    """``matrices`` spares gains and biases; ``all`` decays everything (arXiv:2404.05728)."""

    clip_grad: float = 1.0
    """Global gradient-norm limit; 0 switches clipping off."""

    def __post_init__(self) -> None:
        """Check ranges; raises ConfigError."""
        for name in ("lr", "weight_decay", "adam_eps", "clip_grad"):
            value = getattr(self, name)
            require(
                0 <= value < math.inf,
                f"optimizer.{name} is {value}; it must be finite and not negative",
            )
        require_probability(
            "optimizer",
            self,
            "adam_beta1",
            "adam_beta2",
            "lion_beta1",
            "lion_beta2",
            "muon_momentum",
        )
        require_positive("optimizer", self, "muon_num_ns_steps")
        require(
            self.muon_tp_mode is not MuonTpMode.BLOCKWISE,
            "optimizer.muon_tp_mode=blockwise orthogonalizes each tensor-parallel shard alone, so "
            "the trained model depends on the layout; use duplicated or distributed",
        )

    @property
    def numbers(self) -> OptimizerNumbers:
        """What the rule table needs of the optimizer, as configured; see ``optimizer_numbers``."""
        return OptimizerNumbers(
            lr=self.lr,
            weight_decay=self.weight_decay,
            weight_decay_mode=self.weight_decay_mode,
            weight_decay_mask=self.weight_decay_mask,
            eps=None if self.optimizer is OptimizerName.LION else self.adam_eps,
            orthogonalized=self.optimizer is OptimizerName.MUON,
            betas=self._betas,
        )

    @property
    def _betas(self) -> tuple[float, float]:
        if self.optimizer is OptimizerName.LION:
            return self.lion_beta1, self.lion_beta2
        return self.adam_beta1, self.adam_beta2


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    """One schedule s(t), t counted from 0; every group's LR is s(t) times its own peak."""

    lr_warmup_iters: int = 0
    """Iterations of linear warmup."""

    lr_warmup_init_ratio: float = 0.0
    """s(0), as a fraction of each group's peak."""

    lr_warmup_init: float | None = None
    """Megatron's absolute start; refused, because one start for all groups breaks their ratios."""

    lr_decay_style: DecayStyle = DecayStyle.LINEAR
    """Shape after warmup."""

    lr_decay_iters: int | None = None
    """Iteration at which the minimum is reached; unset means train_iters."""

    min_lr_ratio: float = 0.0
    """Final s(t), as a fraction of each group's peak."""

    lr_wsd_decay_iters: int | None = None
    """Iterations of WSD's final phase."""

    lr_wsd_decay_style: WsdDecayStyle = WsdDecayStyle.LINEAR
    """Shape of WSD's final phase."""

    extra_warmup: ExtraWarmup = ExtraWarmup.NONE
    """Warmup that multiplies the linear one, from 1/m to 1; for rules without muP's division."""

    extra_warmup_iters: int | None = None
    """T of ``exponential``; ``implied_mup`` follows LR and decay and takes none."""

    extra_warmup_roles: ExtraWarmupRoles = ExtraWarmupRoles.DIVIDED
    """Whose LR the extra warmup multiplies."""

    def __post_init__(self) -> None:
        """Check ranges; raises ConfigError."""
        require(
            self.lr_warmup_init is None,
            f"schedule.lr_warmup_init={self.lr_warmup_init} starts every group at the same absolute"
            " LR and breaks the ratios between groups; use schedule.lr_warmup_init_ratio (a "
            "fraction of each group's peak)",
        )
        for name in ("lr_warmup_init_ratio", "min_lr_ratio"):
            value = getattr(self, name)
            require(0 <= value <= 1, f"schedule.{name} is {value}; it must be in [0, 1]")
        require(
            self.lr_warmup_iters >= 0,
            f"schedule.lr_warmup_iters is {self.lr_warmup_iters}; it must not be negative",
        )
        require_positive(
            "schedule", self, "lr_decay_iters", "lr_wsd_decay_iters", "extra_warmup_iters"
        )
        exponential = self.extra_warmup is ExtraWarmup.EXPONENTIAL
        require(
            exponential == (self.extra_warmup_iters is not None),
            f"schedule.extra_warmup_iters is {self.extra_warmup_iters} with extra_warmup="
            f"{self.extra_warmup}; exponential needs it and no other one takes it",
        )
        wsd = self.lr_decay_style is DecayStyle.WSD
        require(
            wsd == (self.lr_wsd_decay_iters is not None),
            f"schedule.lr_wsd_decay_iters is {self.lr_wsd_decay_iters} with lr_decay_style="
            f"{self.lr_decay_style}; WSD needs it and no other style takes it",
        )
