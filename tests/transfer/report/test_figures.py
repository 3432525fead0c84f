"""The figures, read back from matplotlib: what they show, and that no words collide or are cut."""

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from megatron_mup.transfer.fits import Estimate
from megatron_mup.transfer.report.figure_arms import draw_arms
from megatron_mup.transfer.report.figure_axes import draw_axis
from megatron_mup.transfer.report.figure_curves import LossScale, draw_curves
from megatron_mup.transfer.report.figure_optima import draw_estimate, draw_optima
from megatron_mup.transfer.report.figure_style import (
    Mark,
    arm_marks,
    arrow_up,
    new_figure,
    size_marks,
    style,
    write_figure,
)
from megatron_mup.transfer.report.study import Study, study_rows
from megatron_mup.transfer.runs import Status
from tests.transfer.report.drawn import cut_off, laid_out, overlaps, points_of, words_of
from tests.transfer.report.sample_rows import arm_rows, two_arms

OPTION = "parameterization.embedding_lr_exponent"


def drawn(draw: Callable[[], Any]) -> Any:
    with style():
        return laid_out(draw())


@pytest.fixture(scope="module")
def study() -> Study:
    """Two arms of four widths, with diverged runs and minima at the edge."""
    return study_rows(two_arms())


@pytest.fixture(scope="module")
def wide_study() -> Study:
    """Two variants at three values of a further axis."""
    rows = []
    for value, best in (("0", -5.5), ("0.5", -5.2), ("1", -4.6)):
        for arm, shift in (("mup", 0.0), ("a variant of a rather long name", -0.7)):
            setting = {OPTION: value}
            rows += arm_rows(arm, optimum=best, shift=shift, settings=setting, seeds=(1, 2))
    return study_rows(rows)


FIGURES: dict[str, Callable[[Study], Any]] = {
    "curves": draw_curves,
    "optima": draw_optima,
    "arms": draw_arms,
}


@pytest.mark.parametrize("name", FIGURES)
def test_no_words_collide_or_are_cut(study, name):
    figure = drawn(lambda: FIGURES[name](study))

    assert list(overlaps(figure)) == []
    assert cut_off(figure) == []
    assert len(words_of(figure)) > 8


@pytest.mark.parametrize("name", [*FIGURES, "axis"])
def test_no_words_collide_or_are_cut_with_six_arms_of_long_names(wide_study, name):
    draw = FIGURES.get(name, lambda study: draw_axis(study, OPTION))

    figure = drawn(lambda: draw(wide_study))

    assert list(overlaps(figure)) == []
    assert cut_off(figure) == []


def test_every_panel_of_the_curves_has_its_arm_on_common_axes(study):
    figure = drawn(lambda: draw_curves(study))

    left, right = figure.axes
    assert [panel.get_title() for panel in (left, right)] == ["mup", "sp"]
    assert left.get_ylim() == right.get_ylim()
    assert left.get_xlim() == right.get_xlim() == (-9.75, -2.25)
    assert left.get_xlabel() == right.get_xlabel() == "log2 learning rate"
    assert left.get_ylabel() == "validation loss (nats per token)"
    legend = {"width 64", "width 512", "minimum, 90% interval", "diverged (thin: some)"}
    assert legend <= words_of(figure)


def test_diverged_runs_are_crosses_above_the_losses_one_row_a_size(study):
    figure = drawn(lambda: draw_curves(study))

    crosses = points_of(figure.axes[0], "x")
    # muP's optimum is at -5.6, and runs 2.3 octaves above it diverge, seed 3 at 2.7.
    assert {x for x, _ in crosses} == {-3.0}
    assert len({y for _, y in crosses}) == 4
    assert min(y for _, y in crosses) > LossScale(study.arms).top
    marks = [line for line in figure.axes[0].lines if line.get_marker() == "x"]
    weights = {line.get_markeredgewidth() for line in marks}
    assert min(weights) < 1 < max(weights)


