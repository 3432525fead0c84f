"""What is kept of a run's training losses: their mean at the end, and how often they jumped."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import median

SPIKE_WINDOW = 20
"""Steps before a step that it is compared with (ours)."""

SPIKE_DEVIATIONS = 5.0
"""Robust standard deviations above the median that make a spike (ours)."""

_ROBUST = 1.4826
"""Median absolute deviation -> standard deviation of a normal distribution."""


def final_train_loss(losses: Sequence[float]) -> float:
    """Mean of the last tenth of the steps, at least one.

    Args:
        losses: nats per token, one a step; NaN where a step was left out.

    Returns:
        The mean of those that are finite; NaN without any.
    """
    last = losses[-max(1, math.ceil(len(losses) / 10)) :]
    finite = [loss for loss in last if math.isfinite(loss)]
    return sum(finite) / len(finite) if finite else math.nan


def count_spikes(losses: Sequence[float]) -> int:
    """Steps whose loss exceeds the median of the 20 before by more than 5 robust deviations.

    A loss that is not finite, which has no place among the others, is left out (our definition).

    Args:
        losses: nats per token, one a step.
    """
    finite = [loss for loss in losses if math.isfinite(loss)]
    count = 0
    for step in range(SPIKE_WINDOW, len(finite)):
        before = finite[step - SPIKE_WINDOW : step]
        middle = median(before)
        deviation = _ROBUST * median(abs(loss - middle) for loss in before)
        count += finite[step] > middle + SPIKE_DEVIATIONS * deviation
    return count
