"""The transfer's numbers against values worked out by hand or by another library."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from scipy import stats

from megatron_mup.errors import DataError
from megatron_mup.transfer.fits import (
    Curve,
    Estimate,
    Minimum,
    Transfer,
    compare_arms,
    fit_power_law,
    measure_transfer,
    predict_log2_lr,
)

SIZES = (64.0, 128.0, 256.0, 512.0)


def known(value: float, error: float = 0.02, df: float = 30.0) -> Estimate:
    return Estimate(value=value, low=value - 2 * error, high=value + 2 * error, error=error, df=df)


def minimum(size: float, optimum: float, *, loss: float = 3.0, error: float = 0.02) -> Minimum:
    return Minimum(
        size=size,
        log2_lr=known(optimum, error),
        loss=known(loss, 0.001),
        curvature=known(0.08, 0.002),
        edge=None,
        window=(optimum - 2.0, optimum + 2.0),
        points=5,
        runs=15,
        diverged=0,
        noise=0.01,
        misfit=None,
        lowest=(round(optimum), loss + 0.001),
        asymmetry=0.0,
    )


def curve_of(one: Minimum, losses: dict[float, float] | None = None) -> Curve:
    shown = losses or {-7.0: 3.1, -6.0: 3.0, -5.0: 3.1}
    return Curve(
        size=one.size,
        log2_lrs=tuple(shown),
        losses=tuple(shown.values()),
        seeds=(0,) * len(shown),
    )


def transfer_of(minima: list[Minimum], losses: dict[float, float] | None = None) -> Transfer:
    return measure_transfer(minima, [curve_of(one, losses) for one in minima])


def test_residuals_beyond_the_errors_are_scatter_known_from_themselves() -> None:
    """With equal and tiny errors this is ordinary regression, which scipy knows."""
    optima = (-6.0, -6.4, -6.3, -6.9)
    minima = [minimum(n, v, error=1e-4) for n, v in zip(SIZES, optima, strict=True)]
    shift = transfer_of(minima).shift_per_doubling
    theirs = stats.linregress(np.log2(SIZES), optima)
    half = stats.t.ppf(0.95, 2) * theirs.stderr
    assert shift.value == pytest.approx(theirs.slope)
    assert shift.low == pytest.approx(theirs.slope - half, rel=1e-3)
    assert shift.high == pytest.approx(theirs.slope + half, rel=1e-3)
    assert shift.reason == (
        "the interval rests on the scatter between 4 sizes (2 degrees of freedom): further sizes "
        "narrow it, seeds do not"
    )


def test_the_scatter_is_what_residuals_have_beyond_the_errors() -> None:
    """Without errors it is the residuals' standard deviation with (sizes - 2) in its divisor."""
    optima = (-6.0, -6.4, -6.3, -6.9)
    slope, intercept = np.polyfit(range(4), optima, 1)
    residuals = np.array(optima) - intercept - slope * np.arange(4)
    squares = float(residuals @ residuals) / 2.0
    for error in (1e-4, 0.1):
        minima = [minimum(n, v, error=error) for n, v in zip(SIZES, optima, strict=True)]
        expected = math.sqrt(squares - error**2)
        assert transfer_of(minima).scatter == pytest.approx(expected, rel=1e-3)
    assert (
        transfer_of([minimum(n, v, error=0.3) for n, v in zip(SIZES, optima, strict=True)]).scatter
        == 0.0
    )
    assert transfer_of([minimum(n, -6.0) for n in SIZES[:2]]).scatter is None


def test_residuals_within_the_errors_leave_the_errors_alone() -> None:
    minima = [minimum(n, -6.0 - 0.1 * i, error=0.1) for i, n in enumerate(SIZES)]
    shift = transfer_of(minima).shift_per_doubling
    assert shift.value == pytest.approx(-0.1)
    # Sum of squares of (-1.5, -0.5, 0.5, 1.5) is 5.
    half = stats.t.ppf(0.95, 30) * 0.1 / math.sqrt(5.0)
    assert shift.high == pytest.approx(-0.1 + half)
    assert shift.reason is None


def test_an_error_common_to_all_sizes_shifts_the_prediction_and_not_the_shift() -> None:
    alone = [minimum(n, -6.0 - 0.1 * i, error=0.1) for i, n in enumerate(SIZES)]
    both = [
        replace(one, log2_lr=replace(one.log2_lr, error=math.hypot(0.1, 0.3)), shared_error=0.3)
        for one in alone
    ]
    first, second = transfer_of(alone), transfer_of(both)
    assert second.shift_per_doubling.high == pytest.approx(first.shift_per_doubling.high)
    assert second.total_shift.high == pytest.approx(first.total_shift.high)
    near, far = predict_log2_lr(alone, 1024.0), predict_log2_lr(both, 1024.0)
    # One step beyond: variance 0.1^2 (1/4 + 2.5^2/5), plus 0.3^2.
    assert near.error == pytest.approx(0.1 * math.sqrt(0.25 + 1.25))
    assert far.error == pytest.approx(math.sqrt(0.015 + 0.09))
    assert far.value == pytest.approx(-6.4)


