"""The page says what was measured, where, and whether the demands were met."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from megatron_mup.benchmark import report
from megatron_mup.benchmark.loop_cost import (
    BATCHES,
    ENGINE,
    GUARDS,
    METRICS,
    REST,
    SIGNALS,
    ZEROING,
    LoopCost,
)
from megatron_mup.benchmark.measure import Ratio
from megatron_mup.benchmark.report import (
    Circumstances,
    Comparison,
    document,
    profile_table,
    save_table,
    table,
    write,
)
from megatron_mup.benchmark.save_cost import SaveCost, Times
from megatron_mup.errors import ConfigError

MEASURED = Ratio(
    value=1.012, low=0.995, high=1.0304, first_seconds=0.62, second_seconds=0.6127, pairs=200
)

LOOP = LoopCost(
    model="11M",
    seconds={
        ENGINE: 1.485,
        ZEROING: 0.006,
        BATCHES: 0.003,
        METRICS: 0.003,
        GUARDS: 0.0015,
        SIGNALS: 0.0,
        REST: 0.0015,
    },
    steps=20,
    limit=0.02,
)


def save_cost(limit: float) -> SaveCost:
    return SaveCost(
        model="11M",
        saves=8,
        step=Times(0.5, 0.6),
        beside=Times(0.75, 0.8),
        start=Times(0.05, 0.1),
        publishing=Times(0.01, 0.02),
        stopped=Times(0.0625, 0.125),
        slowed=Times(0.25, 0.3),
        at_once=Times(0.2, 1.0),
        limit=limit,
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
    page = document([comparison(1.05)], [LOOP], [save_cost(1.0)], where)
    assert "| 11M | 20 | 1.500 | 1.485 | 1.00% | 2% | yes |" in page
    for line in ("| machine | a processor, 2 cores |", "| commit | abc |", "| command | `go` |"):
        assert line in page
    assert "| versions | torch 2 |" in page
    assert "| date | today |" in page
    assert table([comparison(1.05)]) in page
    assert profile_table([LOOP]) in page
    assert save_table([save_cost(1.0)]) in page


def test_the_loops_time_is_divided_into_its_parts() -> None:
    header, rule, row = profile_table([LOOP]).splitlines()
    assert header == (
        "| model | zeroing gradients | batches | metrics and log | bad steps | requests to stop "
        "| the rest | loop |"
    )
    assert rule.count("|") == header.count("|")
    parts = "6.00 (0.40%) | 3.00 (0.20%) | 3.00 (0.20%) | 1.50 (0.10%) | 0.00 (0.00%)"
    assert row == f"| 11M | {parts} | 1.50 (0.10%) | 15.00 (1.00%) |"


def test_saving_is_told_in_milliseconds_and_steps_and_the_worst_stop_is_judged() -> None:
    assert save_table([save_cost(1.0)]).splitlines()[2:] == [
        "| 11M | 8 | background: staging, forking | 50 / 100 | 0.100 / 0.200 |  |  |",
        "| 11M | 8 | background: publishing | 10 / 20 | 0.020 / 0.040 |  |  |",
        "| 11M | 8 | background: training stopped, in all | 62 / 125 | 0.125 / 0.250 "
        "| 1 step | yes |",
        "| 11M | 8 | background: steps beside the writer slowed by | 250 / 300 | 0.500 / 0.600 "
        "|  |  |",
        "| 11M | 8 | at once | 200 / 1000 | 0.400 / 2.000 |  |  |",
        "| 11M | 8 | a step | 500 / 600 | 1.000 / 1.200 |  |  |",
        "| 11M | 8 | a step beside the writer | 750 / 800 | 1.500 / 1.600 |  |  |",
    ]
    assert "0.125 / 0.250 | 0.25 step | NO |" in save_table([save_cost(0.25)])


def test_circumstances_come_from_this_machine() -> None:
    found = report.circumstances("go")
    assert f"{os.cpu_count()} cores" in found.machine
    assert "megatron-core 0.19.2" in found.software
    assert found.date.endswith(" UTC")
    assert found.commit


def test_on_a_gpu_the_circumstances_name_its_libraries(monkeypatch: pytest.MonkeyPatch) -> None:
    installed = {"megatron-core": "0.19.2", "torch": "2.11.0", "transformer-engine": "2.20.2"}
    monkeypatch.setattr(report.platform, "has_cuda", lambda: True)
    monkeypatch.setattr(report, "version", installed.__getitem__)
    monkeypatch.setattr("torch.version.cuda", "13.0")
    monkeypatch.setattr("torch.backends.cudnn.version", lambda: 91900)
    assert (
        "megatron-core 0.19.2, torch 2.11.0, CUDA 13.0, cuDNN 91900, transformer-engine 2.20.2"
        in report.circumstances("go").software
    )


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