def test_minima_are_diamonds_at_the_fitted_optima(study):
    figure = drawn(lambda: draw_curves(study))

    diamonds = points_of(figure.axes[0], "d")
    minima = sorted(study.arms[0].minima, key=lambda minimum: minimum.log2_lr.value)
    assert [x for x, _ in diamonds] == pytest.approx([m.log2_lr.value for m in minima])
    assert [y for _, y in diamonds] == pytest.approx([m.loss.value for m in minima])


def test_a_run_far_above_the_others_does_not_squeeze_the_curves():
    rows = arm_rows("mup", optimum=-6.0, sizes=(64,), log2_lrs=(-9, -8, -7, -6, -5, -4, 6))

    figure = drawn(lambda: draw_curves(study_rows(rows)))

    (panel,) = figure.axes
    # The parabola reaches 2 octaves from the optimum: 0.03 x 4 above the lowest, 3.41.
    assert panel.get_ylim()[1] < 4.0


@pytest.mark.parametrize("steepness", [0.3, 1.0, 2.2, 7.0])
def test_the_numbers_of_the_losses_stand_at_their_places(steepness):
    rows = arm_rows("mup", optimum=-6, sizes=(64,), seeds=(1,))
    rows = [replace(row, validation_loss=row.validation_loss * steepness) for row in rows]

    figure = drawn(lambda: draw_curves(study_rows(rows)))

    (panel,) = figure.axes
    *numbers, strip = (text.get_text() for text in panel.get_yticklabels())
    shown = [float(number) for number in numbers]
    assert len(shown) > 3
    assert shown == pytest.approx(list(panel.get_yticks())[:-1])
    # 3 octaves above the optimum the loss is higher than the fit's points by more than the axis is.
    assert strip == "above"


def test_means_above_the_axis_have_a_mark_and_a_row_of_their_own():
    rates = tuple(range(-11, 0))
    rows = arm_rows("mup", optimum=-7.5, log2_lrs=rates, diverges_above=6.0)
    study = study_rows(rows)

    figure = drawn(lambda: draw_curves(study))

    (panel,) = figure.axes
    arrows = points_of(panel, arrow_up())
    # 0.03 x 4.5^2 x 1.45 = 0.88 nats above the lowest of width 64, whose loss is the highest.
    assert [at for at, _ in arrows] == [-3.0, -2.0, -2.0, -2.0, -2.0]
    assert len({height for _, height in arrows}) == 4
    assert min(height for _, height in arrows) > LossScale(study.arms).top
    crosses = points_of(panel, "x")
    assert {at for at, _ in crosses} == {-1.0}
    assert {height for _, height in crosses} == {height for _, height in arrows}
    assert {"mean above the axis", "diverged (thin: some)", "off scale"} <= words_of(figure)
    assert arrow_up() not in {mark.marker for mark in size_marks(range(1, 30)).values()}


def test_an_arrow_stands_beside_the_cross_of_the_same_size_and_rate():
    rows = arm_rows("mup", optimum=-7.5, log2_lrs=tuple(range(-11, -1)), sizes=(64,))
    lost = {"status": Status.DIVERGED, "validation_loss": math.nan}
    rows = [replace(row, **lost) if (row.log2_lr, row.seed) == (-2, 1) else row for row in rows]

    figure = drawn(lambda: draw_curves(study_rows(rows)))

    (panel,) = figure.axes
    arrow, cross = (
        line.get_transform().transform(line.get_xydata())[0]
        for marker in (arrow_up(), "x")
        for line in panel.lines
        if line.get_marker() == marker and list(line.get_xdata()) == [-2]
    )
    # In pixels; the cross is 4.5 points to the right.
    assert cross - arrow == pytest.approx([4.5 * figure.dpi / 72, 0])


def test_where_every_run_diverged_the_losses_have_no_numbers():
    lost = {"status": Status.DIVERGED, "validation_loss": math.nan}

    figure = drawn(lambda: draw_curves(study_rows(arm_rows("mup", optimum=-6, **lost))))

    assert [text.get_text() for text in figure.axes[0].get_yticklabels()] == ["diverged"]


