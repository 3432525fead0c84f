"""What one curve is given next: every case of the rule, with numbers worked out by hand."""

from __future__ import annotations

from typing import Any

import pytest

from megatron_mup.transfer.fits import Estimate, Minimum
from megatron_mup.transfer.sweep.refinement_rule import Tried, choose
from megatron_mup.transfer.sweep.spec import Refine

REFINE = Refine(interval_octaves=0.5, max_rounds=3, max_cells=None, widest=(-14.0, 2.0))
GRID = (-8.0, -7.0, -6.0, -5.0, -4.0)


def tried(
    *,
    interval: tuple[float, float] | None = (-7.0, -5.0),
    runs: dict[float, list[int]] | None = None,
    coarse: tuple[float, ...] = GRID,
    df: float = 10.0,
    stopped: tuple[float, ...] = (),
    **changes: Any,
) -> Tried:
    """A curve with its lowest loss at 2^-6 unless a test says otherwise."""
    low, high = interval or (None, None)
    value = None if interval is None else -6.0
    estimate = Estimate(value=value, low=low, high=high, reason="flat", error=0.3, df=df)
    values: dict[str, Any] = {
        "size": 64.0,
        "log2_lr": estimate,
        "loss": estimate,
        "curvature": estimate,
        "edge": None,
        "window": (-8.0, -4.0),
        "points": 5,
        "runs": 5,
        "diverged": 0,
        "noise": 0.01,
        "misfit": None,
        "lowest": (-6.0, 3.0),
    }
    given = {rate: [1] for rate in coarse} if runs is None else runs
    return Tried(
        minimum=Minimum(**{**values, **changes}),
        coarse=coarse,
        runs=frozenset((rate, seed) for rate, seeds in given.items() for seed in seeds),
        seeds=(1, 5, 3),
        stopped=frozenset(stopped),
    )


THREE = {rate: [1, 5, 3] for rate in GRID}
NARROW = (-6.25, -5.75)


def test_a_narrow_interval_needs_nothing() -> None:
    choice = choose(tried(interval=NARROW, runs=THREE), REFINE)
    assert (choice.action, choice.runs) == ("stop", ())
    assert choice.reason == "narrow enough: optimum 2^-6.00, interval 0.50 octaves wide"


def test_a_narrow_interval_of_fewer_than_three_seeds_is_not_believed() -> None:
    one = choose(tried(interval=NARROW), REFINE)
    assert (one.action, one.runs) == ("halve", ((-6.5, 1), (-5.5, 1)))
    assert one.reason == "half steps beside 2^-6: optimum 2^-6.00, interval 0.50 octaves wide"
    then = choose(tried(interval=NARROW, runs=HALVED), REFINE)
    assert then.runs == tuple((rate, seed) for seed in (5, 3) for rate in NEAR)
    # Two seeds lack one, however narrow the interval is.
    two = {rate: [1, 5] for rate in HALVED}
    last = choose(tried(interval=(-6.01, -5.99), runs=two), REFINE)
    assert last.runs == tuple((rate, 3) for rate in NEAR)
    # Rates beyond the neighbours may have one seed.
    near = choose(tried(interval=NARROW, runs=THREE | {-8.0: [1], -4.0: [1]}), REFINE)
    assert near.reason.startswith("narrow enough")


def test_a_narrow_interval_of_a_curve_that_misses_its_points_is_not_believed() -> None:
    missed: dict[str, Any] = {"interval": NARROW, "misfit": "the curve misses its points"}
    first = choose(tried(runs=THREE, **missed), REFINE)
    assert (first.action, len(first.runs)) == ("halve", 6)
    halved = {rate: [1, 5, 3] for rate in HALVED}
    last = choose(tried(runs=halved, **missed), REFINE)
    assert last.reason.startswith("more runs will not help: the curve misses its points; optimum")
    # One that a narrower window describes may be believed.
    cured = choose(tried(runs=THREE, narrowed=True, **missed), REFINE)
    assert cured.reason.startswith("narrow enough")


@pytest.mark.parametrize(
    ("edge", "lowest", "added"),
    [("high", -4.0, (-3.0, -2.0)), ("low", -8.0, (-9.0, -10.0))],
)
def test_an_edge_is_passed_by_two_rates_of_the_first_seed(
    edge: str, lowest: float, added: tuple[float, float]
) -> None:
    choice = choose(tried(edge=edge, lowest=(lowest, 3.0)), REFINE)
    assert choice.action == "extend"
    assert choice.runs == ((added[0], 1), (added[1], 1))