def test_a_prediction_holds_the_scatter_between_sizes() -> None:
    optima = (-6.0, -6.4, -6.3, -6.9)
    minima = [minimum(n, v, error=1e-4) for n, v in zip(SIZES, optima, strict=True)]
    slope, intercept = np.polyfit(range(4), optima, 1)
    residuals = np.array(optima) - intercept - slope * np.arange(4)
    variance = residuals @ residuals / 2.0
    found = predict_log2_lr(minima, 1024.0)
    assert found.value == pytest.approx(intercept + 4 * slope)
    assert found.error == pytest.approx(math.sqrt(variance * (1 + 0.25 + 1.25)), rel=1e-3)
    assert found.df == 2.0


def test_the_penalty_is_the_curve_at_the_smallest_sizes_optimum() -> None:
    minima = [minimum(n, v) for n, v in zip(SIZES, (-6.0, -6.2, -6.4, -6.5), strict=True)]
    penalty = transfer_of(minima).zero_shot_penalty
    assert penalty.value == pytest.approx(0.08 * 0.5**2 / 2.0)
    quantile = stats.t.ppf(0.95, 30)
    reach = quantile * math.hypot(0.02, 0.02)
    up = math.hypot(0.04 * ((0.5 + reach) ** 2 - 0.25), 0.01 * quantile * 0.002 / 0.08)
    assert penalty.high == pytest.approx(0.01 + up)
    assert penalty.low is not None
    assert 0.0 < penalty.low < 0.01


def test_equal_optima_have_a_penalty_that_includes_nothing() -> None:
    penalty = transfer_of([minimum(n, -6.0) for n in SIZES]).zero_shot_penalty
    assert (penalty.value, penalty.low) == (0.0, 0.0)
    assert penalty.high is not None
    assert penalty.high > 0.0


def test_outside_the_window_the_penalty_is_read_off_the_measured_losses() -> None:
    small, large = minimum(64.0, -3.5), minimum(512.0, -6.0)
    losses = {-7.0: 3.1, -6.0: 3.0, -5.0: 3.1, -4.0: 3.6, -3.0: 4.6}
    assert transfer_of([small, large], losses).zero_shot_penalty.value == pytest.approx(1.1)
    del losses[-3.0]
    beyond = transfer_of([small, large], losses).zero_shot_penalty
    assert beyond.value is None
    # 3.6 - 3.0 less t(30) noise sqrt(1 + 1/15).
    assert beyond.low == pytest.approx(0.6 - 1.6973 * 0.01 * math.sqrt(16 / 15), abs=1e-4)
    assert beyond.reason == "2^-3.5 lies outside the learning rates that ended well, 2^-7 to 2^-4"


def test_extrapolation_error_leaves_the_largest_size_out() -> None:
    minima = [minimum(n, v) for n, v in zip(SIZES, (-6.0, -6.1, -6.2, -6.7), strict=True)]
    found = transfer_of(minima).extrapolation_error
    assert found.value == pytest.approx(0.4)  # the line says -6.3
    # The line's value one step beyond three points: 1/3 + 4/2; and the point itself.
    half = stats.t.ppf(0.95, 30) * 0.02 * math.sqrt(1.0 / 3.0 + 2.0 + 1.0)
    assert found.low == pytest.approx(0.4 - half)
    straight = transfer_of([minimum(n, -6.0) for n in SIZES]).extrapolation_error
    assert (straight.value, straight.low) == (pytest.approx(0.0), 0.0)
    two = transfer_of(minima[2:]).extrapolation_error
    assert two.reason == "not identifiable: 2 sizes with an identified optimum, 3 needed"


def test_power_laws_and_kappa_of_known_exponents() -> None:
    """alpha 0.5, beta 0.4, gamma 0.2: kappa = 0.5 - 0.8 + 0.2 = -0.1."""
    sizes = (64.0, 128.0, 256.0, 512.0, 1024.0)
    minima = [
        replace(
            minimum(n, -6.0 - 8.0 * n**-0.4, error=1e-3),
            loss=known(2.5 + 4.0 * n**-0.5, 1e-4),
            curvature=known(0.02 * n**0.2, 1e-5),
        )
        for n in sizes
    ]
    found = transfer_of(minima)
    assert found.alpha.value == pytest.approx(0.5, abs=0.01)
    assert found.asymptotic_loss.value == pytest.approx(2.5, abs=0.005)
    assert found.beta.value == pytest.approx(0.4, abs=0.01)
    assert found.gamma.value == pytest.approx(0.2, abs=1e-6)
    assert found.kappa.value == pytest.approx(-0.1, abs=0.02)
    for part in (found.alpha, found.beta, found.kappa):
        assert part.low is not None
        assert part.high is not None
        assert part.low < part.value < part.high


