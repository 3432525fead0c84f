"""The quickstart's table and picture, made from records; nothing here trains."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_mup.data.publication import published
from megatron_mup.transfer.optimum import Optimum, find_optimum
from megatron_mup.transfer.records import Record

TITLES = {"mup": "muP", "sp": "standard parameterization (SP)"}


@dataclass(frozen=True)
class Curve:
    """Loss against log2 LR of one parameterization and width."""

    parameterization: str
    width: int
    parameters: int
    log2_lrs: tuple[float, ...]
    losses: tuple[float, ...]

    @property
    def optimum(self) -> Optimum | None:
        """Minimum of the curve."""
        return find_optimum(self.log2_lrs, self.losses)


def curves_of(records: Sequence[Record]) -> dict[str, list[Curve]]:
    """Curves by parameterization, in order of width."""
    grouped: dict[tuple[str, int], list[Record]] = {}
    for record in records:
        grouped.setdefault((record.cell.parameterization, record.cell.width), []).append(record)
    curves: dict[str, list[Curve]] = {}
    for (name, width), rows in sorted(grouped.items()):
        # Records come in the order in which runs ended.
        rows = sorted(rows, key=lambda row: row.cell.log2_lr)
        curve = Curve(
            name,
            width,
            rows[0].parameters,
            tuple(row.cell.log2_lr for row in rows),
            tuple(row.validation_loss for row in rows),
        )
        curves.setdefault(name, []).append(curve)
    return curves


def table_lines(curves: dict[str, list[Curve]], entropy: float) -> list[str]:
    """A Markdown table of the optima, and one sentence per parameterization."""
    lines = [
        "| parameterization | width | parameters | best log2 LR | best loss | note |",
        "|---|---|---|---|---|---|",
    ]
    for name in sorted(curves):
        for curve in curves[name]:
            lines.append(_row(name, curve, entropy))
    return [*lines, "", *(_sentence(name, curves[name]) for name in sorted(curves))]


def _row(name: str, curve: Curve, entropy: float) -> str:
    best = curve.optimum
    diverged = sum(not math.isfinite(loss) for loss in curve.losses)
    notes = [f"{diverged} run(s) diverged"] if diverged else []
    if best is None:
        return f"| {name} | {curve.width} | {curve.parameters:,} | - | - | all runs diverged |"
    if best.at_edge:
        notes.append("minimum at the edge of the finite grid: the optimum may lie outside")
    if best.loss >= entropy:
        notes.append(f"not below the unigram entropy {entropy:.3f}")
    return (
        f"| {name} | {curve.width} | {curve.parameters:,} | {best.log2_lr:.2f} | {best.loss:.4f} "
        f"| {'; '.join(notes)} |"
    )


def _sentence(name: str, curves: list[Curve]) -> str:
    """How far the optimum moved between the smallest and the largest width."""
    first, last = curves[0], curves[-1]
    start, end = first.optimum, last.optimum
    widths = f"from width {first.width} to {last.width}"
    if start is None or end is None:
        return f"{name}: no optimum {widths}; too many runs diverged."
    # An edge is only a bound on the optimum, and the difference of two bounds says nothing.
    if start.at_edge or end.at_edge:
        return f"{name}: the shift {widths} cannot be told; a minimum is at the grid's edge."
    return f"{name}: the optimum moved {end.log2_lr - start.log2_lr:+.2f} octaves {widths}."


def draw(curves: dict[str, list[Curve]], entropy: float, path: Path, *, caption: str) -> None:
    """Loss against learning rate, one curve a width, one panel a parameterization.

    Args:
        curves: from ``curves_of``.
        entropy: unigram entropy of the held-out text, nats per token.
        path: PNG to write.
        caption: small print below the panels (data, steps, seed).
    """
    # Imported late, because it takes a second; Agg draws without a display.
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    names = [name for name in TITLES if name in curves]
    figure, axes = plt.subplots(
        1,
        len(names),
        figsize=(5.2 * len(names), 4.6),
        # One axis for both panels: the losses of muP and SP are to be compared as well.
        sharey=True,
        squeeze=False,
        layout="constrained",
    )
    top = _top(curves, entropy)
    for axis, name in zip(axes[0], names, strict=True):
        _panel(axis, name, curves[name], entropy, top)
    axes[0][0].set_ylabel("held-out loss (nats per token)")
    axes[0][0].legend(frameon=False, loc="best")
    figure.supxlabel(caption, fontsize=7.5, color="0.4")
    with published(path) as stream:
        figure.savefig(stream, dpi=160, format="png")
    # pyplot keeps every figure that is not closed.
    plt.close(figure)


def _top(curves: dict[str, list[Curve]], entropy: float) -> float:
    """Upper end of the loss axis: a little above the unigram entropy."""
    # Losses beyond it have learned nothing; they would squeeze the curves into a corner.
    finite = [
        loss for row in curves.values() for c in row for loss in c.losses if math.isfinite(loss)
    ]
    # Without a finite loss the axis still has to hold the entropy's line and the crosses.
    lowest = min(finite, default=0.0)
    return entropy + 0.12 * (entropy - lowest) if lowest < entropy else lowest * 1.2


def _panel(axis: Any, name: str, curves: list[Curve], entropy: float, top: float) -> None:
    import matplotlib as mpl
    import matplotlib.ticker

    colors = mpl.colormaps["viridis"]
    for index, curve in enumerate(curves):
        # Viridis ends in a yellow that white paper swallows, so its last part is left out.
        color = colors(0.85 - 0.75 * index / max(1, len(curves) - 1))
        # True values: a line to a point above the axis leaves through it at its own slope.
        axis.plot(
            curve.log2_lrs, curve.losses, "o-", ms=4, color=color, label=f"width {curve.width}"
        )
        # "not <" and not ">=": nan, a diverged run, is to get its cross.
        failed = [x for x, loss in zip(curve.log2_lrs, curve.losses, strict=True) if not loss < top]
        if failed:
            marks = axis.plot(failed, [top] * len(failed), "x", ms=7, color=color, clip_on=False)
            # The crosses sit on the frame; counted in, they would shrink the panel.
            marks[0].set_in_layout(False)
        best = curve.optimum
        if best is not None:
            style = {"ls": ":", "lw": 1.2, "alpha": 0.9}
            axis.axvline(best.log2_lr, color=color, **style)
            axis.plot([best.log2_lr], [best.loss], "*", ms=12, color=color, mec="k", mew=0.5)
    axis.axhline(entropy, color="0.5", lw=1, ls="--")
    axis.text(
        0.02,
        entropy,
        "unigram entropy",
        transform=axis.get_yaxis_transform(),
        va="bottom",
        fontsize=8,
        color="0.4",
    )
    axis.set_ylim(top=top)
    axis.xaxis.set_major_locator(mpl.ticker.MultipleLocator(1))
    axis.set_title(TITLES[name] + "\n" + _sentence(name, curves).split(": ", 1)[1], fontsize=10)
    axis.set_xlabel("log2 of the base learning rate")
    axis.grid(alpha=0.25)
