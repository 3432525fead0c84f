"""Which runs would tell one minimum better: the rule, for one curve and one round (ours).

    the lowest loss lies at an end of the rates   two more rates beyond it, with the first seed
    it lies beside runs that did not end well     the rate half way to them, once
    its interval is too wide, or narrow           the rates half way to its neighbours, and once
    by fewer than three seeds                     those are there, further seeds around it
Three seeds, because a rule that stops at the first narrow interval stops where few degrees of
freedom happen to make the noise look small, and that interval holds too seldom
(docs/transfer_statistics.md, Measured coverage).
Pure: numbers in, a choice and its reason out. Must not import numpy, scipy or torch.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Literal

from megatron_mup.transfer.sweep.spec import Refine

if TYPE_CHECKING:
    from megatron_mup.transfer.fits import Estimate, Minimum

STEPS_BEYOND = 2
"""Rates that are added beyond an end: one more than would show a minimum at the first."""

SEEDS_A_ROUND = 2
"""Seeds that are added at a time at most: the next fit may ask for fewer."""

FEWEST_SEEDS = 3
"""Seeds around the lowest loss below which an interval is not taken for narrow (ours)."""

MOST_SEEDS = 12
"""Seeds at one rate beyond which more of them are not worth their cost (assumption)."""

_ENOUGH_DF = 4.0
"""Degrees of freedom of the noise from which a forecast of the width is taken seriously (ours)."""

_ROUNDING = 1e-9

Action = Literal["extend", "halve", "seeds", "stop"]
Run = tuple[float, int]
"""log2 learning rate and seed."""


@dataclass(frozen=True, kw_only=True)
class Tried:
    """What one curve has been given so far.

    Attributes:
        minimum: as fitted to it.
        coarse: log2 learning rates of the grid, and those added beyond its ends, increasing.
        runs: all that ended, in whatever way.
        seeds: of the sweep, the first one first.
        stopped: log2 learning rates at which every run was stopped early.
    """

    minimum: Minimum
    coarse: tuple[float, ...]
    runs: frozenset[Run]
    seeds: tuple[int, ...]
    stopped: frozenset[float] = frozenset()

    @property
    def rates(self) -> list[float]:
        """log2 learning rates that were run, increasing."""
        return sorted({rate for rate, _ in self.runs})

    def seeds_at(self, rate: float) -> list[int]:
        """Seeds that were run at a rate."""
        return sorted(seed for other, seed in self.runs if other == rate)


@dataclass(frozen=True, kw_only=True)
class Choice:
    """What to do next for one curve.

    Attributes:
        action: in a word; "stop" adds nothing.
        runs: to add.
        reason: in words.
    """

    action: Action
    runs: tuple[Run, ...] = ()
    reason: str


def choose(tried: Tried, refine: Refine) -> Choice:
    """Decide what one curve is given next.

    Args:
        tried: the curve.
        refine: what the sweep asks for.
    """
    minimum = tried.minimum
    if minimum.lowest is None:
        return _without_lowest(tried, refine)
    if minimum.edge is not None:
        return _at_edge(tried, refine)
    words, width = _optimum_words(minimum.log2_lr), minimum.log2_lr.width
    best = minimum.lowest[0]
    # An interval of a curve that misses its points says nothing, however narrow it is.
    trusted = minimum.misfit is None or minimum.narrowed
    enough = _fewest_seeds(tried, _near(tried, best)) >= FEWEST_SEEDS
    if width is not None and width <= refine.interval_octaves and trusted and enough:
        return Choice(action="stop", reason=f"narrow enough: {words}")
    halves = [
        rate for rate in _half_steps(tried) if best in (_below(tried, rate), _above(tried, rate))
    ]
    if halves:
        runs = tuple((rate, seed) for rate in halves for seed in tried.seeds_at(best))
        return Choice(action="halve", runs=runs, reason=f"half steps beside 2^{best:g}: {words}")
    if not trusted:
        return Choice(
            action="stop",
            reason=f"more runs will not help: {minimum.misfit}; {words}",
        )
    return _more_seeds(tried, refine, best=best)


def _optimum_words(estimate: Estimate) -> str:
    """The optimum and its interval for a reader."""
    width = estimate.width
    if estimate.value is not None and width is not None:
        return f"optimum 2^{estimate.value:.2f}, interval {width:.2f} octaves wide"
    return f"no interval of the optimum ({estimate.reason or 'unbounded'})"


def _without_lowest(tried: Tried, refine: Refine) -> Choice:
    """A run diverged at every learning rate, those left out at which all were stopped early."""
    diverged = [rate for rate in tried.rates if rate not in tried.stopped]
    if not diverged:
        return Choice(
            action="stop", reason="more runs will not help: every run here was stopped early"
        )
    # The optimum lies below all of them.
    at = diverged[0]
    what = f"runs diverged at all learning rates from 2^{at:g} on"
    return _on_side(tried, refine, at=at, high=False, what=what)


def _at_edge(tried: Tried, refine: Refine) -> Choice:
    """The lowest loss has nothing that ended well on one side of it, or on both."""
    minimum = tried.minimum
    assert minimum.lowest is not None
    at = minimum.lowest[0]
    sides = [minimum.edge == "high"]
    # A single rate at which runs ended well is called the high edge, and is the low one too.
    if minimum.edge == "high" and at == minimum.window[0]:
        sides.append(False)
    what = f"the lowest loss is at 2^{at:g}"
    choices = [_on_side(tried, refine, at=at, high=high, what=what) for high in sides]
    # Rates that nobody tried tell more than half a step towards those that did not end well.
    preferred: tuple[Action, ...] = ("extend", "halve", "stop")
    return min(choices, key=lambda choice: preferred.index(choice.action))


def _on_side(tried: Tried, refine: Refine, *, at: float, high: bool, what: str) -> Choice:
    """What is added above or below a rate that has nothing that ended well there."""
    beyond = [rate for rate in tried.rates if (rate > at if high else rate < at)]
    if beyond:
        other = min(beyond) if high else max(beyond)
        halves = [rate for rate in _half_steps(tried) if min(at, other) < rate < max(at, other)]
        beside = f"{what}, beside runs that did not end well at 2^{other:g}"
        if not halves:
            return Choice(action="stop", reason=f"more runs will not help: {beside}")
        runs = tuple((halves[0], seed) for seed in tried.seeds_at(at))
        return Choice(action="halve", runs=runs, reason=beside)
    end = f"{what}, the {'highest' if high else 'lowest'} learning rate"
    step = _end_step(tried.coarse, high=high) * (1 if high else -1)
    low, most = refine.widest
    added = [_clean(at + step * count) for count in range(1, STEPS_BEYOND + 1)]
    added = [rate for rate in added if low - _ROUNDING <= rate <= most + _ROUNDING]
    if not added:
        return Choice(action="stop", reason=f"refine.widest ends here: {end}")
    runs = tuple((rate, tried.seeds[0]) for rate in added)
    return Choice(action="extend", runs=runs, reason=end)


def _clean(rate: float) -> float:
    """Without the digits that steps such as 0.1 leave behind."""
    return round(rate, 9)


def _end_step(coarse: tuple[float, ...], *, high: bool) -> float:
    """Octaves between the last two rates at one end; an octave where there is one rate."""
    if len(coarse) < 2:
        return 1.0
    return coarse[-1] - coarse[-2] if high else coarse[1] - coarse[0]


def _half_steps(tried: Tried) -> list[float]:
    """Rates half way between neighbours of the coarse grid that have nothing between them yet."""
    coarse = set(tried.coarse)
    return [
        _clean((left + right) / 2)
        for left, right in pairwise(tried.rates)
        if left in coarse and right in coarse
    ]


def _below(tried: Tried, rate: float) -> float:
    return max((other for other in tried.rates if other < rate), default=-math.inf)


def _above(tried: Tried, rate: float) -> float:
    return min((other for other in tried.rates if other > rate), default=math.inf)


def _near(tried: Tried, best: float) -> list[float]:
    """Rates from one coarse step below the lowest loss to one above it, increasing."""
    left = max((rate for rate in tried.coarse if rate < best), default=best)
    right = min((rate for rate in tried.coarse if rate > best), default=best)
    return [rate for rate in tried.rates if left <= rate <= right]


def _fewest_seeds(tried: Tried, rates: Iterable[float]) -> int:
    return min(len(tried.seeds_at(rate)) for rate in rates)


def _more_seeds(tried: Tried, refine: Refine, *, best: float) -> Choice:
    """Further seeds near the lowest loss."""
    estimate = tried.minimum.log2_lr
    words, width = _optimum_words(estimate), estimate.width
    near = _near(tried, best)
    have = _fewest_seeds(tried, near)
    missing = SEEDS_A_ROUND
    if width is not None:
        # An interval narrows with the square root of the runs.
        needed = max(math.ceil(have * (width / refine.interval_octaves) ** 2), FEWEST_SEEDS)
        if needed > MOST_SEEDS and (estimate.df or 0.0) >= _ENOUGH_DF:
            return Choice(
                action="stop",
                reason=f"more runs will not help: about {needed} seeds would be needed; {words}",
            )
        missing = min(max(needed - have, 1), SEEDS_A_ROUND)
    if have >= MOST_SEEDS:
        return Choice(
            action="stop", reason=f"more runs will not help: {have} seeds were run; {words}"
        )
    seeds = _first_seeds(tried.seeds, have + missing)
    # Seed by seed: a limit may leave only the first of them, and whole seeds tell more.
    runs = tuple((rate, seed) for seed in seeds for rate in near if (rate, seed) not in tried.runs)
    return Choice(
        action="seeds", runs=runs, reason=f"{len(seeds)} seeds around 2^{best:g}: {words}"
    )


def _first_seeds(seeds: Iterable[int], count: int) -> list[int]:
    """The sweep's seeds, and the numbers above them when they are used up."""
    found = list(seeds)
    above = max(found)
    while len(found) < count:
        above += 1
        found.append(above)
    return found[:count]
