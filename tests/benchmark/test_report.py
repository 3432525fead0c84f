"""The page says what was measured, where, and whether the demands were met."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from megatron_mup.benchmark import report
from megatron_mup.benchmark.loop_cost import LoopCost
from megatron_mup.benchmark.measure import Ratio
from megatron_mup.benchmark.report import Circumstances, Comparison, document, table, write
from megatron_mup.errors import ConfigError

MEASURED = Ratio(
    value=1.012, low=0.995, high=1.0304, first_seconds=0.62, second_seconds=0.6127, pairs=200
)


def comparison(limit: float) -> Comparison:
    return Comparison(
        first="muP", second="stock Megatron-Core", model="3M", limit=limit, ratio=MEASURED
    )


def test_a_row_holds_the_numbers_and_the_verdict() -> None:
    numbers = "200 | 0.620 / 0.613 | 1.012 | 0.995 to 1.030"
    expected = f"| muP | stock Megatron-Core | 3M | {numbers} | {{}} | {{}} |"
    assert table([comparison(1.05)]).splitlines()[-1] == expected.format("1.05", "yes")
    # The ratio itself is within 1.03, the interval's end is not.
    assert table([comparison(1.03)]).splitlines()[-1] == expected.format("1.03", "NO")


def test_the_page_names_machine_versions_commit_date_and_command() -> None:
    where = Circumstances(
        machine="a processor, 2 cores", software="torch 2", commit="abc", date="today", command="go"
    )
    cost = LoopCost(
        model="11M", step_seconds=1.5, engine_seconds=1.485, share=0.01, steps=20, limit=0.02
    )
    page = document([comparison(1.05)], [cost], where)
    assert "| 11M | 20 | 1.500 | 1.485 | 1.00% | 2% | yes |" in page
    for line in ("| machine | a processor, 2 cores |", "| commit | abc |", "| command | `go` |"):
        assert line in page
    assert "| versions | torch 2 |" in page
    assert "| date | today |" in page
    assert table([comparison(1.05)]) in page


def test_circumstances_come_from_this_machine() -> None:
    found = report.circumstances("go")
    assert f"{os.cpu_count()} cores" in found.machine
    assert "megatron-core 0.19.2" in found.software
    assert found.date.endswith(" UTC")
    assert found.commit


def test_a_page_replaces_the_old_one_and_leaves_nothing_else(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("old")
    write(page, "new\n")
    assert [path.name for path in tmp_path.iterdir()] == ["page.md"]
    assert page.read_text() == "new\n"


def test_a_failed_write_keeps_the_old_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = tmp_path / "page.md"
    page.write_text("old")

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ConfigError, match=r"page\.md cannot be written \(No space left on device"):
        write(page, "new\n")
    assert [path.name for path in tmp_path.iterdir()] == ["page.md"]
    assert page.read_text() == "old"
