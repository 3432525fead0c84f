"""The section says what was measured and judges it, and leaves the rest of the page alone."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from megatron_mup.benchmark.preprocessing_inputs import Prepared
from megatron_mup.benchmark.preprocessing_memory import Footprint
from megatron_mup.benchmark.preprocessing_report import (
    ENGINE,
    MARK,
    MEGATRON,
    START,
    WARM,
    WHOLE_JOB,
    Contestant,
    LargeRun,
    Rounds,
    identity_lines,
    keep_section,
    large_table,
    missed,
    ratio_table,
    section,
    speed_ratios,
    speed_table,
    with_section,
    with_warm,
)
from megatron_mup.benchmark.preprocessing_runs import Cost


def costs(*wall_seconds: float) -> list[Cost]:
    return [
        Cost(text_bytes=60_000_000, wall_seconds=seconds, cpu_seconds=2 * seconds)
        for seconds in wall_seconds
    ]


ROUNDS = Rounds(
    algorithm="BPE",
    workers=2,
    costs={
        Contestant(WHOLE_JOB, 2): costs(1.0, 2.0, 1.5),
        Contestant(WHOLE_JOB, 1): costs(2.0, 3.0, 3.0),
        Contestant(WARM, 2): costs(0.75, 1.5, 1.5),
        Contestant(WARM, 1): costs(1.5, 3.0, 3.0),
        Contestant(ENGINE, 2): costs(0.75, 1.0, 1.2),
        Contestant(ENGINE, 1): costs(1.5, 2.0, 2.4),
        Contestant(MEGATRON, 2): costs(12.0, 12.0, 12.0),
    },
    difference=None,
)

LARGE = LargeRun(
    algorithm="BPE",
    form="JSON lines",
    workers=2,
    text_bytes=2_000_000_000,
    footprint=Footprint(peak_bytes=612_400_000, wall_seconds=40.0),
)


def test_speeds_are_medians_over_rounds() -> None:
    header, _, *rows = speed_table([ROUNDS]).splitlines()
    assert header == "| tokenizer | what | rounds | MB/s | wall s | CPU s |"
    assert rows[0] == "| BPE | whole job, 2 workers | 3 | 40.0 | 1.50 | 3.00 |"
    assert rows[1] == "| BPE | whole job, 1 worker | 3 | 20.0 | 3.00 | 6.00 |"
    assert rows[6] == "| BPE | Megatron-LM's way, 2 workers | 3 | 5.0 | 12.00 | 24.00 |"


def test_ratios_are_of_medians_with_the_extremes_of_the_rounds_and_the_verdict() -> None:
    rows = ratio_table([ROUNDS]).splitlines()[2:]
    job, engine = "whole job, 2 workers", "engine alone, 2 workers"
    warm = "whole job after its start"
    assert rows == [
        f"| BPE | {warm}, 2 workers | {engine} | 0.67 | 0.67 to 1.00 | 0.60 | yes |",
        f"| BPE | {job} | {engine} | 0.67 | 0.50 to 0.80 |  |  |",
        f"| BPE | {job} | Megatron-LM's way, 2 workers | 8.00 | 6.00 to 12.00 | 6.00 | yes |",
        f"| BPE | {warm}, 2 workers | {warm}, 1 worker | 2.00 | 2.00 to 2.00 |  |  |",
        f"| BPE | {engine} | engine alone, 1 worker | 2.00 | 2.00 to 2.00 |  |  |",
    ]


def test_the_job_after_its_start_is_the_job_less_the_head_of_the_same_round() -> None:
    whole, head = Contestant(WHOLE_JOB, 2), Contestant(START, 2)
    both = {whole: costs(3.0, 5.0), head: costs(1.0, 5.0)}
    both[head] = [dataclasses.replace(cost, text_bytes=10_000_000) for cost in both[head]]
    found = with_warm(both)
    assert found[whole] == both[whole]
    assert found[Contestant(WARM, 2)] == [
        Cost(text_bytes=50_000_000, wall_seconds=2.0, cpu_seconds=4.0),
        Cost(text_bytes=50_000_000, wall_seconds=1e-6, cpu_seconds=0.0),
    ]


def test_one_worker_is_compared_with_nothing_but_itself() -> None:
    single = {one: ROUNDS.costs[one] for one in ROUNDS.costs if one.workers == 1}
    single[Contestant(MEGATRON, 1)] = costs(12.0, 12.0, 12.0)
    alone = dataclasses.replace(ROUNDS, workers=1, costs=single)
    assert [ratio.second.name for ratio in speed_ratios(alone)] == [ENGINE, ENGINE, MEGATRON]


def test_what_is_asked_for_depends_on_the_algorithm() -> None:
    unigram = dataclasses.replace(ROUNDS, algorithm="Unigram")
    assert [ratio.limit for ratio in speed_ratios(unigram)] == [0.60, None, 1.5, None, None]
    other = dataclasses.replace(ROUNDS, algorithm="my.model")
    assert [ratio.limit for ratio in speed_ratios(other)] == [0.60, None, None, None, None]


def test_missed_demands_are_named_with_their_numbers() -> None:
    assert missed([ROUNDS], [LARGE]) == []
    slow = dataclasses.replace(
        ROUNDS,
        costs={
            **ROUNDS.costs,
            Contestant(WHOLE_JOB, 2): costs(3.0, 3.0, 3.0),
            Contestant(WARM, 2): costs(2.0, 2.0, 2.0),
        },
        difference="document 4 (counted from 0) differs",
    )
    large = dataclasses.replace(LARGE, footprint=Footprint(peak_bytes=10**9, wall_seconds=1.0))
    assert missed([slow], [large]) == [
        "BPE: the shard is not Megatron-LM's: document 4 (counted from 0) differs",
        "BPE: whole job after its start, 2 workers is 0.50 times as fast as engine alone, 2 "
        "workers, at least 0.60 is asked for",
        "BPE: whole job, 2 workers is 4.00 times as fast as Megatron-LM's way, 2 workers, at least "
        "6.00 is asked for",
        "BPE, JSON lines: 1000 MB of memory, less than 1000 MB is asked for",
    ]
    assert "| 0.50 | 0.38 to 0.60 | 0.60 | NO |" in ratio_table([slow])
    assert "| 1000 MB | 1000 MB | NO |" in large_table([large])
    assert identity_lines([slow]) == (
        "- BPE: NOT the shard of Megatron-LM's way: document 4 (counted from 0) differs."
    )


def test_a_large_run_shows_size_speed_and_memory() -> None:
    row = large_table([LARGE]).splitlines()[-1]
    assert row == "| BPE | JSON lines | 2.00 GB | 2 | 50.0 | 612 MB | 1000 MB | yes |"


def written(large: list[LargeRun]) -> str:
    prepared = Prepared(path=Path("x"), documents=7, text_bytes=77_120_000, left_out=3)
    where = {"commit": "abc", "date": "today"}
    return section([ROUNDS], large, prepared, "100 novels", where)


def test_the_section_holds_tables_text_and_circumstances() -> None:
    text = written([LARGE])
    assert text.startswith(f"{MARK}\n\n# Speed of preprocessing\n")
    assert "Text: 100 novels; 77.1 MB in 7 documents (3 without text or with U+2581" in text
    for part in (speed_table([ROUNDS]), ratio_table([ROUNDS]), large_table([LARGE])):
        assert part in text
    assert "- BPE: .bin and .idx are those of Megatron-LM's way, byte for byte." in text
    assert "| commit | abc |\n| date | today |" in text
    assert "peak memory" not in written([])


@pytest.mark.parametrize("old", [written([]), ""])
def test_a_new_section_replaces_the_old_one_and_nothing_else(old: str) -> None:
    page = f"# Speed of a training step\n\ntext\n\n{old}"
    assert with_section(page, written([LARGE])) == (
        f"# Speed of a training step\n\ntext\n\n{written([LARGE])}"
    )
    assert with_section(old, "new\n") == "new\n"


def test_a_new_page_keeps_the_section_of_the_old_one() -> None:
    old = f"# Speed of a training step\n\nold\n\n{written([])}"
    assert keep_section(old, "new\n") == f"new\n\n{written([])}"
    assert keep_section("old\n", "new\n") == "new\n"
