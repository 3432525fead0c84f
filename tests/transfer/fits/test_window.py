"""Which points are used, and what an edge allows to say."""

from __future__ import annotations

import math

import pytest

from megatron_mup.transfer.fits import Curve, Minimum, fit_minima

NAN = math.nan


def fit(losses: dict[float, float], *, seeds: int = 2, wobble: float = 0.001) -> Minimum:
    """The same losses for each seed, but for a wobble with which the noise is known."""
    runs = []
    for seed in range(seeds):
        for index, (x, y) in enumerate(losses.items()):
            sign = 1.0 if (index + seed) % 2 else -1.0
            runs.append((x, y + sign * wobble, seed))
    return fit_minima(
        [
            Curve(
                size=256.0,
                log2_lrs=tuple(run[0] for run in runs),
                losses=tuple(run[1] for run in runs),
                seeds=tuple(run[2] for run in runs),
            )
        ]
    )[0]


def test_points_within_two_octaves_of_the_lowest_are_used() -> None:
    xs = [-10.0, -9.0, -8.0, -7.0, -6.0, -5.0, -4.0]
    found = fit({x: 3.0 + 0.05 * (x + 7.2) ** 2 for x in xs})
    assert found.window == (-9.0, -5.0)
    assert (found.points, found.runs) == (5, 10)


def test_a_coarse_grid_still_gives_the_lowest_and_its_neighbours() -> None:
    found = fit({-10.0: 3.6, -7.0: 3.1, -4.0: 3.5, -1.0: 5.0})
    assert found.window == (-10.0, -4.0)


def test_a_diverged_run_ends_the_window() -> None:
    """One seed of two is enough: the mean of the others would be of the lucky ones."""
    good = {-8.0: 3.2, -7.0: 3.0, -6.0: 3.05, -5.0: 3.3}
    runs = [(x, y, seed) for x, y in good.items() for seed in (0, 1)]
    runs += [(-4.0, 3.31, 0), (-4.0, NAN, 1), (-3.0, NAN, 0), (-3.0, NAN, 1)]
    found = fit_minima(
        [
            Curve(
                size=64.0,
                log2_lrs=tuple(run[0] for run in runs),
                losses=tuple(run[1] for run in runs),
                seeds=tuple(run[2] for run in runs),
            )
        ]
    )[0]
    assert found.window == (-8.0, -5.0)
    assert (found.points, found.runs, found.diverged) == (4, 8, 3)


def test_a_bad_seed_that_ran_near_the_lowest_only_does_not_move_it() -> None:
    """Seed 1 sits 0.2 nats higher: plain means would be lowest at the outer learning rates."""
    outer = [(-8.0, 3.05, 0), (-4.0, 3.05, 0)]
    near = [
        (x, 3.0 + 0.02 * abs(x + 6.0) + 0.2 * seed, seed)
        for x in (-7.0, -6.0, -5.0)
        for seed in (0, 1)
    ]
    columns = list(zip(*sorted(outer + near), strict=True))
    found = fit_minima([Curve(size=64.0, log2_lrs=columns[0], losses=columns[1], seeds=columns[2])])
    assert found[0].edge is None
    assert found[0].lowest == pytest.approx((-6.0, 3.1))


def test_seeds_that_never_meet_leave_the_means_alone() -> None:
    """A column of run ids: no seed's level can be told from a learning rate's loss."""
    losses = {-8.0: 3.4, -7.0: 3.1, -6.0: 3.0, -5.0: 3.05, -4.0: 3.2}
    seeds = (1, 1, 2, 1, 1)
    runs = Curve(size=64.0, log2_lrs=tuple(losses), losses=tuple(losses.values()), seeds=seeds)
    found = fit_minima([runs])[0]
    assert found.edge is None
    assert found.lowest == pytest.approx((-6.0, 3.0))


