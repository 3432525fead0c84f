"""What a reader is warned of."""

import math
from collections.abc import Sequence
from dataclasses import replace

from megatron_mup.transfer.fits import Estimate, Minimum
from megatron_mup.transfer.report.cautions import arm_cautions, minimum_notes, study_cautions
from megatron_mup.transfer.report.study import Arm, Study, study_rows
from megatron_mup.transfer.runs import Row, Status
from tests.transfer.report.sample_rows import a_row, arm_rows


def the_arm(rows: Sequence[Row]) -> Arm:
    (arm,) = study_rows(rows).arms
    return arm


def said(rows: Sequence[Row]) -> str:
    return "\n".join(arm_cautions(the_arm(rows), "width"))


def test_good_runs_give_no_cause_for_warnings():
    study = study_rows(arm_rows("mup", optimum=-5.6))

    assert study_cautions(study) == []
    assert arm_cautions(study.arms[0], "width") == []


def test_an_edge_is_said_with_its_side_and_its_sizes():
    rises = arm_rows("mup", optimum=-5.6, shift=1.2)
    falls = arm_rows("mup", optimum=-6.4, shift=-1.2)

    assert (
        "the lowest loss at width 256 and 512 is at the highest usable learning rate: the optimum "
        "may lie above it"
    ) in said(rises)
    assert (
        "the lowest loss at width 256 and 512 is at the lowest usable learning rate: the optimum "
        "may lie below it"
    ) in said(falls)


def test_an_optimum_that_the_noise_hides_is_said():
    rows = arm_rows("mup", optimum=-6, noise=0.5, sizes=(64, 128), seeds=(1, 2))

    arm = the_arm(rows)

    hidden = [m.size for m in arm.minima if m.log2_lr.value is None and m.edge is None]
    assert hidden == [64]
    assert "the runs at width 64 do not tell where the optimum lies" in arm_cautions(arm, "width")


def test_one_seed_and_three_points_are_said():
    rows = arm_rows("mup", optimum=-6, seeds=(1,), log2_lrs=(-7, -6, -5), sizes=(64, 128))

    text = said(rows)

    assert "one seed at width 64 and 128" in text
    assert "the fit at width 64 and 128 has fewer than 4 learning rates" in text
    (first, _) = the_arm(rows).minima
    notes = minimum_notes(the_arm(rows), first)
    assert "one seed" in notes
    assert "3 learning rates in the fit: nothing is left to test it" in notes


def test_unknown_seeds_are_not_called_one_seed():
    rows = arm_rows("theirs", optimum=-6, seeds=(1, 1, 1), sizes=(64, 128))

    (arm,) = study_rows(rows, seeds_known=False).arms

    text = "\n".join([*arm_cautions(arm, "width"), *minimum_notes(arm, arm.minima[0])])
    assert "the seeds at width 64 and 128 are not known (--column seed=NAME names" in text
    assert "seeds not known, so that the loss has no interval" in text
    assert "one seed" not in text


def test_a_learning_rate_that_a_diverged_seed_takes_out_of_the_fit_is_named():
    lost = {"status": Status.DIVERGED, "validation_loss": math.nan}
    rows = arm_rows("mup", optimum=-6, sizes=(64,))
    rows = [
        replace(row, **lost) if (row.log2_lr, row.seed) in ((-4, 2), (-4, 3), (-8, 1)) else row
        for row in rows
    ]

    arm = the_arm(rows)

    notes = minimum_notes(arm, arm.minima[0])
    assert (
        "1 of 3 seeds diverged at 2^-8 and 2 of 3 seeds diverged at 2^-4: these learning rates are "
        "left out of the fit"
    ) in notes
    assert "2^-9 and 2^-3: left out of the fit, as runs nearer to the lowest loss diverged" in notes
    # What is said is what the fit does: -7, -6 and -5 remain, with three seeds.
    assert (arm.minima[0].points, arm.minima[0].runs) == (3, 9)


def test_learning_rates_beyond_all_others_at_which_all_diverged_need_no_word():
    lost = {"status": Status.DIVERGED, "validation_loss": math.nan}
    rows = arm_rows("mup", optimum=-6, sizes=(64,))
    rows = [replace(row, **lost) if row.log2_lr > -4 else row for row in rows]

    arm = the_arm(rows)

    assert not [note for note in minimum_notes(arm, arm.minima[0]) if "left out" in note]