def test_the_last_step_of_the_grid_leads_on() -> None:
    choice = choose(
        tried(coarse=(-8.0, -7.0, -6.5), edge="high", lowest=(-6.5, 3.0)),
        REFINE,
    )
    assert choice.runs == ((-6.0, 1), (-5.5, 1))
    alone = choose(tried(coarse=(-8.0,), edge="high", lowest=(-8.0, 3.0)), REFINE)
    assert alone.runs == ((-7.0, 1), (-6.0, 1))


def test_rates_stay_within_the_widest() -> None:
    within = Refine(interval_octaves=0.5, max_rounds=3, max_cells=None, widest=(-9.0, -4.0))
    low = choose(tried(edge="low", lowest=(-8.0, 3.0)), within)
    assert low.runs == ((-9.0, 1),)
    high = choose(tried(edge="high", lowest=(-4.0, 3.0)), within)
    assert (high.action, high.runs) == ("stop", ())
    assert high.reason == (
        "refine.widest ends here: the lowest loss is at 2^-4, the highest learning rate"
    )


def test_where_every_run_diverged_lower_rates_follow() -> None:
    choice = choose(tried(lowest=None, interval=None, diverged=5), REFINE)
    assert choice.runs == ((-9.0, 1), (-10.0, 1))
    assert choice.reason == (
        "runs diverged at all learning rates from 2^-8 on, the lowest learning rate"
    )


def test_runs_that_were_stopped_early_are_not_taken_for_diverged_ones() -> None:
    between = choose(tried(lowest=None, interval=None, stopped=(-8.0, -7.0)), REFINE)
    assert (between.action, between.runs) == ("halve", ((-6.5, 1),))
    assert between.reason == (
        "runs diverged at all learning rates from 2^-6 on, beside runs that did not end well at "
        "2^-7"
    )
    nothing = choose(tried(lowest=None, interval=None, stopped=GRID), REFINE)
    assert (nothing.action, nothing.runs) == ("stop", ())


def test_a_single_good_rate_is_an_edge_on_both_sides() -> None:
    runs = {-8.0: [1], -7.0: [1], -6.0: [1]}
    only: dict[str, Any] = {
        "edge": "high",
        "lowest": (-8.0, 3.0),
        "window": (-8.0, -8.0),
        "coarse": (-8.0, -7.0, -6.0),
    }
    # -7 and -6 diverged: below -8 nothing has been tried.
    below = choose(tried(runs=runs, **only), REFINE)
    assert (below.action, below.runs) == ("extend", ((-9.0, 1), (-10.0, 1)))
    # Nor was there anything to be tried: half way to -7 then.
    narrow = Refine(interval_octaves=0.5, max_rounds=3, max_cells=None, widest=(-8.0, 2.0))
    assert choose(tried(runs=runs, **only), narrow).runs == ((-7.5, 1),)
    last = choose(tried(runs=runs | {-7.5: [1]}, **only), narrow)
    assert last.reason.startswith("more runs will not help: the lowest loss is at 2^-8, beside")
    # With a rate below it the same lowest loss is an edge on one side alone.
    two = only | {"window": (-9.0, -8.0), "coarse": (-9.0, -8.0, -7.0, -6.0)}
    assert choose(tried(runs=runs | {-9.0: [1]}, **two), REFINE).runs == ((-7.5, 1),)


def test_rates_are_free_of_what_floating_point_adds() -> None:
    # -5.0 - -5.1 is 0.0999..., and -5.1 + -5.2 is no exact decimal either.
    coarse = tuple(-6.0 + 0.1 * index for index in range(11))
    beyond = choose(tried(coarse=coarse, edge="high", lowest=(coarse[-1], 3.0)), REFINE)
    assert [rate for rate, _ in beyond.runs] == [-4.9, -4.8]
    halves = choose(tried(coarse=coarse, lowest=(coarse[4], 3.0)), REFINE)
    assert [rate for rate, _ in halves.runs] == [-5.65, -5.55]


