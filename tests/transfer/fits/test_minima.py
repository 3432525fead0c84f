"""The minimum of a curve: exact where the data are, honest where they are not."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from megatron_mup.errors import DataError
from megatron_mup.transfer.fits import Curve, Minimum, fit_minima, loss_at
from tests.transfer.fits.families import Family, draw, parabola, skewed

GRID = (-8.0, -7.0, -6.0, -5.0, -4.0)
NAN = math.nan


def curve(
    losses: dict[float, float], *, size: float = 64.0, offsets: tuple[float, ...] = (0.0,)
) -> Curve:
    """One run a learning rate and seed; a seed shifts the whole curve."""
    runs = [(x, y + shift, s) for s, shift in enumerate(offsets) for x, y in losses.items()]
    return Curve(
        size=size,
        log2_lrs=tuple(run[0] for run in runs),
        losses=tuple(run[1] for run in runs),
        seeds=tuple(run[2] for run in runs),
    )


def parabolic(optimum: float, curvature: float, loss: float = 3.0) -> dict[float, float]:
    return {x: loss + curvature * (x - optimum) ** 2 / 2.0 for x in GRID}


def fit_one(of: Curve) -> Minimum:
    return fit_minima([of])[0]


def test_a_parabola_without_noise_is_recovered() -> None:
    found = fit_one(curve(parabolic(-6.2, 0.08), offsets=(-0.01, 0.0, 0.04)))
    assert found.log2_lr.value == pytest.approx(-6.2, abs=1e-6)
    assert found.loss.value == pytest.approx(3.01, abs=1e-6)  # the mean of the seeds' levels
    assert found.curvature.value == pytest.approx(0.08, rel=1e-5)
    assert found.asymmetry == pytest.approx(0.0, abs=1e-4)
    assert (found.window, found.points, found.runs) == ((-8.0, -4.0), 5, 15)
    assert found.edge is None
    assert found.misfit is None


def test_a_steeper_right_side_does_not_move_the_optimum() -> None:
    """A plain parabola through these five points would put it 0.27 octaves too low."""
    k, h, v = 0.5, 0.08, -6.1
    losses = {x: 3.0 + h * (math.exp(k * (x - v)) - k * (x - v) - 1.0) / k**2 for x in GRID}
    found = fit_one(curve(losses, offsets=(0.0, 0.02)))
    assert found.log2_lr.value == pytest.approx(v, abs=1e-3)
    assert found.curvature.value == pytest.approx(h, rel=1e-3)
    assert found.asymmetry == pytest.approx(k, abs=5e-3)
    assert loss_at(found, -4.0) == pytest.approx(losses[-4.0] + 0.01, abs=1e-4)
    plain = np.polyfit(np.array(GRID), np.array(list(losses.values())), 2)
    assert -plain[1] / (2.0 * plain[0]) < v - 0.2


def test_the_interval_is_the_profile_likelihood_of_the_optimum() -> None:
    """Brute force: for each optimum the best curve of any asymmetry through it."""
    family = Family(shape=skewed(0.3), log2_lrs=GRID, noise=0.01, seed_effect=0.02)
    sweep = draw(family, np.random.default_rng(5))[0][0]
    found = fit_one(sweep)
    x, y = np.array(sweep.log2_lrs), np.array(sweep.losses)
    dummies = (np.array(sweep.seeds)[:, None] == np.arange(3)[None, :]).astype(float)

    def residual(columns: np.ndarray) -> float:
        fitted = columns @ np.linalg.lstsq(columns, y, rcond=None)[0]
        return float((y - fitted) @ (y - fitted))

    rates = (x[:, None] == np.array(GRID)[None, :]).astype(float)
    variance = residual(np.column_stack([dummies, rates])) / 8.0  # 15 runs - 3 - 5 + 1
    optima, ks = np.linspace(-7.5, -4.5, 301), np.linspace(-0.5, 1.0, 61)
    table = np.array(
        [
            [
                residual(
                    np.column_stack([dummies, (np.exp(k * (x - v)) - k * (x - v) - 1.0) / k**2])
                )
                for k in ks + 1e-5
            ]
            for v in optima
        ]
    ).min(axis=1)
    inside = optima[table - table.min() <= stats.t.ppf(0.95, 8) ** 2 * variance]
    assert found.noise == pytest.approx(math.sqrt(variance), rel=1e-9)
    assert found.log2_lr.low == pytest.approx(inside.min(), abs=0.015)
    assert found.log2_lr.high == pytest.approx(inside.max(), abs=0.015)


def wobbling(size: float, amount: float) -> Curve:
    """Two seeds, half a nat apart, that deviate from learning rate + seed by +-amount at two."""
    runs = []
    for seed in (0, 1):
        for x, y in parabolic(-6.0, 0.1).items():
            sign = {-8.0: 1.0, -4.0: -1.0}.get(x, 0.0) * (2 * seed - 1)
            runs.append((x, y + 0.5 * seed + sign * amount, seed))
    return Curve(
        size=size,
        log2_lrs=tuple(run[0] for run in runs),
        losses=tuple(run[1] for run in runs),
        seeds=tuple(run[2] for run in runs),
    )


def test_noise_is_pooled_over_sizes_and_ignores_the_seeds_levels() -> None:
    found = fit_minima([wobbling(64.0, 0.01), wobbling(128.0, 0.004)])
    # 4 runs of each deviate; each curve has (2 - 1) (5 - 1) degrees of freedom.
    pooled = math.sqrt(4 * (0.01**2 + 0.004**2) / 8.0)
    assert [one.noise for one in found] == pytest.approx([pooled] * 2)
    assert found[0].log2_lr.df == 8.0


def test_sizes_with_plainly_different_noise_keep_their_own() -> None:
    rng = np.random.default_rng(0)
    quiet = draw(Family(parabola, GRID, 0.002, 0.01), rng)[0][0]
    loud = draw(Family(parabola, GRID, 0.03, 0.01), rng)[0][1]
    found = fit_minima([quiet, loud])
    assert found[0].noise is not None
    assert found[1].noise is not None
    assert found[0].noise < 0.006 < 0.015 < found[1].noise
    assert any("noise differs" in note for note in found[0].notes)


def test_three_points_without_repeats_have_a_vertex_and_no_interval() -> None:
    found = fit_one(curve({-7.0: 3.1, -6.0: 3.0, -5.0: 3.3}))
    assert found.log2_lr.value == pytest.approx(-6.25)  # of the parabola through them
    assert found.log2_lr.low is None
    assert found.log2_lr.high is None
    assert found.log2_lr.reason == "interval not identifiable: 3 points, no repeats"
    assert found.noise is None


def test_one_seed_takes_the_noise_from_the_residuals_and_says_so() -> None:
    losses = parabolic(-6.0, 0.1)
    losses[-7.0] += 0.004
    found = fit_one(curve(losses))
    assert found.log2_lr.df == 1.0  # 5 runs - 3 coefficients - the asymmetry
    assert found.log2_lr.low is not None
    assert "no repeats" in found.notes[0]
    assert found.loss.low is None
    assert found.loss.reason is not None
    assert "one seed" in found.loss.reason


def test_sizes_share_one_asymmetry_until_repeats_show_that_they_differ() -> None:
    rng = np.random.default_rng(4)
    round_ones = draw(Family(skewed(0.05), GRID, 0.001, 0.01), rng)[0]
    steep_ones = draw(Family(skewed(0.8), GRID, 0.001, 0.01), rng)[0]
    alike, mixed = fit_minima(round_ones), fit_minima([*round_ones[:2], *steep_ones[2:]])
    assert len({one.asymmetry for one in alike}) == 1
    assert all(one.shared_error != 0.0 and not one.notes for one in alike)
    assert [one.asymmetry for one in mixed] == pytest.approx([0.05, 0.05, 0.8, 0.8], abs=0.2)
    assert all(one.shared_error == 0.0 for one in mixed)
    assert "asymmetry differs" in mixed[0].notes[0]


def test_repeats_are_worth_more_than_one_seed() -> None:
    family = Family(parabola, GRID, 0.01, 0.02)
    three = draw(family, np.random.default_rng(3))[0][:1]
    one = [
        Curve(size=32.0, log2_lrs=three[0].log2_lrs[:5], losses=three[0].losses[:5], seeds=(0,) * 5)
    ]
    width = [
        (found.log2_lr.high or 9.0) - (found.log2_lr.low or -9.0)
        for found in (fit_minima(three)[0], fit_minima(one)[0])
    ]
    assert width[0] < 0.5 * width[1]


def test_missing_seeds_at_the_outer_points_do_not_tilt_the_curve() -> None:
    """Seed 1 sits 0.2 nats lower and was run near the optimum only."""
    near = {x: y for x, y in parabolic(-6.3, 0.08).items() if -7.0 <= x <= -5.0}
    first, second = curve(parabolic(-6.3, 0.08)), curve(near, offsets=(-0.2,))
    both = Curve(
        size=64.0,
        log2_lrs=first.log2_lrs + second.log2_lrs,
        losses=first.losses + second.losses,
        seeds=(0,) * 5 + (1,) * 3,
    )
    found = fit_one(both)
    assert found.log2_lr.value == pytest.approx(-6.3, abs=1e-5)
    assert found.loss.value == pytest.approx(2.9, abs=1e-5)
    assert found.lowest == pytest.approx((-6.0, 3.0 - 0.1 + 0.08 * 0.09 / 2.0))


def test_a_flat_curve_is_not_identifiable() -> None:
    rng = np.random.default_rng(11)
    flat = draw(Family(lambda d: 0.0 * d, GRID, 0.02, 0.02), rng)[0]
    found = [one for one in fit_minima(flat) if one.edge is None]
    assert found
    for one in found:
        assert one.log2_lr.low is None or one.log2_lr.high is None
        assert one.log2_lr.reason is not None


def test_seeds_that_never_meet_count_as_noise() -> None:
    losses = {-8.0: 3.21, -7.0: 3.04, -6.0: 3.01, -5.0: 3.06, -4.0: 3.19}
    own = Curve(
        size=64.0, log2_lrs=tuple(losses), losses=tuple(losses.values()), seeds=(1, 2, 3, 4, 5)
    )
    found = fit_one(own)
    assert found.log2_lr.value == pytest.approx(-6.0, abs=0.2)
    assert any("counts as noise" in note for note in found.notes)


def test_a_shape_that_is_none_of_ours_is_reported_and_fitted_narrowly() -> None:
    """A narrow valley in a wide slope: half-octave grid, three seeds, little noise."""
    grid = tuple(np.arange(-8.0, -3.9, 0.5))
    family = Family(lambda d: np.minimum(d**2, 0.5 + 0.1 * np.abs(d)), grid, 0.001, 0.01)
    sweep, truth = draw(family, np.random.default_rng(2))
    for one, optimum in zip(fit_minima(sweep), truth.optima, strict=True):
        assert one.misfit is not None
        assert one.narrowed == ("only points within" in one.misfit)
        assert one.window[1] - one.window[0] <= 2.0
        assert one.log2_lr.value == pytest.approx(optimum, abs=0.3)


def test_columns_of_different_length_and_impossible_levels_are_refused() -> None:
    with pytest.raises(DataError, match=r"size 64: .* have 5, 5 and 1 entries"):
        fit_minima([Curve(size=64.0, log2_lrs=GRID, losses=(3.0,) * 5, seeds=(0,))])
    with pytest.raises(DataError, match=r"level = 1\.5"):
        fit_minima([], level=1.5)


def test_nothing_that_ended_well_is_said() -> None:
    found = fit_one(curve(dict.fromkeys(GRID, NAN)))
    assert found.log2_lr.value is None
    assert found.log2_lr.reason == "no learning rate at which every run ended well"
    assert (found.lowest, found.diverged, found.edge) == (None, 5, None)
