"""A coordinate check's results for people and for programs: table on the terminal, CSV files."""

from __future__ import annotations

import csv
import io
import math
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import astuple, fields

from rich import box
from rich.console import Console
from rich.table import Table

from megatron_mup.diagnostics.coordinate_fit import TOLERANCE, Fit, failures
from megatron_mup.diagnostics.coordinates import Coordinate


def coordinates_csv(coordinates: Sequence[Coordinate]) -> str:
    """Every measured number: width, seed, step, module, rms, change."""
    header = [item.name for item in fields(Coordinate)]
    return _csv([header, *(astuple(row) for row in coordinates)])


def read_coordinates(text: str) -> list[Coordinate]:
    """Read ``coordinates_csv`` back."""
    rows = csv.DictReader(io.StringIO(text))
    return [
        Coordinate(
            width=int(row["width"]),
            seed=int(row["seed"]),
            step=int(row["step"]),
            module=row["module"],
            rms=float(row["rms"]),
            change=float(row["change"]),
        )
        for row in rows
    ]


def slopes_csv(fits: Sequence[Fit]) -> str:
    """Every fit with its interval, what was expected of it, and the verdict."""
    header = "module,step,quantity,slope,half_width,degrees_of_freedom,expected,verdict"
    rows = [
        (
            fit.module,
            fit.step,
            "change" if fit.step else "rms",
            fit.slope,
            fit.half_width,
            fit.degrees_of_freedom,
            fit.expected.text,
            fit.verdict.value,
        )
        for fit in fits
    ]
    return _csv([header.split(","), *rows])


def _csv(rows: Iterable[Sequence[object]]) -> str:
    stream = io.StringIO()
    csv.writer(stream, lineterminator="\n").writerows(rows)
    return stream.getvalue()


def render(fits: Sequence[Fit], *, width: int | None = None) -> str:
    """The table of slopes and the sentence that sums it up.

    Args:
        fits: from ``fit_coordinates``.
        width: columns; unset means the terminal's.
    """
    last = max(fit.step for fit in fits)
    steps = sorted({1, last})
    grid = Table(title="exponents of width", title_justify="left", box=box.SIMPLE_HEAD)
    grid.add_column("module", no_wrap=True)
    for column in ("size at step 0", "expected"):
        grid.add_column(column, justify="right")
    for step in steps:
        grid.add_column(f"change, step {step}", justify="right")
    grid.add_column("expected", justify="right")
    grid.add_column("verdict", no_wrap=True)
    for module in dict.fromkeys(fit.module for fit in fits):
        mine = {fit.step: fit for fit in fits if fit.module == module}
        shown = [mine[0], *(mine[step] for step in steps)]
        grid.add_row(
            module,
            _slope(shown[0]),
            mine[0].expected.text,
            *(_slope(fit) for fit in shown[1:]),
            mine[last].expected.text,
            _verdict([fit for fit in fits if fit.module == module]),
        )
    console = Console(width=width or max(100, shutil.get_terminal_size((120, 50)).columns))
    with console.capture() as capture:
        console.print(grid)
        for line in [interval_text(fits), conclusion(fits)]:
            console.print(line, markup=False, highlight=False)
    return capture.get()


def _slope(fit: Fit) -> str:
    if math.isnan(fit.slope):
        return fit.verdict.value if fit.verdict.passed else "-"
    interval = "" if math.isnan(fit.half_width) else f" +- {fit.half_width:.2f}"
    return f"{fit.slope:+.2f}{interval}"


def _verdict(fits: Sequence[Fit]) -> str:
    wrong = [fit for fit in fits if not fit.verdict.passed]
    if not wrong:
        return "ok"
    return f"{wrong[0].verdict.value.upper()} from step {wrong[0].step}"


def interval_text(fits: Sequence[Fit]) -> str:
    """What the intervals are, with their degrees of freedom."""
    freedom = fits[0].degrees_of_freedom
    rule = f"fails beyond {TOLERANCE:g} from what is expected"
    if freedom == 0:
        return f"One seed: slopes have no interval; {rule}."
    return (
        f"+-: 95% interval over {freedom + 1} seeds ({freedom} degree(s) of freedom), of the "
        f"initial weights' noise alone; {rule}."
    )


def conclusion(fits: Sequence[Fit]) -> str:
    """One sentence: passed, or which modules fail and how."""
    wrong = failures(fits)
    if not wrong:
        return "The coordinate check passes: no module grows or vanishes with the width."
    listed = ", ".join(
        f"{module} {fit.verdict.value}{_exponent(fit)} at step {fit.step}"
        for module, fit in wrong.items()
    )
    return f"The coordinate check FAILS: {listed}."


def _exponent(fit: Fit) -> str:
    return "" if math.isnan(fit.slope) else f" as M^{fit.slope:+.2f}"