def test_one_diverged_seed_is_said_in_the_singular():
    rows = arm_rows("mup", optimum=-6, sizes=(64,))
    lost = {"status": Status.DIVERGED, "validation_loss": math.nan}
    rows = [replace(row, **lost) if (row.log2_lr, row.seed) == (-3, 1) else row for row in rows]

    (arm,) = study_rows(rows).arms
    (unknown,) = study_rows(rows, seeds_known=False).arms

    said = "1 of 3 seeds diverged at 2^-3: that learning rate is left out of the fit"
    assert said in minimum_notes(arm, arm.minima[0])
    assert said.replace("seeds", "runs") in minimum_notes(unknown, unknown.minima[0])


def test_a_size_of_which_every_run_diverged_or_failed_is_said():
    lost = {"status": Status.DIVERGED, "validation_loss": math.nan}
    gone = {"status": Status.FAILED, "validation_loss": math.nan}
    rows = arm_rows("mup", optimum=-6, sizes=(64, 128))
    rows += arm_rows("mup", optimum=-6, sizes=(256,), **lost)
    rows += arm_rows("mup", optimum=-6, sizes=(512,), **gone)

    arm = the_arm(rows)

    assert "no run at width 256 and 512 has a final loss" in arm_cautions(arm, "width")
    assert "every run diverged" in minimum_notes(arm, arm.minima[2])


def test_runs_without_a_final_loss_are_counted_beside_their_curve():
    rows = arm_rows("mup", optimum=-6, sizes=(64,))
    rows += [
        a_row(log2_lr=-2.0, seed=seed, status=status, validation_loss=math.nan)
        for seed, status in ((1, Status.FAILED), (2, Status.FAILED), (3, Status.STOPPED_EARLY))
    ]

    arm = the_arm(rows)

    assert {"2 runs failed", "1 run stopped early"} <= set(minimum_notes(arm, arm.minima[0]))


def test_runs_that_are_no_repeats_of_each_other_are_said():
    rows = arm_rows("mup", optimum=-6, sizes=(64, 128), seeds=(1, 2))
    rows += arm_rows("mup", optimum=-6, sizes=(64,), seeds=(3,), planned_steps=900)

    assert (
        "runs at width 64 mix step counts (500, 900): a curve should differ in learning rate and "
        "seed alone"
    ) in said(rows)


def test_arms_with_other_tokens_or_data_are_not_compared_in_silence():
    rows = arm_rows("mup", optimum=-6, sizes=(64,))
    rows += arm_rows("sp", optimum=-6, sizes=(64,), tokens=4_096_000, data_sha256="e" * 64)

    text = "\n".join(study_cautions(study_rows(rows)))

    assert "finished runs of width 64 were trained on different numbers of tokens" in text
    assert "(2,048,000, 4,096,000)" in text
    assert "arms or sizes used different data (dddddddddddd, eeeeeeeeeeee)" in text


def test_an_arm_without_any_outcome_is_left_out_and_said():
    gone = {"status": Status.FAILED, "validation_loss": math.nan}
    rows = arm_rows("mup", optimum=-6) + arm_rows("sp", optimum=-6, **gone)

    study = study_rows(rows)

    assert [arm.name for arm in study.arms] == ["mup"]
    assert study_cautions(study) == ["none of the runs of sp finished or diverged: it is left out"]
    assert len(study.rows) == 168


def test_a_misfit_and_what_the_fit_notes_stand_in_the_table():
    arm = the_arm(arm_rows("mup", optimum=-6, sizes=(64,)))
    known = Estimate(value=1.0, low=0.0, high=2.0)
    minimum = Minimum(
        size=64,
        log2_lr=known,
        loss=known,
        curvature=Estimate(value=None, reason="too flat"),
        edge=None,
        window=(-7, -5),
        points=5,
        runs=15,
        diverged=0,
        noise=None,
        misfit="the points bend",
        lowest=(-6.0, 3.0),
        notes=("noise from residuals",),
    )

    assert minimum_notes(arm, minimum) == ["the points bend", "noise from residuals", "too flat"]


def test_a_study_of_one_arm_needs_no_comparison():
    study: Study = study_rows([a_row(log2_lr=at) for at in (-7.0, -6.0, -5.0)])

    assert study_cautions(study) == []
