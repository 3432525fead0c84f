"""One pure schedule s(t) in [0, 1] for every parameter group.

t counts optimizer steps from 0, and the step t uses s(t): each group's LR is s(t) times its own
peak, so the ratios between groups never change. Upstream's ``OptimizerParamScheduler`` (0.19.2) has
one absolute warmup start for all groups and is not used. An extra warmup (arXiv:2510.19093) is a
second factor that depends on the group. Sources: linear decay to a ratio of the peak,
arXiv:2404.05728; WSD shapes as Megatron-LM names them.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from megatron_mup.config import (
    DecayStyle,
    ExtraWarmup,
    ExtraWarmupRoles,
    RunConfig,
    ScheduleConfig,
    WsdDecayStyle,
)
from megatron_mup.parameterization.options import DecayMode
from megatron_mup.parameterization.table import TableRow

ExtraFactor = Callable[[float, float], float]
"""Given a group's warmup ratio and its decay per step at peak: the factor of its LR."""


def schedule_factor(schedule: ScheduleConfig, step: int, *, decay_iters: int) -> float:
    """s(t) for one step.

    Args:
        schedule: warmup and decay options.
        step: t, steps already taken.
        decay_iters: step at which the minimum is reached.

    Returns:
        Fraction of each group's peak LR.
    """
    warmup = schedule.lr_warmup_iters
    if step < warmup:
        start = schedule.lr_warmup_init_ratio
        return start + (1.0 - start) * step / warmup
    if schedule.lr_decay_style is DecayStyle.CONSTANT:
        return 1.0
    floor = schedule.min_lr_ratio
    # Training may go on after the decay: the floor holds.
    if step >= decay_iters:
        return floor
    return floor + (1.0 - floor) * _remaining(schedule, step, decay_iters)


def _remaining(schedule: ScheduleConfig, step: int, decay_iters: int) -> float:
    """Decay shape: 1 at the end of warmup, 0 at ``decay_iters``."""
    warmup = schedule.lr_warmup_iters
    if schedule.lr_decay_style is DecayStyle.WSD:
        return _wsd_remaining(schedule, step, decay_iters)
    done = (step - warmup) / (decay_iters - warmup)
    if schedule.lr_decay_style is DecayStyle.COSINE:
        return 0.5 * (1.0 + math.cos(math.pi * done))
    return 1.0 - done


def _wsd_remaining(schedule: ScheduleConfig, step: int, decay_iters: int) -> float:
    # The decay ends where the run's schedule ends, so its start moves with decay_iters.
    length = schedule.lr_wsd_decay_iters or 1
    if step <= decay_iters - length:
        return 1.0
    done = (step - (decay_iters - length)) / length
    return {
        WsdDecayStyle.LINEAR: 1.0 - done,
        WsdDecayStyle.COSINE: 0.5 * (1.0 + math.cos(math.pi * done)),
        WsdDecayStyle.EXPONENTIAL: 2.0 * math.pow(0.5, done) - 1.0,
        WsdDecayStyle.MINUS_SQRT: 1.0 - math.sqrt(done),
    }[schedule.lr_wsd_decay_style]


def run_factor(run: RunConfig, step: int) -> float:
    """s(t) of a run."""
    return schedule_factor(run.schedule, step, decay_iters=run.decay_iters)


def warmup_ratio(run: RunConfig, row: TableRow) -> float:
    """m from whose inverse a tensor's extra warmup starts; 1 without one."""
    schedule = run.schedule
    if schedule.extra_warmup is ExtraWarmup.NONE:
        return 1.0
    if schedule.extra_warmup_roles is ExtraWarmupRoles.DIVIDED:
        return row.width_ratio
    return run.model.hidden_size / (run.parameterization.base_hidden_size or 1)


def extra_warmup(run: RunConfig, step: int) -> ExtraFactor | None:
    """The extra warmup's factor at one step.

    Args:
        run: the run's configuration.
        step: t, steps already taken.

    Returns:
        A function of a group's warmup ratio m and its decay per step at peak d; None without an
        extra warmup. ``implied_mup`` is 1 / sqrt(1 + (m^2 - 1) a^(2t)), a = 1 - d
        (arXiv:2510.19093, Eq. 11 with rho_0 = rho_inf); a group that does not decay takes the base
        LR's d (ours). ``exponential`` is m^(t/T - 1) for t < T (ours).
    """
    schedule = run.schedule
    if schedule.extra_warmup is ExtraWarmup.NONE:
        return None
    if schedule.extra_warmup is ExtraWarmup.EXPONENTIAL:
        length = schedule.extra_warmup_iters or 1
        return lambda ratio, _decay: ratio ** min(step / length - 1.0, 0.0)
    base = _base_decay(run)

    def implied(ratio: float, decay_per_step: float) -> float:
        kept = 1.0 - (decay_per_step or base)
        return float((1.0 + (ratio**2 - 1.0) * kept ** (2 * step)) ** -0.5)

    return implied


def _base_decay(run: RunConfig) -> float:
    """Decay per step at peak of a tensor whose LR is alpha."""
    numbers = run.optimizer_numbers
    independent = numbers.weight_decay_mode is DecayMode.INDEPENDENT
    return numbers.weight_decay if independent else numbers.weight_decay * numbers.lr
