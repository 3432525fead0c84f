"""The coordinate check's picture: change against width, one small panel a module."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_mup.data.publication import published
from megatron_mup.diagnostics.coordinate_fit import Fit, Verdict, failures
from megatron_mup.diagnostics.coordinates import Coordinate
from megatron_mup.diagnostics.recorder import LAYER_MODULES

_COLUMNS = len(LAYER_MODULES)
_GOOD, _BAD, _ZERO = "#3a6ea5", "#d1431f", "0.6"


def draw(
    coordinates: Sequence[Coordinate], fits: Sequence[Fit], path: Path, *, caption: str
) -> None:
    """Draw one panel a module: the ends of the model in the first row, then a row per layer.

    Panels that fail are red and say how; a line is the mean over seeds after one step.

    Args:
        coordinates: every measured number.
        fits: from ``fit_coordinates``.
        path: PNG to write.
        caption: small print (configuration, steps, seeds, commit).
    """
    # Imported late, because it takes a second; Agg draws without a display.
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    modules = list(dict.fromkeys(fit.module for fit in fits))
    ends = [module for module in modules if not module.startswith("layer ")]
    layers = [module for module in modules if module.startswith("layer ")]
    rows = 1 + math.ceil(len(layers) / _COLUMNS)
    figure, axes = plt.subplots(
        rows, _COLUMNS, figsize=(11.5, 2.3 * rows + 0.9), layout="constrained", squeeze=False
    )
    for axis, module in zip(axes[0], ends, strict=False):
        _panel(axis, module, coordinates, fits)
    for axis, module in zip(axes[1:].flat, layers, strict=True):
        _panel(axis, module, coordinates, fits)
    _legend(axes[0][len(ends)], max(fit.step for fit in fits))
    bad = len(failures(fits))
    verdict = f"FAILS: {bad} of {len(modules)} modules" if bad else "passes"
    figure.suptitle(f"coordinate check {verdict}", color=_BAD if bad else "k", fontsize=13)
    figure.supxlabel(f"width (log scale)\n{caption}", fontsize=8)
    figure.supylabel("change since step 0, root mean square (log scale)", fontsize=9)
    with published(path) as stream:
        figure.savefig(stream, dpi=130, format="png")
    # pyplot keeps every figure that is not closed.
    plt.close(figure)


def _panel(axis: Any, module: str, coordinates: Sequence[Coordinate], fits: Sequence[Fit]) -> None:
    mine = {fit.step: fit for fit in fits if fit.module == module}
    last = max(mine)
    widths = sorted({row.width for row in coordinates})
    wrong = failures(list(mine.values())).get(module)
    for step, fit in mine.items():
        if step:
            _line(axis, fit, [row for row in coordinates if row.module == module], last=last)
    axis.set_xscale("log", base=2)
    axis.set_xticks(widths, [str(width) for width in widths], fontsize=7)
    axis.set_xlim(widths[0] / 1.2, widths[-1] * 1.2)
    # Matplotlib cannot make a log axis of nothing but zeros and nans.
    if axis.lines and any(_positive(line.get_ydata()) for line in axis.lines):
        axis.set_yscale("log")
        low, high = axis.get_ylim()
        # At least a factor of 30, so that noise around a flat line does not look like a slope.
        room = max(1.0, math.sqrt(30 * low / high))
        axis.set_ylim(low / room, high * room)
    else:
        axis.set_yticks([])
        axis.text(0.5, 0.5, mine[last].verdict.value, transform=axis.transAxes, ha="center")
    axis.tick_params(axis="y", labelsize=7, which="both")
    color = _GOOD if wrong is None else _BAD
    axis.set_title(f"{module}: {_title(mine[last], wrong)}", fontsize=8, color=color)
    for spine in axis.spines.values():
        spine.set_color(color)
        spine.set_linewidth(1.0 if wrong is None else 2.2)
    axis.grid(alpha=0.2)


def _positive(values: Any) -> bool:
    return any(value > 0 and math.isfinite(value) for value in values)


def _title(fit: Fit, wrong: Fit | None) -> str:
    shown = fit if wrong is None else wrong
    exponent = "" if math.isnan(shown.slope) else f" M^{shown.slope:+.2f}"
    if wrong is None:
        return f"ok{exponent}"
    where = ", step 0" if wrong.step == 0 else ""
    return f"{wrong.verdict.value.upper()}{exponent}{where}"


def _line(axis: Any, fit: Fit, rows: Sequence[Coordinate], *, last: int) -> None:
    """Mean over seeds, with a dot per seed; later steps darker."""
    mine = [row for row in rows if row.step == fit.step]
    widths = sorted({row.width for row in mine})
    color = _GOOD if fit.verdict.passed else _BAD
    color = _ZERO if fit.verdict is Verdict.ZERO else color
    strength = 0.3 + 0.7 * fit.step / last
    means = []
    for width in widths:
        changes = [row.change for row in mine if row.width == width]
        # Geometric, as the fit is.
        whole = all(0 < change < math.inf for change in changes)
        means.append(
            math.exp(math.fsum(map(math.log, changes)) / len(changes)) if whole else math.nan
        )
    axis.plot(widths, means, "-", color=color, alpha=strength, lw=1.4)
    axis.plot(
        [row.width for row in mine],
        [row.change if row.change > 0 else math.nan for row in mine],
        ".",
        color=color,
        alpha=strength,
        ms=3,
    )


def _legend(axis: Any, last: int) -> None:
    axis.axis("off")
    lines = [
        (_GOOD, "as expected"),
        (_BAD, "grows, shrinks or is not finite"),
        (_ZERO, "identically zero, as expected"),
    ]
    for row, (color, text) in enumerate(lines):
        axis.plot([0.0, 0.1], [0.85 - 0.2 * row] * 2, color=color, lw=2)
        axis.text(0.15, 0.85 - 0.2 * row, text, va="center", fontsize=8, color=color)
    note = f"lines: after steps 1 (pale) to {last} (dark)\ndots: seeds; title: exponent of width"
    axis.text(0.0, 0.2, note, va="center", fontsize=8, color="0.3")
    axis.set_xlim(0, 1)
    axis.set_ylim(0, 1)