def test_a_law_gives_its_coefficient_in_the_sizes_own_units() -> None:
    law = fit_power_law(SIZES, [known(3.0 * n**-0.7, 1e-6) for n in SIZES], asymptote=False)
    assert law.coefficient.value == pytest.approx(3.0, rel=1e-3)
    assert (law.asymptote.value, law.asymptote.low) == (0.0, None)
    limited = [known(1.0 + 3.0 * n**-0.7, 1e-5) for n in SIZES]
    law = fit_power_law(SIZES, limited, asymptote=True)
    assert law.coefficient.value == pytest.approx(3.0, rel=0.05)
    assert law.asymptote.value == pytest.approx(1.0, abs=0.002)


def test_laws_without_power_are_refused_with_a_reason() -> None:
    three = fit_power_law(SIZES[:3], [known(1.0)] * 3, asymptote=False)
    assert three.reason == "not identifiable: 3 sizes with a value, 4 needed"
    vague = [known(2.5 + n**-0.5, 0.2) for n in SIZES]
    hopeless = fit_power_law(SIZES, vague, asymptote=True)
    assert hopeless.exponent.value is None
    assert hopeless.reason is not None
    assert "the exponent could be anything" in hopeless.reason
    negative = fit_power_law(SIZES, [known(-1.0)] * 4, asymptote=False)
    assert negative.reason == "not identifiable: a value is -1, a power law is positive"


def test_an_asymptote_without_errors_needs_a_fifth_size() -> None:
    bare = [Estimate(value=2.5 + 4.0 * n**-0.5) for n in (*SIZES, 1024.0)]
    refused = fit_power_law(SIZES, bare[:4], asymptote=True)
    assert refused.reason is not None
    assert refused.reason.endswith("(no repeats), 5 sizes needed")
    law = fit_power_law((*SIZES, 1024.0), bare, asymptote=True)
    assert law.exponent.value == pytest.approx(-0.5, abs=1e-3)
    assert law.asymptote.value == pytest.approx(2.5, abs=1e-3)


def test_an_optimum_that_does_not_move_has_no_beta() -> None:
    found = transfer_of([minimum(n, -6.0 + 0.01 * (-1) ** i) for i, n in enumerate(SIZES)])
    assert found.beta.value is None
    assert found.kappa.value is None
    assert found.kappa.reason is not None
    assert "beta" in found.kappa.reason


def test_sizes_may_come_in_any_order() -> None:
    minima = [minimum(n, -6.0 - 0.1 * i) for i, n in enumerate(SIZES)]
    found = transfer_of([minima[2], minima[0], minima[3], minima[1]])
    assert found.sizes == SIZES
    assert found.total_shift.value == pytest.approx(-0.3)
    assert found.extrapolation_error.value == pytest.approx(0.0)


def test_an_edge_at_the_largest_size_bounds_the_shift() -> None:
    last = replace(
        minimum(512.0, -9.0), log2_lr=Estimate(value=None, high=-8.0, reason="edge"), edge="low"
    )
    found = transfer_of([minimum(64.0, -6.0), minimum(128.0, -6.5), last])
    assert found.total_shift.value is None
    assert found.total_shift.high == pytest.approx(-8.0 + 6.04)  # down from the low end, -6.04
    assert found.shift_per_doubling.high == pytest.approx(-1.96 / 3.0)
    assert found.shift_per_doubling.low is None


def test_arms_are_compared_by_their_limits() -> None:
    better = transfer_of([minimum(n, -6.0) for n in SIZES])
    better = replace(better, asymptotic_loss=known(2.5, 0.03))
    worse = replace(better, asymptotic_loss=known(2.6, 0.04))
    unknown = replace(better, asymptotic_loss=Estimate(value=None, reason="3 sizes"))
    found = compare_arms({"sp": worse, "mup": better, "other": unknown})
    assert found.best == "mup"
    assert found.asymptotic_penalty["sp"].value == pytest.approx(0.1)
    assert found.asymptotic_penalty["sp"].error == pytest.approx(0.05)
    assert found.asymptotic_penalty["other"].reason == "3 sizes"
    assert compare_arms({"other": unknown}).best is None


def test_sizes_that_appear_twice_or_do_not_match_are_refused() -> None:
    one = minimum(64.0, -6.0)
    with pytest.raises(DataError, match="64, 64"):
        transfer_of([one, one])
    with pytest.raises(DataError, match="same sizes"):
        measure_transfer([one], [])
    with pytest.raises(DataError, match="no minima"):
        predict_log2_lr([], 64.0)
    with pytest.raises(DataError, match="size -1"):
        predict_log2_lr([one], -1.0)
