"""How every figure looks, and how it is written: the only place that sets matplotlib up.

Sizes go from light to dark and arms have colors that color-blind readers tell apart (Okabe and Ito,
jfly.uni-koeln.de/color); both also differ in marker, so that a copy in grey can be read. Text stays
text in an SVG. matplotlib is imported late, because it takes a second.
"""

from __future__ import annotations

import contextlib
import io
import math
import textwrap
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from megatron_mup.data.publication import published
from megatron_mup.transfer.report.wording import UNITS, size_text

WIDTH = 7.2
"""Inches: two columns of a paper."""

PNG_DPI = 200

_ARM_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "p")
_LINES = ("-", "--", "-.", ":")

_LETTER_POINTS = 4.9
"""Mean width of a letter of the legend's font."""

_HANDLE_POINTS = 42.0
"""Of a legend's handle and the space around an entry."""

_LEGEND_ROW_INCHES = 0.18

_LONGEST_TICKS = 42
"""Letters that fit below a panel; more are slanted."""

_SETTINGS: dict[Any, Any] = {
    "font.size": 8.5,
    "axes.titlesize": 9,
    "axes.labelsize": 9,
    "legend.fontsize": 8.5,
    "xtick.labelsize": 8.5,
    "ytick.labelsize": 8.5,
    "axes.linewidth": 0.7,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "lines.linewidth": 1.3,
    "grid.linewidth": 0.5,
    "grid.alpha": 0.3,
    "legend.frameon": False,
    # Names of arms are users': a dollar sign is no formula.
    "text.parse_math": False,
    "svg.fonttype": "none",
    # Equal reports are equal files.
    "svg.hashsalt": "megatron-mup",
    # A family that is missing where a page is read is replaced by the next, equally wide, one.
    "font.sans-serif": ["DejaVu Sans", "Bitstream Vera Sans", "Verdana", "sans-serif"],
}


@dataclass(frozen=True)
class Mark:
    """How one arm or one size is drawn."""

    color: Any
    marker: str
    line: str = "-"


def size_marks(sizes: Sequence[float]) -> dict[float, Mark]:
    """Light to dark with increasing size."""
    import matplotlib as mpl

    colors = mpl.colormaps["viridis"]
    # Viridis ends in a yellow that white paper swallows, so its last part is left out.
    steps = max(1, len(sizes) - 1)
    return {
        size: Mark(colors(0.82 - 0.74 * index / steps), _MARKERS[index % len(_MARKERS)])
        for index, size in enumerate(sizes)
    }


def arm_marks(names: Sequence[str]) -> dict[str, Mark]:
    """A color, a marker and a line for each arm; no two arms agree in all three."""
    return {
        name: Mark(
            _ARM_COLORS[index % len(_ARM_COLORS)],
            _MARKERS[index % len(_MARKERS)],
            _LINES[index % len(_LINES)],
        )
        for index, name in enumerate(names)
    }


@cache
def arrow_up() -> Any:
    """A marker that no arm and no size has; one object, so that it equals itself."""
    from matplotlib.path import Path

    right = [(0.0, 1.0), (0.7, 0.1), (0.2, 0.1), (0.2, -1.0)]
    return Path([*right, *((-x, y) for x, y in reversed(right))], closed=True)


def axis_label(axis: str) -> str:
    """Name of the scaled axis with what it counts."""
    counted = UNITS.get(axis, axis)
    return axis if counted == axis else f"{axis} ({counted})"


def wrapped(name: str, width: int) -> str:
    """A long name on several lines, broken at its commas if that is enough."""
    parts = name.split(", ")
    if len(name) <= width:
        return name
    if max(map(len, parts)) < width:
        return ",\n".join(parts)
    return "\n".join(textwrap.wrap(name, width)) or name


def legend_label(name: str) -> str:
    """A name that a legend shows: matplotlib hides labels that begin with an underscore."""
    return f" {name}" if name.startswith("_") else name


def size_axis(axis: Any, sizes: Sequence[float], label: str) -> None:
    """A logarithmic axis with a tick at every size that was run.

    Args:
        axis: of matplotlib.
        sizes: to mark.
        label: of the axis.
    """
    import matplotlib.ticker

    axis.set_xscale("log", base=2)
    axis.xaxis.set_major_locator(matplotlib.ticker.FixedLocator(list(sizes)))
    names = [size_text(size) for size in sizes]
    axis.xaxis.set_major_formatter(matplotlib.ticker.FixedFormatter(names))
    axis.xaxis.set_minor_locator(matplotlib.ticker.NullLocator())
    if len(sizes) * max(map(len, names)) > _LONGEST_TICKS:
        axis.tick_params(axis="x", labelrotation=45)
    axis.set_xlabel(label)


def legend_shape(labels: Sequence[str], width: float) -> tuple[int, int]:
    """Columns and rows of a legend that is not wider than its figure.

    Args:
        labels: of its entries.
        width: of the figure, inches.
    """
    for columns in range(len(labels), 1, -1):
        widths = [max(map(len, labels[column::columns])) for column in range(columns)]
        if _LETTER_POINTS * sum(widths) + _HANDLE_POINTS * columns <= 72 * width:
            return columns, math.ceil(len(labels) / columns)
    return 1, len(labels)


def legend_above(figure: Any, handles: Sequence[Any]) -> None:
    """A legend over the panels, where it hides nothing, and paper for it.

    Args:
        figure: with constrained layout; its height grows.
        handles: labelled, to be read line by line.
    """
    width, height = figure.get_size_inches()
    columns, rows = legend_shape([handle.get_label() for handle in handles], width)
    figure.set_size_inches(width, height + _LEGEND_ROW_INCHES * rows)
    figure.legend(
        # Matplotlib fills a legend column by column.
        handles=[handle for column in range(columns) for handle in handles[column::columns]],
        loc="outside upper center",
        ncols=columns,
        columnspacing=1.4,
        handletextpad=0.5,
    )


@contextlib.contextmanager
def style() -> Iterator[None]:
    """Everything drawn and written inside looks as described above; nothing stays set."""
    import matplotlib as mpl

    with mpl.rc_context():
        mpl.rcdefaults()
        mpl.rcParams.update(_SETTINGS)
        yield


def new_figure(width: float, height: float) -> Any:
    """An empty figure that no global state of matplotlib knows.

    Args:
        width: inches.
        height: inches.
    """
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def write_figure(draw: Callable[[], Any], folder: Path, name: str) -> str:
    """Draw a figure and write it as SVG and PNG.

    Args:
        draw: makes the figure.
        folder: of both files; it exists.
        name: of both files, without suffix.

    Returns:
        The SVG file's text.
    """
    with style():
        figure = draw()
        text = io.StringIO()
        figure.savefig(text, format="svg", metadata={"Date": None})
        with published(folder / f"{name}.svg") as stream:
            stream.write(text.getvalue().encode("utf-8"))
        with published(folder / f"{name}.png") as stream:
            figure.savefig(stream, format="png", dpi=PNG_DPI)
    return text.getvalue()
