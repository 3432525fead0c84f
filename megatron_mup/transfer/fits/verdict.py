"""What the numbers allow to say, and which runs would settle the rest.

Owns the thresholds, which are ours.
"""

from __future__ import annotations

from collections.abc import Sequence

from megatron_mup.transfer.fits.edge import power
from megatron_mup.transfer.fits.power_laws import FEWEST_SIZES
from megatron_mup.transfer.fits.types import Estimate, Minimum, Transfer, Verdict

# Octaves of learning rate per doubling. Over the 6 doublings of a 64-fold width this is 1.5
# octaves, the half-width of a usual optimum; standard parameterization moves by 0.5 to 1.
SHIFT = 0.25
# Penalty relative to the loss. Half a percent is what seeds scatter by, and at a scaling exponent
# near 0.05 about a tenth of the compute.
PENALTY = 0.005
# A line through two sizes cannot be contradicted by them.
FEWEST_FOR_TREND = 3
# Octaves: an optimum known no better than this is the first to be measured again.
_VAGUE = 0.25


def judge(transfer: Transfer, *, axis: str = "width") -> Verdict:
    """Judge one arm.

    Args:
        transfer: of ``measure_transfer``.
        axis: what is scaled, for the sentences.
    """
    shift, penalty = transfer.shift_per_doubling, transfer.zero_shot_penalty
    loss = _loss(transfer)
    because = f"{_shift_words(shift, axis)}; {_penalty_words(penalty, loss, axis)}."
    if _apart(shift) or (loss is not None and (penalty.low or 0.0) > PENALTY * loss):
        steps = tuple(_steps_without_transfer(transfer, axis))
        return Verdict(outcome="does not transfer", because=because, next_steps=steps)
    small = _within(shift)
    harmless = loss is not None and penalty.high is not None and penalty.high < PENALTY * loss
    few = len(transfer.sizes) < FEWEST_FOR_TREND
    if few:
        because = f"{because[:-1]}; {len(transfer.sizes)} sizes cannot show a trend."
    if small and harmless and not few:
        return Verdict(outcome="transfers", because=because, next_steps=())
    steps = tuple(_next_steps(transfer, axis))
    return Verdict(outcome="cannot tell", because=because, next_steps=steps)


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


def _within(shift: Estimate) -> bool:
    if shift.low is None or shift.high is None:
        return False
    return shift.low > -SHIFT and shift.high < SHIFT


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
        return f"{start} {' and '.join(ends)} {unit} ({shift.reason})"
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


def _steps_without_transfer(transfer: Transfer, axis: str) -> list[str]:
    """What a learning rate can still be taken from."""
    steps = [step for one in transfer.minima for step in _edge_steps(one, axis)]
    further = 2 * transfer.sizes[-1]
    return [
        *steps,
        f"tune the learning rate at each {axis}, or follow the fitted trend of the optimum and "
        f"check it at a further {axis}, such as {further:g}",
    ]


def _next_steps(transfer: Transfer, axis: str) -> list[str]:
    """Runs that would settle it, most useful first."""
    steps = [step for one in transfer.minima for step in _edge_steps(one, axis)]
    inner = [one for one in transfer.minima if one.edge is None and one.lowest is not None]
    steps += _repeat_steps(inner, axis)
    for one in inner:
        if one.misfit is not None:
            steps.append(
                f"learning rates half an octave apart around {_centre(one)} at {axis} {one.size:g}"
            )
    if len(transfer.sizes) < FEWEST_SIZES:
        ordinal = {1: "second", 2: "third", 3: "fourth"}[len(transfer.sizes)]
        steps.append(f"a {ordinal} {axis}, such as {2 * transfer.sizes[-1]:g}")
    if not steps:
        steps.append(f"a further {axis}, such as {2 * transfer.sizes[-1]:g}")
    return steps


def _edge_steps(one: Minimum, axis: str) -> list[str]:
    if one.lowest is None:
        return [f"lower learning rates at {axis} {one.size:g}: no run ended well"]
    if one.edge is None:
        return []
    at, low, high = one.lowest[0], one.log2_lr.low, one.log2_lr.high
    if low is not None and high is not None:
        between = f"between {power(low)} and {power(high)}"
        return [f"add learning rates {between} at {axis} {one.size:g}"]
    side = "above" if one.edge == "high" else "below"
    return [f"add learning rates {side} {power(at)} at {axis} {one.size:g}"]


def _repeat_steps(inner: Sequence[Minimum], axis: str) -> list[str]:
    """More seeds: everywhere if there are no repeats, otherwise where the optimum is vaguest."""
    bare = [one for one in inner if one.log2_lr.error is None or one.loss.error is None]
    if bare:
        shown = ", ".join(f"{one.size:g}" for one in bare)
        return [f"more seeds (3 a learning rate) around the lowest loss at {axis} {shown}"]
    vague = [one for one in inner if (one.log2_lr.error or 0.0) > _VAGUE]
    vague = vague or sorted(inner, key=lambda one: -(one.log2_lr.error or 0.0))[:1]
    return [
        f"more seeds around {_centre(one)} at {axis} {one.size:g} "
        f"(its optimum is known to +-{one.log2_lr.error or 0.0:.2f} octaves, one standard error)"
        for one in vague
    ]


def _centre(one: Minimum) -> str:
    assert one.lowest is not None
    return power(one.lowest[0])
