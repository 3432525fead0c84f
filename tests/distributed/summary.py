"""Prints the equality matrix at the end of a test session, from the tests' recorded properties."""

from __future__ import annotations

from typing import Any

from tests.distributed.cells import MAIN, MODELS

PROPERTY = "largest loss difference from one rank"


def matrix_lines(differences: dict[tuple[str, str], float]) -> list[str]:
    """The table: models down, layouts across; then the further layouts, a line each.

    Args:
        differences: (model, layout) -> largest difference of the loss.
    """
    rows = [["", *MAIN]]
    for model in MODELS:
        values = [differences.get((model, layout)) for layout in MAIN]
        if any(value is not None for value in values):
            rows.append([model, *("-" if value is None else f"{value:.0e}" for value in values)])
    widths = [max(len(row[column]) for row in rows) for column in range(len(MAIN) + 1)]
    lines = [
        "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows
    ]
    further = [
        f"{layout}, {model}: {value:.0e}"
        for (model, layout), value in differences.items()
        if layout not in MAIN
    ]
    return lines + further


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Print the table if any cell was compared; reports carry properties from xdist's workers."""
    differences = {
        (value[0], value[1]): value[2]
        for outcome in ("passed", "failed")
        for report in terminalreporter.stats.get(outcome, [])
        for name, value in getattr(report, "user_properties", [])
        if name == PROPERTY
    }
    if differences:
        terminalreporter.section(PROPERTY)
        for line in matrix_lines(differences):
            terminalreporter.write_line(line)
