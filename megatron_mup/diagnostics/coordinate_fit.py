"""Does a coordinate check pass? Slopes in width, the exponents expected of them, verdicts.

Pure numbers: reads what ``coordinates`` measured. The expected exponents are derived in
docs/coordinate_check.md (ours, from the table of arXiv:2404.05728; fixed head dim unless said).
The configuration's initial sizes are taken as chosen and set the exponents of step 0; its learning
rates are what is judged: no change may grow with the width.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

import numpy as np
from scipy import stats

from megatron_mup.config import RunConfig
from megatron_mup.diagnostics.coordinates import Coordinate
from megatron_mup.diagnostics.recorder import (
    ATTENTION_OUT,
    EMBEDDING,
    FFN_OUT,
    LOGITS,
    SCORES,
)
from megatron_mup.diagnostics.widths import Grow
from megatron_mup.parameterization.evaluation import Rules
from megatron_mup.parameterization.options import AttentionScale, UnembeddingInit, WeightInit

TOLERANCE = 0.25
"""How far a slope may leave its expected range. Measured (docs/coordinate_check.md): muP's leave it
by 0.11 at most, those of a hidden LR wrong by m^1/2 by 0.30 and more, SP's by 0.44 to 0.98."""

CONFIDENCE = 0.95


@dataclass(frozen=True, kw_only=True)
class Expected:
    """Range of exponents that a quantity may have.

    Attributes:
        low: smallest exponent.
        high: largest exponent.
        zero: it must be identically zero, and has no exponent.
        may_be_zero: identically zero passes as well.
    """

    low: float = 0.0
    high: float = 0.0
    zero: bool = False
    may_be_zero: bool = False

    @property
    def text(self) -> str:
        """For tables: ``0``, ``-0.5 to 0`` or ``zero``."""
        if self.zero:
            return "zero"
        if math.isinf(self.low):
            return f"zero or <= {self.high:g}"
        return f"{self.low:g}" if self.low == self.high else f"{self.low:g} to {self.high:g}"


class Verdict(StrEnum):
    """Outcome of one fit; all but the first two fail."""

    PASSES = "ok"
    ZERO = "zero, as expected"
    GROWS = "grows"
    SHRINKS = "shrinks"
    NOT_ZERO = "not zero"
    DEAD = "does not move"
    DIVERGED = "nan or inf"

    @property
    def passed(self) -> bool:
        """Whether it is as expected."""
        return self in (Verdict.PASSES, Verdict.ZERO)


@dataclass(frozen=True, kw_only=True)
class Fit:
    """One quantity of one module against width.

    Attributes:
        module: name of the recorder.
        step: 0 for the initial size, otherwise the change since then.
        slope: exponent of the width, mean over seeds; nan if it has none.
        half_width: half of its interval (t quantile over the seeds' slopes); nan with one seed.
        degrees_of_freedom: of that interval, seeds - 1.
        expected: what was derived beforehand.
        verdict: the comparison.
    """

    module: str
    step: int
    slope: float
    half_width: float
    degrees_of_freedom: int
    expected: Expected
    verdict: Verdict


def expected_exponent(run: RunConfig, module: str, step: int, *, grow: Grow) -> Expected:
    """The exponent in width that a quantity should have.

    Args:
        run: the configuration at the largest width.
        module: name of the recorder.
        step: 0 for the initial size, otherwise the change after so many steps.
        grow: whether heads or head dim follow the width.

    Returns:
        Source: docs/coordinate_check.md.
    """
    shape = run.model.shape
    rules = Rules(shape, run.parameterization, run.optimizer_numbers)
    tied = shape.tied_embeddings
    kind = module.rsplit(" ", maxsplit=1)[-1]
    if step == 0:
        return _expected_size(rules, kind, tied=tied, grow=grow)
    if step == 1 and not tied and rules.u_init is UnembeddingInit.ZERO and kind != LOGITS:
        # No gradient passes a zero readout: at most weight decay moves anything.
        return Expected(low=-math.inf, high=0.0, may_be_zero=True)
    if kind == EMBEDDING:
        # A row is looked up, not summed over: nothing in its change can average out.
        return Expected()
    # Sums over the width: -1/2 where their terms are independent, 0 where they agree.
    unstable = kind == LOGITS and rules.u_init is UnembeddingInit.SP
    unstable |= grow is Grow.HEADS and shape.num_query_groups == 1 < shape.num_attention_heads
    return Expected(low=-0.5, high=0.5 if unstable else 0.0)


