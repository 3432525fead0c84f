"""From rows to arms, curves and fits."""

import math

import pytest

from megatron_mup.errors import DataError
from megatron_mup.transfer.report.study import (
    curves_of,
    divergence_of,
    has_uneven_seeds,
    means_of,
    study_rows,
)
from megatron_mup.transfer.runs import Status
from tests.transfer.report.sample_rows import a_row, arm_rows


def test_a_curve_holds_the_runs_of_one_size_and_only_those_with_an_outcome():
    rows = [
        a_row(size=128.0, log2_lr=-5.0, validation_loss=2.5),
        a_row(size=64.0, log2_lr=-6.0, seed=1, validation_loss=3.0),
        a_row(size=64.0, log2_lr=-6.0, seed=2, validation_loss=3.2),
        a_row(size=64.0, log2_lr=-5.0, seed=1, status=Status.DIVERGED, validation_loss=math.nan),
        a_row(size=64.0, log2_lr=-4.0, status=Status.FAILED, validation_loss=math.nan),
        a_row(size=64.0, log2_lr=-3.0, status=Status.STOPPED_EARLY, validation_loss=math.nan),
    ]

    small, large = curves_of(rows)

    assert (small.size, small.log2_lrs, small.seeds) == (64.0, (-6.0, -6.0, -5.0), (1, 2, 1))
    assert small.losses[:2] == (3.0, 3.2)
    assert math.isnan(small.losses[2])
    assert (large.size, large.losses) == (128.0, (2.5,))


def test_a_diverged_run_has_no_loss_whatever_its_row_says():
    lost = a_row(status=Status.DIVERGED, validation_loss=2.0)
    infinite = a_row(seed=2, validation_loss=math.inf)

    (curve,) = curves_of([lost, infinite])

    assert all(math.isnan(loss) for loss in curve.losses)


def test_means_and_divergence_are_by_learning_rate():
    rows = [
        a_row(log2_lr=-4.0, seed=1, status=Status.DIVERGED, validation_loss=math.nan),
        a_row(log2_lr=-4.0, seed=2, validation_loss=4.0),
        a_row(log2_lr=-5.0, seed=1, validation_loss=3.0),
        a_row(log2_lr=-5.0, seed=2, validation_loss=3.5),
    ]

    (curve,) = curves_of(rows)

    # The seed that is left at -4 lies 0.25 above the mean of both at -5.
    assert means_of(curve) == [(-5.0, 3.25), (-4.0, pytest.approx(3.75))]
    assert divergence_of(curve) == [(-4.0, 1, 2)]


def test_means_without_some_seeds_are_corrected_for_the_levels_of_the_others():
    losses = {1: {-7.0: 3.2, -6.0: 3.1, -5.0: 3.3}, 2: {-6.0: 2.8}, 3: {-6.0: 3.1}}
    rows = [
        a_row(log2_lr=at, seed=seed, validation_loss=loss)
        for seed, by_rate in losses.items()
        for at, loss in by_rate.items()
    ]

    (curve,) = curves_of(rows)

    # At -6 the mean is 3.0, and seed 1, which alone ran at -7 and -5, lies 0.1 above it.
    assert means_of(curve) == [
        (-7.0, pytest.approx(3.1)),
        (-6.0, pytest.approx(3.0)),
        (-5.0, pytest.approx(3.2)),
    ]
    assert has_uneven_seeds(curve)


def test_seeds_may_meet_through_others():
    # Loss of each learning rate plus level of each seed, without noise.
    rates, levels = {-7.0: 3.2, -6.0: 3.0, -5.0: 3.3}, {1: 0.1, 2: 0.0, 3: -0.1}
    ran = ((-7.0, 1), (-7.0, 2), (-6.0, 2), (-6.0, 3), (-5.0, 1))
    rows = [
        a_row(log2_lr=at, seed=seed, validation_loss=rates[at] + levels[seed]) for at, seed in ran
    ]

    (curve,) = curves_of(rows)

    assert dict(means_of(curve)) == pytest.approx(rates)


def test_seeds_that_never_meet_correct_nothing():
    rows = [
        a_row(log2_lr=at, seed=seed, validation_loss=loss)
        for at, seed, loss in ((-7.0, 1, 3.2), (-6.0, 2, 3.0), (-6.0, 3, 3.2), (-5.0, 1, 3.3))
    ]

    (curve,) = curves_of(rows)

    assert means_of(curve) == [(-7.0, 3.2), (-6.0, pytest.approx(3.1)), (-5.0, 3.3)]


def test_seeds_that_all_ran_everywhere_need_no_correction():
    (curve,) = curves_of(arm_rows("mup", optimum=-6, sizes=(64,)))

    assert not has_uneven_seeds(curve)


def test_arms_keep_the_order_of_the_rows_and_values_of_further_axes_are_sorted_as_numbers():
    grid = {"sizes": (64, 128), "seeds": (1,)}
    rows = [
        row
        for arm in ("sp", "mup")
        for value in ("10", "9")
        for row in arm_rows(arm, optimum=-6, settings={"optimizer.power": value}, **grid)
    ]

    study = study_rows(rows)

    assert [arm.name for arm in study.arms] == [
        "sp, power 9",
        "sp, power 10",
        "mup, power 9",
        "mup, power 10",
    ]
    assert study.further_axes == {"optimizer.power": ("9", "10")}
    assert [len(arm.rows) for arm in study.arms] == [14, 14, 14, 14]


def test_every_arm_is_fitted_and_predicted_up_to_twice_the_largest_size():
    study = study_rows(arm_rows("mup", optimum=-5.6, shift=-0.2))

    (arm,) = study.arms
    assert study.sizes == (64, 128, 256, 512)
    assert study.next_size == 1024
    assert [m.log2_lr.value for m in arm.minima] == pytest.approx(
        [-5.6, -5.8, -6.0, -6.2], abs=0.15
    )
    assert (arm.predictions[0][0], arm.predictions[-1][0]) == (64, 1024)
    assert arm.predictions[-1][1].value == pytest.approx(-6.4, abs=0.3)
    assert study.comparison.asymptotic_penalty.keys() == {"mup"}


def test_the_zero_shot_penalty_names_its_sizes_where_all_arms_have_them():
    same = study_rows(arm_rows("mup", optimum=-6))
    other = study_rows(arm_rows("mup", optimum=-6) + arm_rows("sp", optimum=-6, sizes=(64, 128)))

    assert same.zero_shot == "width 512 at the optimum of 64"
    assert other.zero_shot == "the largest width at the optimum of the smallest"


@pytest.mark.parametrize(
    ("rows", "level", "words"),
    [
        ([], 0.9, "no runs to report"),
        ([a_row(), a_row(axis="depth", size=2.0)], 0.9, "the runs scale depth and width"),
        ([a_row(status=Status.FAILED)] * 3, 0.9, "none of the 3 runs finished or diverged"),
        ([a_row()], 1.0, "--level 1.0 is no probability"),
    ],
)
def test_what_cannot_be_reported_is_refused(rows, level, words):
    with pytest.raises(DataError, match=words):
        study_rows(rows, level=level)


def test_a_verdict_speaks_of_what_was_scaled() -> None:
    rows = [
        a_row(axis="depth", size=size, log2_lr=rate, validation_loss=3.0 + 0.1 * (rate + 5) ** 2)
        for size in (2.0, 4.0)
        for rate in (-7.0, -6.0, -5.0, -4.0, -3.0)
    ]
    (arm,) = study_rows(rows).arms
    assert "the smallest depth's best learning rate" in arm.verdict.because
    assert "width" not in arm.verdict.because
