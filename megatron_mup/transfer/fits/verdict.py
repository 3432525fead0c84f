"""What the numbers allow to say of one arm.

Owns the thresholds, which are ours; which runs would settle the rest is in ``next_steps``.
"""

from __future__ import annotations

from megatron_mup.transfer.fits.next_steps import (
    FEWEST_FOR_TREND,
    half_steps,
    steps_to_decide,
    steps_without_transfer,
)
from megatron_mup.transfer.fits.types import Estimate, Transfer, Verdict

# Octaves of learning rate per doubling. Over the 6 doublings of a 64-fold width this is 1.5
# octaves, the half-width of a usual optimum; standard parameterization moves by 0.5 to 1.
SHIFT = 0.25
# Penalty relative to the loss. Half a percent is what seeds scatter by, and at a scaling exponent
# near 0.05 about a tenth of the compute.
PENALTY = 0.005


def judge(transfer: Transfer, *, axis: str = "width") -> Verdict:
    """Judge one arm.

    Args:
        transfer: of ``measure_transfer``.
        axis: what is scaled, for the sentences.
    """
    if len(transfer.sizes) == 1:
        return _one_size(transfer, axis)
    shift, penalty = transfer.shift_per_doubling, transfer.zero_shot_penalty
    loss = _loss(transfer)
    because = f"{_shift_words(shift, axis)}; {_penalty_words(penalty, loss, axis)}"
    if _apart(shift) or (loss is not None and (penalty.low or 0.0) > PENALTY * loss):
        return Verdict(
            outcome="does not transfer",
            because=f"{because}.",
            next_steps=steps_without_transfer(transfer, axis),
        )
    missing = [
        *_trend_missing(transfer, axis),
        *_misfits(transfer, axis),
        *_shift_missing(shift),
        *_penalty_missing(penalty, loss),
    ]
    if not missing:
        # Nothing keeps it open, but what it rests on may be tested.
        steps = tuple(half_steps(transfer.minima, axis))
        return Verdict(outcome="transfers", because=f"{because}.", next_steps=steps)
    return Verdict(
        outcome="cannot tell",
        because=f"{because}. What keeps it open: {'; '.join(missing)}.",
        next_steps=steps_to_decide(transfer, axis),
    )


def _one_size(transfer: Transfer, axis: str) -> Verdict:
    return Verdict(
        outcome="cannot tell",
        because=f"{axis} {transfer.sizes[0]:g} alone says nothing of a transfer.",
        next_steps=steps_to_decide(transfer, axis),
    )


def _loss(transfer: Transfer) -> float | None:
    """Loss of the largest size, against which its penalty is judged."""
    last = transfer.minima[-1]
    if last.loss.value is not None:
        return last.loss.value
    return None if last.lowest is None else last.lowest[1]


def _apart(shift: Estimate) -> bool:
    """The whole interval lies outside the threshold."""
    above = shift.low is not None and shift.low > SHIFT
    return above or (shift.high is not None and shift.high < -SHIFT)


def _trend_missing(transfer: Transfer, axis: str) -> list[str]:
    """Optima that were not found show no trend, and may contradict that of the others."""
    known = [one.size for one in transfer.minima if one.log2_lr.value is not None]
    unknown = [one.size for one in transfer.minima if one.log2_lr.value is None]
    if len(known) < FEWEST_FOR_TREND:
        of = f" of {len(transfer.sizes)}" if unknown else ""
        return [f"{len(known)}{of} sizes have a known optimum, and {FEWEST_FOR_TREND} show a trend"]
    if not unknown:
        return []
    return [f"the optimum is not known at {axis} {', '.join(f'{size:g}' for size in unknown)}"]


def _misfits(transfer: Transfer, axis: str) -> list[str]:
    """Intervals of a curve that misses its points may be too short."""
    missed = [one.size for one in transfer.minima if one.misfit is not None and not one.narrowed]
    if not missed:
        return []
    shown = ", ".join(f"{size:g}" for size in missed)
    return [f"the fitted curve misses its points at {axis} {shown}"]


def _shift_missing(shift: Estimate) -> list[str]:
    """What keeps the shift from being small: it is where its whole interval is."""
    if shift.low is None or shift.high is None:
        return ["the shift has no interval"]
    if shift.low > -SHIFT and shift.high < SHIFT:
        return []
    worst = max(shift.low, shift.high, key=abs)
    return [f"the shift may be {worst:+.2f}, and transfer means less than {SHIFT:g} either way"]


def _penalty_missing(penalty: Estimate, loss: float | None) -> list[str]:
    """What keeps the penalty from being harmless."""
    if penalty.high is None or loss is None:
        return ["the cost has no upper bound"]
    if penalty.high < PENALTY * loss:
        return []
    share = 100.0 * penalty.high / loss
    return [f"the cost may be {share:.2f}% of the loss, and transfer means less than {PENALTY:.1%}"]


def _shift_words(shift: Estimate, axis: str) -> str:
    unit = f"octaves of learning rate per doubling of the {axis}"
    start = "the optimum moves by"
    if shift.value is not None and shift.low is not None and shift.high is not None:
        return f"{start} {shift.value:+.2f} [{shift.low:+.2f}, {shift.high:+.2f}] {unit}"
    if shift.value is not None:
        return f"{start} {shift.value:+.2f} {unit} ({shift.reason})"
    if shift.high is not None or shift.low is not None:
        ends = [f"at least {shift.low:+.2f}"] if shift.low is not None else []
        ends += [f"at most {shift.high:+.2f}"] if shift.high is not None else []
        return f"the optimum's shift is {' and '.join(ends)} {unit} ({shift.reason})"
    return f"the optimum's shift is unknown ({shift.reason})"


def _penalty_words(penalty: Estimate, loss: float | None, axis: str) -> str:
    what = f"the smallest {axis}'s best learning rate costs the largest"
    if penalty.value is not None and penalty.high is not None and penalty.low is not None:
        share = f", {100.0 * penalty.value / loss:.2f}% of its loss" if loss else ""
        return f"{what} {penalty.value:.4f} [{penalty.low:.4f}, {penalty.high:.4f}] nats{share}"
    if penalty.value is not None:
        return f"{what} {penalty.value:.4f} nats ({penalty.reason})"
    if penalty.low is not None:
        return f"{what} at least {penalty.low:.4f} nats ({penalty.reason})"
    return f"what {what} is unknown ({penalty.reason})"