def test_an_estimate_without_a_value_is_drawn_by_its_bounds():
    mark = Mark("black", "o")
    with style():
        figure = new_figure(3, 3)
        panel = figure.subplots()
        draw_estimate(panel, 1.0, Estimate(value=None, reason="nothing"), mark)
        assert (len(panel.lines), len(panel.texts)) == (0, 0)
        draw_estimate(panel, 1.0, Estimate(value=None, low=-3.0, reason="edge"), mark)
        assert points_of(panel, "o") == [(1.0, -3.0)]
        assert len(panel.texts) == 1
        draw_estimate(panel, 2.0, Estimate(value=None, low=-3.0, high=-2.0, reason="r"), mark)
        assert points_of(panel, "_") == [(2.0, -3.0), (2.0, -2.0)]
        draw_estimate(panel, 3.0, Estimate(value=-5.0, low=-6.0, high=-4.0), mark)
        assert points_of(panel, "o") == [(1.0, -3.0), (3.0, -5.0)]
        assert points_of(panel, "_")[2:] == [(3.0, -6.0), (3.0, -4.0)]
        draw_estimate(panel, 4.0, Estimate(value=-5.0, high=-4.0, reason="flat"), mark)
        assert points_of(panel, "_")[4:] == [(4.0, -4.0)]
        assert len(panel.texts) == 2


def test_the_optima_reach_to_a_size_that_was_not_run(study):
    figure = drawn(lambda: draw_optima(study))

    (panel,) = figure.axes
    shown = {"64", "512", "1,024", "width (hidden size)", "optimal log2 learning rate"}
    assert shown <= words_of(figure)
    assert panel.get_xscale() == "log"
    assert any("predicted" in words for words in words_of(figure))


def test_the_axis_figure_has_a_column_for_each_variant(wide_study):
    figure = drawn(lambda: draw_axis(wide_study, OPTION))

    titles = [panel.get_title() for panel in figure.axes[:2]]
    assert titles == ["mup", "a variant of a rather long name"]
    assert {"0", "0.5", "1", "embedding_lr_exponent"} <= words_of(figure)


def test_marks_differ_by_more_than_color():
    sizes = size_marks([2.0**power for power in range(6, 13)])
    arms = arm_marks([f"arm {index}" for index in range(16)])

    assert len({mark.marker for mark in sizes.values()}) == 7
    assert len({(mark.marker, mark.line) for mark in arms.values()}) == 16
    # Rec. 709 luma: sizes darken from first to last, so they can be told in grey.
    luma = [
        0.2126 * r + 0.7152 * g + 0.0722 * b for r, g, b, _ in (m.color for m in sizes.values())
    ]
    assert luma == sorted(luma, reverse=True)
    assert luma[0] < 0.75


def test_files_are_text_and_paper_sized_pictures_and_equal_each_time(study, tmp_path: Path):
    first = write_figure(lambda: draw_optima(study), tmp_path, "optima")
    second = write_figure(lambda: draw_optima(study), tmp_path, "optima")

    assert first == second == (tmp_path / "optima.svg").read_text(encoding="utf-8")
    assert ">optimal log2 learning rate</text>" in first
    with Image.open(tmp_path / "optima.png") as picture:
        assert picture.width >= 1000
        assert len(picture.convert("RGB").getcolors(1 << 24) or []) > 20


def test_a_name_with_a_dollar_sign_or_an_underscore_in_front_is_shown_as_it_is(tmp_path: Path):
    study = study_rows(arm_rows("_$x$", optimum=-6, sizes=(64, 128)))

    figure = drawn(lambda: draw_optima(study))

    assert " _$x$" in words_of(figure)


def test_drawing_leaves_no_setting_behind():
    import matplotlib as mpl

    with mpl.rc_context({"font.size": 11.0}):
        with style():
            assert mpl.rcParams["svg.fonttype"] == "none"
        assert mpl.rcParams["font.size"] == 11.0
