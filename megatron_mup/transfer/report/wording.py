"""Numbers and estimates as words: one way to write each quantity, wherever it stands.

Units: learning rates as log2, losses in nats per token, curvature in nats per octave^2.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

from megatron_mup.transfer.fits import Estimate

Show = Callable[[float], str]

UNITS = {"width": "hidden size", "depth": "layers", "batch": "sequences", "tokens": "tokens"}
"""What a value of each axis counts."""

UNKNOWN = "not identifiable"
"""Said instead of a number that the runs cannot tell."""

OUR_DEFINITION = "our definition, after arXiv:2605.21486"
"""Said beside E, kappa and R(inf), whose exact definitions that paper's readers may miss."""


def octaves(value: float) -> str:
    """A log2 learning rate, or a difference of two."""
    return f"{_unsigned_zero(value, 2):.2f}"


def nats(value: float) -> str:
    """A loss or a difference of two."""
    return f"{_unsigned_zero(value, 4):.4f}"


def plain(value: float) -> str:
    """Any other number, three significant digits."""
    # The mark keeps zeros at the end, and a point after 100. Adding 0 takes the sign of -0.
    return f"{value + 0.0:#.3g}".rstrip(".")


def _unsigned_zero(value: float, digits: int) -> float:
    """A rounded -0.00 says no more than 0.00."""
    return 0.0 if round(value, digits) == 0 else value


def size_text(size: float) -> str:
    """A size of the scaled axis: 256, 1,024, 2.5, 1.5e9."""
    if abs(size) >= 1e7:
        return f"{size:.4g}".replace("e+0", "e").replace("e+", "e")
    return f"{size:,.0f}" if size == round(size) else f"{size:g}"


def learning_rate(log2_lr: float) -> str:
    """The learning rate itself."""
    return plain(2.0**log2_lr)


def estimate_text(estimate: Estimate, show: Show) -> str:
    """Value and interval, or what is known instead.

    Args:
        estimate: to write.
        show: writes one number of its unit.
    """
    if estimate.value is None:
        return f"{UNKNOWN}: {reason_of(estimate)}{_bound_text(estimate, show)}"
    text = f"{show(estimate.value)} {_interval(estimate, show)}"
    return f"{text} ({reason_of(estimate)})" if estimate.reason is not None else text


def cell_text(estimate: Estimate, show: Show) -> str:
    """Like ``estimate_text`` without the reason, for a table that gives it in its notes."""
    if estimate.value is None:
        return _bound(estimate, show) or UNKNOWN
    return f"{show(estimate.value)} {_interval(estimate, show)}"


def reason_of(estimate: Estimate) -> str:
    """Why a value or a bound is missing."""
    reason = estimate.reason or "the fit gives no reason"
    return reason.removeprefix(f"{UNKNOWN}: ")


def _interval(estimate: Estimate, show: Show) -> str:
    if estimate.low is None and estimate.high is None:
        return "[no interval]"
    low = "unbounded" if estimate.low is None else show(estimate.low)
    high = "unbounded" if estimate.high is None else show(estimate.high)
    return f"[{low}, {high}]"


def _bound_text(estimate: Estimate, show: Show) -> str:
    bound = _bound(estimate, show)
    return f" ({bound})" if bound else ""


def _bound(estimate: Estimate, show: Show) -> str:
    if estimate.low is not None and estimate.high is not None:
        return f"between {show(estimate.low)} and {show(estimate.high)}"
    if estimate.low is not None:
        return f"at least {show(estimate.low)}"
    return f"at most {show(estimate.high)}" if estimate.high is not None else ""


def sentence(text: str) -> str:
    """A text that starts with a capital and ends with one full stop."""
    return f"{text[:1].upper()}{text[1:].rstrip('.')}."


def listed(items: Iterable[str]) -> str:
    """'a', 'a and b', 'a, b and c'."""
    found = list(items)
    return " and ".join([", ".join(found[:-1]), found[-1]] if len(found) > 1 else found)


def counted(count: int, noun: str) -> str:
    """'1 run', '2 runs', '1,024 runs'."""
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def duration(seconds: float) -> str:
    """Run time in the unit a reader thinks in."""
    if not math.isfinite(seconds):
        return "not recorded"
    if seconds < 60:
        return f"{seconds:.1f} seconds"
    if seconds < 3600:
        return f"{seconds / 60:.1f} minutes"
    return f"{seconds / 3600:,.1f} hours"


def shortened(values: Sequence[str], *, most: int = 6) -> str:
    """Distinct values in their first order; beyond ``most`` only how many there are."""
    found = list(dict.fromkeys(values))
    if len(found) <= most:
        return ", ".join(found)
    return f"{', '.join(found[:most])} and {len(found) - most} more"
