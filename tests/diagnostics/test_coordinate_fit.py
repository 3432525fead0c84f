"""Slopes, expected exponents and verdicts of the coordinate check, from hand-made numbers."""

from __future__ import annotations

import math

import numpy as np
import pytest

from megatron_mup.diagnostics.coordinate_fit import (
    Expected,
    Fit,
    Verdict,
    expected_exponent,
    failures,
    fit_coordinates,
    judge,
    slope_in_width,
)
from megatron_mup.diagnostics.coordinate_report import (
    conclusion,
    coordinates_csv,
    interval_text,
    read_coordinates,
    slopes_csv,
)
from megatron_mup.diagnostics.coordinates import Coordinate
from megatron_mup.diagnostics.widths import Grow
from tests.configurations import tiny

WIDTHS = (64, 128, 256, 512)
INF = math.inf
MULTIPLIER_TIED = ("untie_embeddings_and_output_weights=false", "output_form=multiplier")


def power(exponent: float, *, factor: float = 1.0) -> list[float]:
    return [factor * width**exponent for width in WIDTHS]


def test_slope_and_interval_are_those_of_the_seeds() -> None:
    sizes = np.array([power(0.9), power(1.0, factor=7), power(1.1, factor=0.2)])
    slope, half_width = slope_in_width(WIDTHS, sizes)
    assert slope == pytest.approx(1.0)
    # sd 0.1, the t quantile 4.3027 of 2 degrees of freedom, three seeds.
    assert half_width == pytest.approx(4.3027 * 0.1 / 3**0.5, rel=1e-4)


def test_one_seed_gives_a_slope_without_an_interval() -> None:
    slope, half_width = slope_in_width(WIDTHS, np.array([power(-0.5)]))
    assert slope == pytest.approx(-0.5)
    assert math.isnan(half_width)


@pytest.mark.parametrize(
    ("expected", "sizes", "verdict"),
    [
        (Expected(), power(0.24), Verdict.PASSES),
        (Expected(), power(0.26), Verdict.GROWS),
        (Expected(), power(-0.26), Verdict.SHRINKS),
        (Expected(low=-0.5), power(-0.7), Verdict.PASSES),
        (Expected(low=-0.5), power(-0.8), Verdict.SHRINKS),
        (Expected(low=-0.5, high=0.5), power(0.7), Verdict.PASSES),
        (Expected(zero=True), [0.0] * 4, Verdict.ZERO),
        (Expected(zero=True), [0.0, 0.0, 1e-9, 0.0], Verdict.NOT_ZERO),
        (Expected(low=-INF, may_be_zero=True), [0.0] * 4, Verdict.ZERO),
        (Expected(low=-INF, may_be_zero=True), power(-3), Verdict.PASSES),
        (Expected(), [0.0] * 4, Verdict.DEAD),
        (Expected(), [1.0, 1.0, 0.0, 1.0], Verdict.DEAD),
        (Expected(), [1.0, 1.0, math.nan, 1.0], Verdict.DIVERGED),
        (Expected(zero=True), [0.0, INF, 0.0, 0.0], Verdict.DIVERGED),
    ],
)
def test_verdict_of_sizes(expected: Expected, sizes: list[float], verdict: Verdict) -> None:
    positive = all(0 < size < INF for size in sizes)
    slope = slope_in_width(WIDTHS, np.array([sizes]))[0] if positive else math.nan
    assert judge(np.array([sizes]), slope, expected) is verdict


