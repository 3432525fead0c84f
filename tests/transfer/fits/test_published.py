"""Tables that others published are read as their authors read them."""

from __future__ import annotations

from dataclasses import replace

import pytest

from megatron_mup.transfer.fits import (
    Curve,
    Minimum,
    fit_minima,
    judge,
    measure_transfer,
    predict_log2_lr,
)
from tests.transfer.fits.published import (
    MEGATRON_MUP,
    MEGATRON_SP,
    MEGATRON_WIDTHS,
    grid_minima,
    marin_curves,
)


def test_three_published_sizes_have_their_optimum_at_the_multiple_that_the_authors_name() -> None:
    """Stabilized at "1x": within half a step (a quarter octave) of log2(1) = 0."""
    minima = fit_minima(marin_curves())
    for minimum in minima:
        assert minimum.log2_lr.value == pytest.approx(0.0, abs=0.25)
        assert minimum.edge is None
        assert minimum.lowest is not None
        assert minimum.lowest[0] == 0.0
    assert [minimum.points for minimum in minima] == [9, 9, 4]
    assert [minimum.loss.value for minimum in minima] == pytest.approx(
        [3.8188, 3.4279, 3.1725], abs=0.01
    )


def test_a_bound_far_outside_the_points_is_not_given() -> None:
    """The largest published size has one point right of its lowest; mirrored, one left of it."""
    curves = marin_curves()
    mirrored = [replace(one, log2_lrs=tuple(-x for x in one.log2_lrs)) for one in curves]
    right, left = fit_minima(curves)[2].log2_lr, fit_minima(mirrored)[2].log2_lr
    assert (right.high, right.reason) == (None, "no upper bound within reach of the points")
    assert (left.low, left.reason) == (None, "no lower bound within reach of the points")
    assert right.low is not None
    assert left.high is not None


def test_the_published_optimum_matches_across_sizes() -> None:
    curves = marin_curves()
    transfer = measure_transfer(fit_minima(curves), curves)
    assert transfer.total_shift.low is not None
    assert transfer.total_shift.high is not None
    assert transfer.total_shift.low < 0.0 < transfer.total_shift.high
    assert judge(transfer).outcome == "transfers"


def test_a_published_sp_optimum_halves_with_every_doubling() -> None:
    minima = grid_minima(MEGATRON_WIDTHS, MEGATRON_SP)
    shift = measure_transfer(minima, _curves(minima)).shift_per_doubling
    assert shift.value == pytest.approx(-1.0, abs=0.01)
    # 6.10e-05 at 2048 becomes 3.05e-05 at 4096, 2^-15.
    assert predict_log2_lr(minima, 4096.0).value == pytest.approx(-15.0, abs=0.01)
    assert judge(measure_transfer(minima, _curves(minima))).outcome == "does not transfer"


def test_a_published_mup_optimum_that_worries_its_author_at_the_largest_width_worries_us() -> None:
    minima = grid_minima(MEGATRON_WIDTHS, MEGATRON_MUP)
    transfer = measure_transfer(minima, _curves(minima))
    # Slope of (0, 0, 0, 0, 1) octaves against the doublings: 2 / 10.
    assert transfer.shift_per_doubling.value == pytest.approx(0.2, abs=0.001)
    assert judge(transfer).outcome == "cannot tell"
    four = minima[:-1]
    assert measure_transfer(four, _curves(four)).shift_per_doubling.value == pytest.approx(0.0)


def _curves(minima: list[Minimum]) -> list[Curve]:

    return [
        Curve(size=one.size, log2_lrs=(one.log2_lr.value,), losses=(3.0,), seeds=(0,))
        for one in minima
    ]