def test_a_low_edge_bounds_the_optimum_from_above() -> None:
    found = fit({-8.0: 2.7, -7.0: 2.8, -6.0: 2.9, -5.0: 3.2, -4.0: 3.9})
    assert found.edge == "low"
    assert found.log2_lr.value is None
    assert (found.log2_lr.low, found.log2_lr.high) == (None, -7.0)
    assert found.log2_lr.reason == (
        "the lowest loss lies at the lowest learning rate, 2^-8: the optimum lies below 2^-7 "
        "(noise unknown)"
    )
    assert found.lowest == pytest.approx((-8.0, 2.7))


def test_a_high_edge_bounds_the_optimum_from_below() -> None:
    found = fit({-8.0: 3.4, -7.0: 3.2, -6.0: 3.0})
    assert found.edge == "high"
    assert (found.log2_lr.low, found.log2_lr.high) == (-7.0, None)
    assert found.loss.value is None
    assert found.curvature.value is None


def test_diverged_runs_beyond_an_edge_bound_it_on_the_other_side() -> None:
    found = fit({-8.0: 3.4, -7.0: 3.2, -6.0: 3.0, -5.0: NAN, -4.0: NAN})
    assert found.edge == "high"
    assert (found.log2_lr.low, found.log2_lr.high) == (-7.0, -5.0)
    assert found.log2_lr.reason is not None
    assert "did not diverge, 2^-6: the optimum lies between 2^-7 and 2^-5" in found.log2_lr.reason


def test_an_edge_beside_partly_diverged_runs_names_them_and_not_the_end_of_the_grid() -> None:
    """Rates go to 2^-5, and at 2^-7 one seed of three diverged."""
    losses = {-9.0: (3.3, 3.31, 3.32), -8.0: (3.1, 3.11, 3.12), -7.0: (3.0, NAN, 3.02)}
    losses |= {-6.0: (3.2, 3.21, 3.22), -5.0: (3.4, 3.41, 3.42)}
    runs = [(x, y, seed) for x, ys in losses.items() for seed, y in enumerate(ys)]
    columns = [tuple(column) for column in zip(*runs, strict=True)]
    found = fit_minima([Curve(size=64.0, log2_lrs=columns[0], losses=columns[1], seeds=columns[2])])
    assert found[0].edge == "high"
    assert found[0].beside == -7.0
    assert found[0].log2_lr.reason == (
        "the lowest loss, at 2^-8, lies beside 2^-7, at which 1 of 3 runs diverged: the "
        "optimum lies above 2^-9 (noise unknown)"
    )


def test_with_known_noise_an_edge_bound_needs_a_significant_difference() -> None:
    """Noise 0.05 from a second size: 2.80 is not above 2.78, 3.2 is."""
    grid = (-8.0, -7.0, -6.0, -5.0, -4.0)
    edge = dict(zip(grid, (2.78, 2.80, 3.2, 3.6, 4.4), strict=True))
    inner = dict(zip(grid, (4.0, 3.3, 3.0, 3.3, 4.0), strict=True))
    # Seeds +0.05 and -0.05 by turns: residuals of learning rate + seed of 0.05 or so.
    signs = {-8.0: 1, -7.0: -1, -6.0: 1, -5.0: -1, -4.0: 1}

    def make(size: float, losses: dict[float, float]) -> Curve:
        runs = [(x, y + s * signs[x] * 0.05, s) for x, y in losses.items() for s in (-1, 1)]
        return Curve(
            size=size,
            log2_lrs=tuple(run[0] for run in runs),
            losses=tuple(run[1] for run in runs),
            seeds=tuple(run[2] for run in runs),
        )

    found = fit_minima([make(64.0, inner), make(128.0, edge)])[1]
    assert found.noise == pytest.approx(math.sqrt(2 * 4.8 * 0.05**2 / 4))
    assert found.edge == "low"
    assert found.log2_lr.high == -6.0


def test_a_single_point_is_an_edge() -> None:
    found = fit({-6.0: 3.0}, wobble=0.0)
    assert found.edge == "high"
    assert (found.log2_lr.value, found.log2_lr.low, found.log2_lr.high) == (None, None, None)