@pytest.mark.parametrize(
    ("options", "module", "step", "range_or_zero"),
    [
        ((), "embedding", 0, (0, 0)),
        ((), "layer 2 residual", 0, (0, 0)),
        ((), "layer 1 scores", 0, (0, 0)),
        ((), "final_norm", 0, (0, 0)),
        ((), "logits", 0, (-0.5, -0.5)),
        (("output_form=multiplier",), "logits", 0, (-0.5, -0.5)),
        (("u_init=sp",), "logits", 0, (0, 0)),
        (("name=sp",), "logits", 0, (0, 0)),
        (("u_init=zero",), "logits", 0, "zero"),
        (MULTIPLIER_TIED, "logits", 0, (-0.5, 0)),
        (("q_init=zero",), "layer 1 scores", 0, "zero"),
        (("q_init=zero",), "layer 1 attention_out", 0, (0, 0)),
        (("r_init=zero",), "layer 1 attention_out", 0, "zero"),
        (("r_init=zero",), "layer 2 ffn_out", 0, "zero"),
        (("r_init=zero",), "layer 2 residual", 0, (0, 0)),
        ((), "embedding", 1, (0, 0)),
        ((), "layer 1 scores", 1, (-0.5, 0)),
        ((), "logits", 4, (-0.5, 0)),
        (("name=sp",), "layer 2 residual", 2, (-0.5, 0)),
        (("u_init=sp",), "logits", 2, (-0.5, 0.5)),
        (("u_init=sp",), "final_norm", 2, (-0.5, 0)),
        (("u_init=zero",), "layer 1 ffn_out", 1, (-INF, 0)),
        (("u_init=zero",), "layer 1 ffn_out", 2, (-0.5, 0)),
        (("u_init=zero",), "logits", 1, (-0.5, 0)),
        (("num_query_groups=1",), "layer 2 attention_out", 1, (-0.5, 0.5)),
        (("num_query_groups=2",), "layer 2 attention_out", 1, (-0.5, 0)),
    ],
)
def test_expected_exponent(
    options: tuple[str, ...], module: str, step: int, range_or_zero: object
) -> None:
    expected = expected_exponent(tiny(*options), module, step, grow=Grow.HEADS)
    found = "zero" if expected.zero else (expected.low, expected.high)
    assert found == range_or_zero


@pytest.mark.parametrize(
    ("scale", "exponent"), [("inverse", -0.5), ("base_head_dim", -0.5), ("inverse_sqrt", 0.0)]
)
def test_scores_shrink_with_a_growing_head_dim_as_the_scale_says(
    scale: str, exponent: float
) -> None:
    run = tiny(f"attention_scale={scale}")
    expected = expected_exponent(run, "layer 1 scores", 0, grow=Grow.HEAD_DIM)
    assert (expected.low, expected.high) == (exponent, exponent)


def coordinates(change_exponent: float) -> list[Coordinate]:
    """Two seeds of an embedding whose change follows a power of the width."""
    return [
        Coordinate(width, seed, step, "embedding", 1.0, step * seed * width**change_exponent)
        for width in WIDTHS
        for seed in (1, 2)
        for step in (0, 1, 2)
    ]


def test_fits_judge_size_at_step_0_and_change_afterwards() -> None:
    fits = fit_coordinates(coordinates(1.0), tiny())
    assert [fit.step for fit in fits] == [0, 1, 2]
    assert [fit.slope for fit in fits] == pytest.approx([0.0, 1.0, 1.0], abs=1e-9)
    assert [fit.verdict for fit in fits] == [Verdict.PASSES, Verdict.GROWS, Verdict.GROWS]
    assert {fit.degrees_of_freedom for fit in fits} == {1}
    assert failures(fits)["embedding"].step == 1
    assert conclusion(fits) == ("The coordinate check FAILS: embedding grows as M^+1.00 at step 1.")
    assert "2 seeds (1 degree(s) of freedom)" in interval_text(fits)


def test_one_seed_is_said_to_have_no_interval() -> None:
    rows = [row for row in coordinates(0.0) if row.seed == 1]
    fits = fit_coordinates(rows, tiny())
    assert "no interval" in interval_text(fits)
    assert failures(fits) == {}
    assert "passes" in conclusion(fits)


def test_csv_files_hold_every_number() -> None:
    rows = [*coordinates(0.3), Coordinate(64, 3, 1, "logits", math.inf, 0.1)]
    assert read_coordinates(coordinates_csv(rows)) == rows
    fit = Fit(
        module="logits",
        step=2,
        slope=0.5,
        half_width=0.25,
        degrees_of_freedom=2,
        expected=Expected(low=-0.5),
        verdict=Verdict.GROWS,
    )
    assert slopes_csv([fit]).splitlines() == [
        "module,step,quantity,slope,half_width,degrees_of_freedom,expected,verdict",
        "logits,2,change,0.5,0.25,2,-0.5 to 0,grows",
    ]
