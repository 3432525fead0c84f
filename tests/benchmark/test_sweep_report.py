"""How measurements of sweeps are judged and shown; every number here is worked out by hand."""

from __future__ import annotations

from typing import Any

from megatron_mup.benchmark.page_sections import with_section
from megatron_mup.benchmark.sweep_report import MARK, Measured, missed, section, table


def measured(**changes: Any) -> Measured:
    values: dict[str, Any] = {
        "width": 64,
        "workers": 2,
        "cells": 12,
        "steps": 150,
        # 1.5, 1.8 and 2 times.
        "alone": (3.0, 3.6, 4.0),
        "all_cores": (2.5, 2.4, 2.6),
        "together": (2.0, 2.0, 2.0),
        "overhead": 0.5,
    }
    return Measured(**{**values, **changes})


def test_the_median_of_the_rounds_is_judged() -> None:
    assert measured().gain == 1.8
    assert table([measured()]).splitlines()[-1] == (
        "| 64 | 2 | 150 steps | 3 | 3.60 | 2.50 | 2.00 | 1.80 | 1.50 to 2.00 | 1.70 | yes | 0.50 "
        "| 2.00 | yes |"
    )
    assert missed([measured()]) == []


def test_what_is_missed_is_said() -> None:
    slow = measured(alone=(3.2, 3.2, 3.2), overhead=2.0)
    assert missed([slow]) == [
        "width 64: 2 workers give 1.60 times the throughput, less than 1.70",
        "width 64: a run of one step takes 2.00 s, not less than 2",
    ]
    assert table([slow]).count("NO") == 2
    # Four workers are to give 3.4 times.
    assert measured(workers=4).least_gain == 3.4
    assert len(missed([measured(workers=4)])) == 1


def test_the_section_replaces_its_own_part_of_the_page() -> None:
    text = section([measured()], {"machine": "a box", "command": "`x`"})
    assert text.startswith(MARK)
    assert "| machine | a box |" in text
    page = with_section("# Benchmarks\n", MARK, text)
    again = with_section(page, MARK, section([measured(width=128)], {}))
    assert again.count(MARK) == 1
    assert "| 128 |" in again
    assert "| 64 |" not in again