def test_beside_a_diverged_rate_half_a_step_is_tried_once() -> None:
    runs = {-8.0: [1], -7.0: [1], -6.0: [1], -5.0: [1, 5], -4.0: [1]}
    first = choose(tried(edge="high", lowest=(-5.0, 3.0), runs=runs), REFINE)
    assert (first.action, first.runs) == ("halve", ((-4.5, 1), (-4.5, 5)))
    then = choose(tried(edge="high", lowest=(-5.0, 3.0), runs={**runs, -4.5: [1, 5]}), REFINE)
    assert then.action == "stop"
    assert then.reason == (
        "more runs will not help: the lowest loss is at 2^-5, beside runs that did not end well at "
        "2^-4.5"
    )


def test_a_wide_interval_gets_half_steps_with_the_seeds_of_the_lowest() -> None:
    runs = {-8.0: [1], -7.0: [1], -6.0: [1, 5], -5.0: [1], -4.0: [1]}
    choice = choose(tried(runs=runs), REFINE)
    assert choice.action == "halve"
    assert choice.runs == ((-6.5, 1), (-6.5, 5), (-5.5, 1), (-5.5, 5))


HALVED = {-8.0: [1], -7.0: [1], -6.5: [1], -6.0: [1], -5.5: [1], -5.0: [1], -4.0: [1]}


NEAR = (-7.0, -6.5, -6.0, -5.5, -5.0)


def test_after_the_half_steps_further_seeds_follow_from_one_step_below_to_one_above() -> None:
    # An octave to half of one is four times the runs; two seeds come at a time.
    choice = choose(tried(runs=HALVED, interval=(-6.5, -5.5)), REFINE)
    assert choice.action == "seeds"
    # The first of them everywhere before the second: a limit may end the list.
    assert choice.runs == tuple((rate, seed) for seed in (5, 3) for rate in NEAR)


def test_seeds_that_a_rate_lacks_come_first_and_new_ones_are_above_those_of_the_sweep() -> None:
    runs = {rate: [1, 5, 3] for rate in HALVED} | {-6.5: [1, 5]}
    # 0.6 octaves to 0.5 are 1.44 times the two runs that each has at least: three.
    choice = choose(tried(runs=runs, interval=(-6.3, -5.7)), REFINE)
    assert choice.runs == ((-6.5, 3),)
    everything = {rate: [1, 5, 3] for rate in HALVED}
    more = choose(tried(runs=everything, interval=(-6.3, -5.7)), REFINE)
    # 1.44 times three are more than four; the new ones are above 5.
    assert more.runs == tuple((rate, seed) for seed in (6, 7) for rate in NEAR)


def test_an_interval_without_an_end_gets_seeds() -> None:
    choice = choose(tried(runs=HALVED, interval=None), REFINE)
    assert choice.action == "seeds"
    assert len(choice.runs) == 10
    assert choice.reason == "3 seeds around 2^-6: no interval of the optimum (flat)"


def test_a_forecast_of_too_many_seeds_ends_it() -> None:
    choice = choose(tried(runs=HALVED), REFINE)
    assert choice.action == "stop"
    assert "more runs will not help: about 16 seeds would be needed" in choice.reason
    # Two degrees of freedom forecast nothing.
    assert choose(tried(runs=HALVED, df=2.0), REFINE).action == "seeds"


def test_twelve_seeds_are_the_most() -> None:
    flat: dict[str, Any] = {"interval": None, "coarse": GRID}
    eleven = choose(tried(runs={rate: list(range(1, 12)) for rate in HALVED}, **flat), REFINE)
    assert eleven.action == "seeds"
    twelve = choose(tried(runs={rate: list(range(1, 13)) for rate in HALVED}, **flat), REFINE)
    assert (twelve.action, twelve.runs) == ("stop", ())
    assert twelve.reason.startswith("more runs will not help: 12 seeds were run; no interval of")


def test_misfit_is_not_cured_by_seeds() -> None:
    missed = {"misfit": "the fitted curve misses its points", "interval": (-6.5, -5.5)}
    choice = choose(tried(runs=HALVED, **missed), REFINE)
    assert choice.reason.startswith("more runs will not help: the fitted curve misses its points")


def test_a_misfit_that_a_narrower_window_cured_leaves_seeds_worth_running() -> None:
    narrow = tried(runs=HALVED, interval=(-6.5, -5.5), misfit="only near points", narrowed=True)
    assert choose(narrow, REFINE).action == "seeds"