def _expected_size(rules: Rules, kind: str, *, tied: bool, grow: Grow) -> Expected:
    """Exponent of an initial size."""
    config = rules.config
    if kind == SCORES:
        flat = grow is Grow.HEADS or rules.attention_scale is AttentionScale.INVERSE_SQRT
        exponent = 0.0 if flat else -0.5
        return Expected(low=exponent, high=exponent, zero=config.q_init is WeightInit.ZERO)
    if kind in (ATTENTION_OUT, FFN_OUT):
        return Expected(zero=config.r_init is WeightInit.ZERO)
    if kind != LOGITS:
        return Expected()
    if tied:
        # The token's own logit is coherent, those of the others are not.
        return Expected(low=-0.5, high=0.0)
    return {
        UnembeddingInit.MUP: Expected(low=-0.5, high=-0.5),
        UnembeddingInit.SP: Expected(),
        UnembeddingInit.ZERO: Expected(zero=True),
    }[rules.u_init]


def fit_coordinates(
    coordinates: Sequence[Coordinate], run: RunConfig, *, grow: Grow = Grow.HEADS
) -> list[Fit]:
    """Fit and judge every module and step.

    Args:
        coordinates: from ``coordinates.measure``; every seed at every width.
        run: the configuration at the largest width.
        grow: what followed the width.

    Returns:
        One fit per module and step, in the order of the forward pass.
    """
    values: dict[tuple[str, int], dict[int, dict[int, float]]] = {}
    for row in coordinates:
        size = row.rms if row.step == 0 else row.change
        seeds = values.setdefault((row.module, row.step), {})
        seeds.setdefault(row.seed, {})[row.width] = size
    modules = list(dict.fromkeys(module for module, _ in values))
    return [
        _fit(module, step, seeds, expected_exponent(run, module, step, grow=grow))
        for (module, step), seeds in sorted(
            values.items(), key=lambda item: (modules.index(item[0][0]), item[0][1])
        )
    ]


def _fit(module: str, step: int, seeds: dict[int, dict[int, float]], expected: Expected) -> Fit:
    sizes = np.array(
        [[by_width[width] for width in sorted(by_width)] for by_width in seeds.values()]
    )
    widths = sorted(next(iter(seeds.values())))
    slope, half_width = math.nan, math.nan
    if np.isfinite(sizes).all() and (sizes > 0).all():
        slope, half_width = slope_in_width(widths, sizes)
    return Fit(
        module=module,
        step=step,
        slope=slope,
        half_width=half_width,
        degrees_of_freedom=len(seeds) - 1,
        expected=expected,
        verdict=judge(sizes, slope, expected),
    )


def slope_in_width(widths: Sequence[int], sizes: np.ndarray) -> tuple[float, float]:
    """Least-squares slope of log size against log width, one fit per seed.

    The interval is that of the seeds' mean slope (t quantile, seeds - 1 degrees of freedom): it
    holds the noise of initial weights, not the curvature of small widths.

    Args:
        widths: hidden sizes, at least 2.
        sizes: [seeds, widths], positive.

    Returns:
        Mean slope and half of its 95% interval (nan with one seed).
    """
    slopes = np.polyfit(np.log2(widths), np.log2(sizes).T, 1)[0]
    if len(slopes) < 2:
        return float(slopes[0]), math.nan
    quantile = stats.t.ppf((1 + CONFIDENCE) / 2, len(slopes) - 1)
    half_width = quantile * slopes.std(ddof=1) / math.sqrt(len(slopes))
    return float(slopes.mean()), float(half_width)


def judge(sizes: np.ndarray, slope: float, expected: Expected) -> Verdict:
    """Compare one quantity with what is expected of it.

    The slope itself is judged, not its interval, which three seeds leave too wide to decide.

    Args:
        sizes: [seeds, widths].
        slope: exponent, nan if a size is zero or not finite.
        expected: range of exponents, or zero.
    """
    if not np.isfinite(sizes).all():
        return Verdict.DIVERGED
    is_zero = bool((sizes == 0).all())
    if expected.zero:
        return Verdict.ZERO if is_zero else Verdict.NOT_ZERO
    if is_zero and expected.may_be_zero:
        return Verdict.ZERO
    if (sizes == 0).any():
        return Verdict.DEAD
    if slope > expected.high + TOLERANCE:
        return Verdict.GROWS
    return Verdict.SHRINKS if slope < expected.low - TOLERANCE else Verdict.PASSES


def failures(fits: Sequence[Fit]) -> dict[str, Fit]:
    """The first failing fit of each module that fails, in the order of the forward pass."""
    found: dict[str, Fit] = {}
    for fit in fits:
        if not fit.verdict.passed:
            found.setdefault(fit.module, fit)
    return found
