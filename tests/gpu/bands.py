"""How far one loss curve is from another."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Band:
    """Relative distances: of the mean of the last 50 steps (signed), and the largest of any 10."""

    last_50: float
    any_10: float


def band(losses: Sequence[float], reference: Sequence[float]) -> Band:
    """Distance of one loss curve from another of the same length, at least 50."""
    found, expected = np.array(losses), np.array(reference)
    ten = np.ones(10) / 10
    means, expected_means = (np.convolve(curve, ten, mode="valid") for curve in (found, expected))
    return Band(
        last_50=float(found[-50:].mean() / expected[-50:].mean() - 1),
        any_10=float(np.abs(means / expected_means - 1).max()),
    )
