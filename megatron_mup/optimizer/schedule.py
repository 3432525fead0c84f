"""One pure schedule s(t) in [0, 1] for every parameter group.

t counts optimizer steps from 0, and the step t uses s(t): each group's LR is s(t) times its own
peak, so the ratios between groups never change. Upstream's ``OptimizerParamScheduler`` (0.19.2) has
one absolute warmup start for all groups and is not used. Sources: linear decay to a ratio of the
peak, arXiv:2404.05728; WSD shapes as Megatron-LM names them.
"""

from __future__ import annotations

import math

from megatron_mup.config import DecayStyle, RunConfig, ScheduleConfig, WsdDecayStyle


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
