"""Figure: optimum and best loss against the values of one further axis.

Must not fit anything: optima and losses are drawn as the fits give them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from megatron_mup.transfer.fits import Estimate
from megatron_mup.transfer.report.figure_optima import draw_estimate
from megatron_mup.transfer.report.figure_style import (
    WIDTH,
    Mark,
    legend_above,
    new_figure,
    size_marks,
    wrapped,
)
from megatron_mup.transfer.report.study import Arm, Study, short_option
from megatron_mup.transfer.report.wording import size_text


def draw_axis(study: Study, option: str) -> Any:
    """Optimum (top) and best loss (bottom) against an option's values, a column for each variant.

    Args:
        study: with this further axis.
        option: its name.

    Returns:
        A figure of matplotlib.
    """
    from matplotlib.lines import Line2D

    groups = _groups(study, option)
    values = study.further_axes[option]
    figure = new_figure(max(4.6, min(1.4 * WIDTH, 3.4 * len(groups))), 5.0)
    panels = figure.subplots(2, len(groups), sharex=True, sharey="row", squeeze=False)
    marks = size_marks(study.sizes)
    for column, (name, arms) in enumerate(groups.items()):
        places = [(values.index(arm.settings[option]), arm) for arm in arms]
        _draw_column(panels[:, column], places, marks)
        if len(groups) > 1:
            panels[0, column].set_title(wrapped(name, 34))
        _label_values(panels[1, column], option, values)
    panels[0, 0].set_ylabel("optimal log2 learning rate")
    panels[1, 0].set_ylabel("best loss (nats per token)")
    handles = [
        Line2D([], [], color=mark.color, marker=mark.marker, ms=5, label=_size_name(study, size))
        for size, mark in marks.items()
    ]
    legend_above(figure, handles)
    return figure


def _groups(study: Study, option: str) -> dict[str, list[Arm]]:
    """Arms that differ in this option alone, by what they have in common."""
    groups: dict[str, list[Arm]] = {}
    for arm in study.arms:
        if option in arm.settings:
            others = [f"{short_option(k)} {v}" for k, v in arm.settings.items() if k != option]
            groups.setdefault(", ".join([arm.variant, *others]), []).append(arm)
    return groups


def _draw_column(
    panels: Sequence[Any], places: Sequence[tuple[int, Arm]], marks: Mapping[float, Mark]
) -> None:
    """Optima (upper panel) and losses (lower) of arms at their places, a line for each size."""
    top, bottom = panels
    for index, (size, mark) in enumerate(marks.items()):
        dodge = 0.09 * (index - (len(marks) - 1) / 2)
        found = {
            place + dodge: minimum
            for place, arm in places
            for minimum in arm.minima
            if minimum.size == size
        }
        _draw_line(top, {at: found[at].log2_lr for at in found}, mark)
        _draw_line(bottom, {at: found[at].loss for at in found}, mark)
    for panel in panels:
        # Room for the arrows of bounds, whose length is no part of the data.
        panel.margins(y=0.12)
        panel.grid(True)


def _draw_line(panel: Any, estimates: Mapping[float, Estimate], mark: Mark) -> None:
    known = [
        (at, found.value) for at, found in sorted(estimates.items()) if found.value is not None
    ]
    panel.plot([at for at, _ in known], [value for _, value in known], lw=0.9, color=mark.color)
    for at, estimate in estimates.items():
        draw_estimate(panel, at, estimate, mark)


def _label_values(panel: Any, option: str, values: Sequence[str]) -> None:
    panel.set_xticks(range(len(values)), values)
    panel.set_xlim(-0.5, len(values) - 0.5)
    if max(map(len, values)) > 10:
        panel.tick_params(axis="x", labelrotation=30)
    panel.set_xlabel(short_option(option))


def _size_name(study: Study, size: float) -> str:
    return f"{study.axis} {size_text(size)}"
