"""What goes into the statistics of a transfer and what comes out: plain frozen records.

Owns no computation. Loss is in nats per token; a learning rate is log2 of the base rate, so a
difference of 1 is an octave. ``size`` is the value on the scaled axis (hidden size, layers, ...).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class Curve:
    """Runs of one arm, one size and one value of every further axis.

    Attributes:
        size: value on the scaled axis.
        log2_lrs: one entry a run, in any order.
        losses: validation loss of each run, nats per token; not finite where it diverged.
        seeds: seed of each run; runs of one seed share initial weights and data order.
    """

    size: float
    log2_lrs: tuple[float, ...]
    losses: tuple[float, ...]
    seeds: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A number with its interval, or the reason why there is none.

    Attributes:
        value: None: not identifiable.
        low: lower end of the interval; None: unbounded or unknown.
        high: upper end.
        reason: why the value or a bound is missing, in words for a report.
        error: standard error, if the estimate has one; later fits weigh by it.
        df: degrees of freedom of the error.
    """

    value: float | None
    low: float | None = None
    high: float | None = None
    reason: str | None = None
    error: float | None = None
    df: float | None = None

    @property
    def width(self) -> float | None:
        """Length of the interval, in the units of the value; None where an end is missing."""
        if self.low is None or self.high is None:
            return None
        return self.high - self.low


@dataclass(frozen=True, kw_only=True)
class Minimum:
    """Minimum of one curve.

    Attributes:
        size: of the curve.
        log2_lr: the best learning rate.
        loss: expected loss there, over seeds.
        curvature: second derivative of the loss in log2 LR there, nats per octave^2.
        edge: end of the grid at which the lowest loss lies (or next to diverged runs only), so
            that the optimum may lie outside.
        window: lowest and highest log2 LR used.
        points: distinct learning rates used.
        runs: runs used.
        diverged: runs of the whole curve that diverged.
        noise: standard deviation of one run's loss beside its seed's own level, nats.
        misfit: words, if the fitted curve does not describe the points.
        lowest: (log2 LR, mean loss) of the best grid point.
        narrowed: the curve misses the points of the usual window, but not those of a narrower one,
            which are used.
        asymmetry: k of the fitted curve loss + curvature (e^(k d) - k d - 1) / k^2 at a distance
            of d octaves from the optimum; 0: a parabola, above 0: steeper on the right.
        beside: with an edge, the nearest log2 LR beyond it at which a run diverged; None: none did.
        shared_error: signed part of the optimum's error, octaves, that all curves fitted with one
            asymmetry have in common; it drops out of differences.
        notes: what a reader should know about the fit, in words.
    """

    size: float
    log2_lr: Estimate
    loss: Estimate
    curvature: Estimate
    edge: Literal["low", "high"] | None
    window: tuple[float, float]
    points: int
    runs: int
    diverged: int
    noise: float | None
    misfit: str | None
    lowest: tuple[float, float] | None
    narrowed: bool = False
    asymmetry: float | None = None
    beside: float | None = None
    shared_error: float = 0.0
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class PowerLaw:
    """value(size) = asymptote + coefficient * size ** exponent.

    Attributes:
        exponent: the power of the size.
        coefficient: in the units of the value.
        asymptote: limit of the value for large sizes; 0 with no interval if none was fitted.
        reason: why nothing was fitted, in words.
    """

    exponent: Estimate
    coefficient: Estimate
    asymptote: Estimate
    reason: str | None = None


@dataclass(frozen=True, kw_only=True)
class Transfer:
    """How well one arm's learning rate transfers over sizes.

    Attributes:
        shift_per_doubling: octaves of the optimum per doubling of the size.
        total_shift: octaves from the smallest to the largest size.
        zero_shot_penalty: loss of the largest size at the smallest size's optimum above its own
            minimum, nats.
        extrapolation_error: E, octaves: miss of the largest size's optimum by the line through the
            smaller ones.
        alpha: of L*(n) = L_inf + A n^-alpha.
        beta: of |x*(n) - x*_inf| = B n^-beta.
        gamma: of curvature(n) = C n^gamma.
        kappa: alpha - 2 beta + gamma; below 0: transfer becomes free with size.
        asymptotic_loss: L_inf.
        scatter: standard deviation of the optima about their line beyond their own errors, octaves;
            0: none is seen; None: fewer than three optima, or no errors.
        sizes: in increasing order.
        minima: of the sizes, in that order.

    E, kappa and R(inf) are our definition, after arXiv:2605.21486.
    """

    shift_per_doubling: Estimate
    total_shift: Estimate
    zero_shot_penalty: Estimate
    extrapolation_error: Estimate
    alpha: Estimate
    beta: Estimate
    gamma: Estimate
    kappa: Estimate
    asymptotic_loss: Estimate
    scatter: float | None
    sizes: tuple[float, ...]
    minima: tuple[Minimum, ...]


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What the numbers allow to say.

    Attributes:
        outcome: in words.
        because: one or two sentences with the numbers.
        next_steps: runs that would settle it, most useful first.
    """

    outcome: Literal["transfers", "does not transfer", "cannot tell"]
    because: str
    next_steps: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Arms side by side.

    Attributes:
        best: arm with the lowest fitted asymptotic loss; None: no arm has one.
        asymptotic_penalty: R(inf) per arm: its L_inf minus the best arm's, nats (our definition,
            after arXiv:2605.21486).
    """

    best: str | None
    asymptotic_penalty: Mapping[str, Estimate] = field(default_factory=dict)
