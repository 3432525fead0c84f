"""What the GPU checks measured: one row for each test, as a table and as JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

Value = float | int | str | bool


@dataclass(frozen=True)
class MeasuredTest:
    """One test: what became of it, and the numbers that it kept."""

    test: str
    outcome: str
    seconds: float
    values: dict[str, Value]


def rows_of(reports: Iterable[Any]) -> list[MeasuredTest]:
    """Rows of pytest's reports: calls, and set-ups that did not succeed."""
    return [
        MeasuredTest(
            test=report.nodeid.removeprefix("tests/gpu/"),
            outcome=report.outcome,
            seconds=round(report.duration, 2),
            values=dict(report.user_properties),
        )
        for report in reports
        if getattr(report, "when", None) == "call"
        or (getattr(report, "when", None) == "setup" and report.outcome != "passed")
    ]


def table(rows: list[MeasuredTest]) -> str:
    """One line for each test, and one for each value under it."""
    lines = []
    for row in rows:
        lines.append(f"{row.outcome:<7}{row.seconds:8.1f} s  {row.test}")
        lines += [f"{'':19}{name} = {_shown(value)}" for name, value in row.values.items()]
    return "\n".join(lines)


def _shown(value: Value) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def write(path: Path, rows: list[MeasuredTest]) -> None:
    """Write all rows; a number that JSON cannot hold becomes text."""
    path.write_text(json.dumps([_plain(row) for row in rows], indent=1) + "\n")


def _plain(row: MeasuredTest) -> dict[str, Any]:
    values = {
        name: str(value) if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in row.values.items()
    }
    return {**asdict(row), "values": values}
