"""Prints the equality matrix at the end of a test session, from the tests' recorded properties."""

from __future__ import annotations

from typing import Any, NamedTuple

from tests.distributed.cells import MAIN, MODELS

PROPERTY = "differences from one rank"
TITLE = "largest difference from one rank: loss (nats) / gradient norm (relative)"


class Differences(NamedTuple):
    """How far a cell is from one rank: the largest over its ranks and steps.

    Attributes:
        loss: of the training losses and the evaluation, in nats per token.
        norm: of the gradient norms, as a fraction of one rank's.
    """

    loss: float
    norm: float

    def __str__(self) -> str:
        return f"{_short(self.loss)}/{_short(self.norm)}"


def _short(value: float) -> str:
    """One digit and an exponent without its zero, so that two fit in a column."""
    return "0" if value == 0 else f"{value:.0e}".replace("e-0", "e-")


def matrix_lines(differences: dict[tuple[str, str], Differences]) -> list[str]:
    """The table: models down, layouts across; then the further layouts, a line each.

    Args:
        differences: of every cell, by (model, layout).
    """
    rows = [["", *MAIN]]
    for model in MODELS:
        values = [differences.get((model, layout)) for layout in MAIN]
        if any(value is not None for value in values):
            rows.append([model, *("-" if value is None else str(value) for value in values)])
    widths = [max(len(row[column]) for row in rows) for column in range(len(MAIN) + 1)]
    lines = [
        "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows
    ]
    further = [
        f"{layout}, {model}: {value}"
        for (model, layout), value in differences.items()
        if layout not in MAIN
    ]
    return lines + further


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Print the table if any cell was compared; reports carry properties from xdist's workers."""
    differences = {
        (value[0], value[1]): Differences(*value[2:])
        for outcome in ("passed", "failed")
        for report in terminalreporter.stats.get(outcome, [])
        for name, value in getattr(report, "user_properties", [])
        if name == PROPERTY
    }
    if differences:
        terminalreporter.section(TITLE)
        for line in matrix_lines(differences):
            terminalreporter.write_line(line)
