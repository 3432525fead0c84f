"""Figure: loss against learning rate, one panel an arm, one color a size.

Must not fit anything: parabolas, minima and intervals are drawn as the fits give them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from megatron_mup.transfer.fits import Curve, Minimum, loss_at
from megatron_mup.transfer.report.figure_optima import draw_arrow
from megatron_mup.transfer.report.figure_style import (
    WIDTH,
    Mark,
    arrow_up,
    legend_above,
    new_figure,
    size_marks,
    wrapped,
)
from megatron_mup.transfer.report.study import Arm, Study, divergence_of, means_of
from megatron_mup.transfer.report.wording import size_text

_STRIP_ROW = 0.055
"""Height of a row of crosses and arrows, as a part of the range of the losses shown."""

_BESIDE_POINTS = -4.5
"""From an arrow to the cross of the same size and learning rate."""

_BLACK = Mark("black", "")

_MINIMUM: dict[str, Any] = {"marker": "d", "ms": 5, "mfc": "white", "mec": "black", "mew": 0.9}
"""A fitted minimum: narrow, so that its interval shows on both sides."""


def draw_curves(study: Study) -> Any:
    """Loss against log2 LR of every run, means, fitted curves and minima.

    Args:
        study: with at least one arm.

    Returns:
        A figure of matplotlib.
    """
    columns = 2 if len(study.arms) in (2, 4) else min(3, len(study.arms))
    lines = math.ceil(len(study.arms) / columns)
    width = WIDTH if columns > 1 else 4.6
    figure = new_figure(width, 0.2 + 3.0 * lines)
    panels = figure.subplots(lines, columns, sharex=True, sharey=True, squeeze=False)
    marks = size_marks(study.sizes)
    scale = LossScale(study.arms)
    for panel, arm in zip(panels.flat, study.arms, strict=False):
        for curve, minimum in zip(arm.curves, arm.minima, strict=True):
            _draw_runs(panel, curve, marks[curve.size], scale)
            _draw_fit(panel, minimum, marks[curve.size])
        _draw_off_scale(panel, arm, marks, scale)
        panel.set_title(wrapped(arm.name, 84 // columns))
    for panel in list(panels.flat)[len(study.arms) :]:
        panel.axis("off")
    _finish(panels, study, scale)
    legend_above(figure, _legend(study, marks, scale))
    return figure


class LossScale:
    """The common loss axis: it holds what the fits used, and a strip for all else above.

    Attributes:
        bottom: lowest loss shown.
        top: highest loss shown; above it lies the strip.
        empty: every run diverged, so that the axis has no numbers.
        diverged: sizes with diverged runs.
        above: sizes with means above the highest loss shown.
        strip_rows: rows of the strip, one for each of these sizes, so that no mark hides another.
    """

    def __init__(self, arms: Sequence[Arm]) -> None:
        curves = [curve for arm in arms for curve in arm.curves]
        finite = [loss for curve in curves for loss in curve.losses if math.isfinite(loss)]
        self.empty = not finite
        lowest, highest = min(finite, default=0.0), max(finite, default=1.0)
        used = [lowest]
        for arm in arms:
            for curve, minimum in zip(arm.curves, arm.minima, strict=True):
                low, high = minimum.window
                used += [loss for at, loss in means_of(curve) if low <= at <= high]
        # Runs far off the optimum would squeeze the curves into a corner.
        room = 1.8 * (max(used) - lowest) or highest - lowest
        self.top = min(highest, lowest + room)
        span = (self.top - lowest) or 0.1 * abs(lowest) or 1.0
        self.bottom = lowest - 0.07 * span
        self.top += 0.05 * span
        self.diverged = {curve.size for curve in curves if divergence_of(curve)}
        self.above = {curve.size for curve in curves if self.means_above(curve)}
        self.strip_rows = sorted(self.diverged | self.above)

    def means_above(self, curve: Curve) -> list[float]:
        """Learning rates of the means that the axis does not reach."""
        return [at for at, loss in means_of(curve) if loss > self.top]

    @property
    def row_height(self) -> float:
        """Of the strip, nats."""
        return _STRIP_ROW * (self.top - self.bottom)

    @property
    def end(self) -> float:
        """Upper end of the axis."""
        return self.top + self.row_height * (len(self.strip_rows) + 0.5 * bool(self.strip_rows))

    def row_of(self, size: float) -> float:
        """Height of a size's crosses and arrows."""
        return self.top + self.row_height * (self.strip_rows.index(size) + 0.75)


