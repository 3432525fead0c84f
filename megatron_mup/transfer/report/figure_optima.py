"""Figure: the optimum against size, all arms, with the prediction beyond the largest size.

Must not fit anything: predictions and intervals are drawn as the fits give them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from megatron_mup.transfer.fits import Estimate
from megatron_mup.transfer.report.figure_style import (
    Mark,
    arm_marks,
    axis_label,
    legend_above,
    legend_label,
    new_figure,
    size_axis,
)
from megatron_mup.transfer.report.study import Arm, Study


def draw_optima(study: Study) -> Any:
    """Optimal log2 LR against size, with intervals, bounds and predictions.

    Args:
        study: with at least one arm.

    Returns:
        A figure of matplotlib.
    """
    figure = new_figure(5.4, 3.5)
    panel = figure.subplots()
    names = [arm.name for arm in study.arms]
    marks = arm_marks(names)
    for arm, offset in zip(study.arms, _dodges(len(names)), strict=True):
        mark = marks[arm.name]
        _draw_prediction(panel, arm, mark, offset)
        for minimum in arm.minima:
            draw_estimate(panel, minimum.size * offset, minimum.log2_lr, mark)
    predicted = any(_known(arm.predictions[-1][1]) for arm in study.arms)
    sizes = [*study.sizes, *([study.next_size] if predicted else [])]
    size_axis(panel, sizes, axis_label(study.axis))
    panel.set_xlim(sizes[0] / 1.3, sizes[-1] * 1.3)
    if predicted:
        _mark_extrapolation(panel, study)
    panel.set_ylabel("optimal log2 learning rate")
    # Room for the arrows of bounds, whose length is no part of the data.
    panel.margins(y=0.12)
    panel.grid(True)
    legend_above(figure, legend_of_arms(names))
    return figure


def _dodges(count: int) -> list[float]:
    """Factors on a logarithmic axis that set arms beside each other, all within a few percent."""
    step = min(0.045, 0.12 / count)
    return [math.exp(step * (index - (count - 1) / 2)) for index in range(count)]


def legend_of_arms(names: Sequence[str]) -> list[Any]:
    """A handle for each arm."""
    from matplotlib.lines import Line2D

    return [
        Line2D(
            [],
            [],
            color=mark.color,
            marker=mark.marker,
            ms=5,
            ls=mark.line,
            label=legend_label(name),
        )
        for name, mark in arm_marks(names).items()
    ]


def draw_estimate(panel: Any, at: float, estimate: Estimate, mark: Mark) -> None:
    """A point with its interval; without a value a dotted bar, or an arrow from the one bound.

    Args:
        panel: of matplotlib.
        at: horizontal position.
        estimate: to draw; nothing is drawn of one without value and bounds.
        mark: how.
    """
    if estimate.value is None and estimate.low is not None and estimate.high is not None:
        ends = [estimate.low, estimate.high]
        style = {"ls": (0, (1, 1.5)), "marker": "_", "ms": 7, "mew": 1.3}
        panel.plot([at, at], ends, color=mark.color, **style)
        return
    if estimate.value is None:
        for bound, up in ((estimate.low, True), (estimate.high, False)):
            if bound is not None:
                _draw_bound(panel, at, bound, mark, up=up)
        return
    panel.plot([at], [estimate.value], ls="", marker=mark.marker, ms=5, color=mark.color, zorder=4)
    ends = [end for end in (estimate.low, estimate.high) if end is not None]
    bar: dict[str, Any] = {"color": mark.color, "lw": 1.3, "zorder": 3}
    if len(ends) == 1:
        # One end is known: towards the other the interval has no bound.
        draw_arrow(
            panel, (at, estimate.value), mark, offset=(0, 20 if estimate.high is None else -20)
        )
    for end in ends:
        panel.plot([at, at], [estimate.value, end], **bar)
        panel.plot([at], [end], ls="", marker="_", ms=6, mew=1.3, color=mark.color)


def _draw_bound(panel: Any, at: float, bound: float, mark: Mark, *, up: bool) -> None:
    # An arrow of fixed length: how far away the value lies is not known.
    draw_arrow(panel, (at, bound), mark, offset=(0, 20 if up else -20))
    panel.plot(
        [at], [bound], ls="", marker=mark.marker, ms=5, mfc="white", mec=mark.color, zorder=4
    )


def draw_arrow(
    panel: Any, start: tuple[float, float], mark: Mark, *, offset: tuple[float, float]
) -> None:
    """An arrow of a length that the scale of the axes does not change.

    Args:
        panel: of matplotlib.
        start: in data coordinates.
        mark: its color.
        offset: of the tip, points.
    """
    # Matplotlib measures in points only from the text's end, so the head is put there.
    arrow = {"arrowstyle": "<|-", "color": mark.color, "lw": 1.3, "shrinkA": 0, "shrinkB": 0}
    panel.annotate("", start, xytext=offset, textcoords="offset points", arrowprops=arrow)


def _draw_prediction(panel: Any, arm: Arm, mark: Mark, offset: float) -> None:
    known = [
        (size, found.value, found.low, found.high)
        for size, found in arm.predictions
        if found.value is not None and found.low is not None and found.high is not None
    ]
    if not known:
        return
    sizes, values, lows, highs = zip(*known, strict=True)
    panel.plot(sizes, values, ls=mark.line, lw=1.1, color=mark.color)
    panel.fill_between(sizes, lows, highs, color=mark.color, alpha=0.14, lw=0)
    last_size, last = arm.predictions[-1]
    if _known(last):
        draw_estimate(panel, last_size * offset, last, mark)
        hollow = {"ls": "", "ms": 5, "mfc": "white", "mec": mark.color, "zorder": 5}
        panel.plot([last_size * offset], [last.value], marker=mark.marker, **hollow)


def _known(estimate: Estimate) -> bool:
    return None not in (estimate.value, estimate.low, estimate.high)


def _mark_extrapolation(panel: Any, study: Study) -> None:
    start = (study.sizes[-1] * study.next_size) ** 0.5
    panel.axvspan(start, study.next_size * 4, color="0.94", lw=0, zorder=0)
    panel.text(
        start,
        1.0,
        "  predicted",
        transform=panel.get_xaxis_transform(),
        ha="left",
        va="bottom",
        fontsize=7.5,
        color="0.35",
    )
