"""Figure: arms side by side: best loss against size, and the price of the smallest's optimum.

Must not fit anything: losses and penalties are drawn as the fits give them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from megatron_mup.transfer.fits import Estimate
from megatron_mup.transfer.report.figure_optima import (
    draw_arrow,
    draw_estimate,
    legend_of_arms,
)
from megatron_mup.transfer.report.figure_style import (
    WIDTH,
    Mark,
    arm_marks,
    axis_label,
    legend_above,
    new_figure,
    size_axis,
    wrapped,
)
from megatron_mup.transfer.report.study import Study


def draw_arms(study: Study) -> Any:
    """Best loss of every size, and the zero-shot penalty at the largest.

    Args:
        study: with at least one arm.

    Returns:
        A figure of matplotlib.
    """
    names = [arm.name for arm in study.arms]
    labels = [wrapped(name, 27) for name in names]
    lines = sum(label.count("\n") + 1.6 for label in labels)
    figure = new_figure(WIDTH, max(3.0, 1.0 + 0.15 * lines))
    left, right = figure.subplots(1, 2, width_ratios=(1.25, 1))
    marks = arm_marks(names)
    for arm in study.arms:
        mark = marks[arm.name]
        known = [(m.size, m.loss.value) for m in arm.minima if m.loss.value is not None]
        if known:
            left.plot(*zip(*known, strict=True), ls=mark.line, lw=0.9, color=mark.color)
        for minimum in arm.minima:
            draw_estimate(left, minimum.size, minimum.loss, mark)
    size_axis(left, study.sizes, axis_label(study.axis))
    left.set_xlim(study.sizes[0] / 1.3, study.sizes[-1] * 1.3)
    left.set_ylabel("best loss (nats per token)")
    # Room for the arrows of bounds, whose length is no part of the data.
    left.margins(y=0.15)
    left.grid(True)
    _draw_penalties(right, study, labels)
    legend_above(figure, legend_of_arms(names))
    return figure


def _draw_penalties(panel: Any, study: Study, labels: Sequence[str]) -> None:
    """One line an arm, from top to bottom."""
    import matplotlib.ticker

    marks = arm_marks([arm.name for arm in study.arms])
    for place, arm in enumerate(study.arms):
        penalty = arm.transfer.zero_shot_penalty
        _draw_penalty(panel, place, penalty, marks[arm.name])
    panel.axvline(0, color="0.3", lw=0.8)
    panel.set_yticks(range(len(study.arms)), labels)
    panel.set_ylim(len(study.arms) - 0.4, -0.6)
    panel.set_xlabel(
        f"zero-shot penalty (nats per token)\n{wrapped(study.zero_shot, 34)}",
        # Beside long names the panel is narrower than its label; there is room on the left.
        loc="right" if max(map(len, labels)) > 20 else "center",
    )
    panel.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(4))
    # Room for the arrows of bounds.
    panel.margins(x=0.24)
    panel.grid(True, axis="x")


def _draw_penalty(panel: Any, place: int, penalty: Estimate, mark: Mark) -> None:
    bar = {"color": mark.color, "lw": 1.6}
    point = {"ls": "", "marker": mark.marker, "ms": 6, "mec": mark.color, "zorder": 4}
    if penalty.value is not None:
        low = penalty.low if penalty.low is not None else penalty.value
        high = penalty.high if penalty.high is not None else penalty.value
        panel.plot([low, high], [place, place], **bar)
        panel.plot([penalty.value], [place], mfc=mark.color, **point)
    elif penalty.low is not None:
        panel.plot([penalty.low], [place], mfc="white", **point)
        draw_arrow(panel, (penalty.low, place), mark, offset=(24, 0))
    else:
        panel.text(
            0.98,
            place,
            "not identifiable",
            transform=panel.get_yaxis_transform(),
            ha="right",
            va="center",
            fontsize=8,
            color="0.35",
        )