def _draw_runs(panel: Any, curve: Curve, mark: Mark, scale: LossScale) -> None:
    finite = [
        (at, loss)
        for at, loss in zip(curve.log2_lrs, curve.losses, strict=True)
        if math.isfinite(loss)
    ]
    shown = [point for point in finite if point[1] <= scale.top]
    panel.plot(
        *_columns(shown), ls="", marker=mark.marker, ms=3, mew=0, alpha=0.3, color=mark.color
    )
    means = means_of(curve)
    # True values: a line to a point above the axis leaves the panel at its own slope.
    panel.plot(*_columns(_cut_at(means, scale.top)), lw=0.6, alpha=0.55, color=mark.color)
    panel.plot(
        *_columns([point for point in means if point[1] <= scale.top]),
        ls="",
        marker=mark.marker,
        ms=4,
        color=mark.color,
        # A point at the upper end is whole.
        clip_on=False,
    )


def _cut_at(points: Sequence[tuple[float, float]], top: float) -> list[tuple[float, float]]:
    """A line through the points, ended where it leaves the axis."""
    cut: list[tuple[float, float]] = []
    for index, (at, loss) in enumerate(points):
        if index:
            before_at, before = points[index - 1]
            if (before > top) != (loss > top):
                part = (top - before) / (loss - before)
                cut.append((before_at + part * (at - before_at), top))
                if loss > top:
                    cut.append((math.nan, math.nan))
        if loss <= top:
            cut.append((at, loss))
    return cut


def _draw_fit(panel: Any, minimum: Minimum, mark: Mark) -> None:
    """The fitted curve over its window, and the minimum with its interval."""
    best, loss, curvature = (minimum.log2_lr, minimum.loss, minimum.curvature)
    if best.value is None or loss.value is None:
        if minimum.lowest is not None and minimum.edge is not None:
            _draw_edge(panel, minimum.lowest, minimum.edge, mark)
        return
    if curvature.value is not None:
        rates = np.linspace(*minimum.window, 80)
        panel.plot(rates, [loss_at(minimum, rate) for rate in rates], color=mark.color)
    place = (best.value, loss.value)
    panel.plot(*place, ls="", zorder=6, **_MINIMUM)
    if best.low is None and best.high is None:
        return
    for end, outward in ((best.low, -1), (best.high, 1)):
        if end is None:
            draw_arrow(panel, place, _BLACK, offset=(20 * outward, 0))
            continue
        panel.plot([best.value, end], [loss.value] * 2, color="black", lw=1.1, zorder=5)
        panel.plot(end, loss.value, marker="|", ms=7, mew=1.1, color="black", zorder=5)


def _draw_edge(panel: Any, lowest: tuple[float, float], edge: str, mark: Mark) -> None:
    """The lowest point, with an arrow to where the optimum may lie."""
    at, loss = lowest
    draw_arrow(panel, lowest, mark, offset=(17 if edge == "high" else -17, 0))
    face = {"ms": 7.5, "mfc": "white", "mec": mark.color, "mew": 1.3}
    panel.plot([at], [loss], ls="", marker=mark.marker, zorder=5, **face)


def _draw_off_scale(panel: Any, arm: Arm, marks: Mapping[float, Mark], scale: LossScale) -> None:
    """Crosses for diverged runs and arrows for means above the axis, a row for each size."""
    from matplotlib.transforms import offset_copy

    if not scale.strip_rows:
        return
    panel.axhspan(scale.top, scale.end, color="0.95", lw=0, zorder=0)
    beside = offset_copy(panel.transData, panel.figure, x=_BESIDE_POINTS, units="points")
    for curve in arm.curves:
        if curve.size not in scale.strip_rows:
            continue
        mark, height = marks[curve.size], scale.row_of(curve.size)
        lost_at = set()
        for at, lost, runs in divergence_of(curve):
            lost_at.add(at)
            weight = 1.7 if lost == runs else 0.6
            panel.plot([at], [height], marker="x", ms=4.5, mew=weight, color=mark.color)
        for at in scale.means_above(curve):
            place = beside if at in lost_at else panel.transData
            panel.plot([at], [height], color=mark.color, transform=place, **_above())


def _above() -> dict[str, Any]:
    """The mark of a mean above the axis."""
    return {"ls": "", "marker": arrow_up(), "ms": 7, "mew": 0}


def _finish(panels: Any, study: Study, scale: LossScale) -> None:
    import matplotlib.ticker

    first = panels.flat[0]
    rates = sorted({row.log2_lr for row in study.rows})
    first.set_xlim(rates[0] - 0.75, rates[-1] + 0.75)
    first.set_ylim(scale.bottom, scale.end)
    # Narrow panels have room for fewer numbers.
    spacing = max(1, math.ceil((rates[-1] - rates[0]) / (10 if panels.shape[1] < 3 else 6)))
    first.xaxis.set_major_locator(matplotlib.ticker.MultipleLocator(spacing))
    ticks = matplotlib.ticker.MaxNLocator(6).tick_values(scale.bottom, scale.top)
    kept = [tick for tick in ticks if scale.bottom <= tick <= scale.top and not scale.empty]
    # As few digits as tell every tick exactly: steps are of 1, 2 or 2.5 times a power of ten.
    exact = (n for n in range(9) if all(abs(tick - round(tick, n)) < 1e-9 for tick in kept))
    digits = next(exact, 9)
    names = [f"{tick:.{digits}f}" for tick in kept]
    if scale.strip_rows:
        kept.append((scale.top + scale.end) / 2)
        both = scale.diverged and scale.above
        names.append("off scale" if both else "diverged" if scale.diverged else "above")
    first.set_yticks(kept, names)
    for panel in panels.flat:
        panel.grid(True)
        if scale.strip_rows:
            panel.yaxis.get_major_ticks()[-1].gridline.set_visible(False)
    for panel in panels[:, 0]:
        panel.set_ylabel("validation loss (nats per token)")
    for index, panel in enumerate(panels.flat):
        below = index + panels.shape[1]
        if index < len(study.arms) and below >= len(study.arms):
            panel.set_xlabel("log2 learning rate")
            panel.tick_params(axis="x", labelbottom=True)


def _legend(study: Study, marks: Mapping[float, Mark], scale: LossScale) -> list[Any]:
    from matplotlib.lines import Line2D

    handles = [
        Line2D([], [], color=mark.color, marker=mark.marker, ms=4, label=_size_name(study, size))
        for size, mark in marks.items()
    ]
    grey: dict[str, Any] = {"ls": "", "color": "0.35"}
    minima = [minimum for arm in study.arms for minimum in arm.minima]
    if any(minimum.log2_lr.value is not None for minimum in minima):
        label = f"minimum, {study.level:.0%} interval"
        handles.append(Line2D([], [], label=label, color="black", lw=1.1, **_MINIMUM))
    if any(minimum.edge is not None for minimum in minima):
        hollow = {"marker": "o", "ms": 7, "mfc": "white", "mew": 1.3}
        handles.append(Line2D([], [], label="lowest point at edge", **(grey | hollow)))
    if scale.above:
        handles.append(Line2D([], [], label="mean above the axis", **(grey | _above())))
    if scale.diverged:
        cross = {"marker": "x", "ms": 4.5, "mew": 1.7}
        handles.append(Line2D([], [], label="diverged (thin: some)", **(grey | cross)))
    return handles


def _size_name(study: Study, size: float) -> str:
    return f"{study.axis} {size_text(size)}"


def _columns(points: Sequence[tuple[float, float]]) -> tuple[list[float], list[float]]:
    return [at for at, _ in points], [value for _, value in points]
