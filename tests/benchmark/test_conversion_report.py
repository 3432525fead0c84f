"""How measurements of conversions are judged and shown; every number here is worked out by hand."""

from __future__ import annotations

from typing import Any

from megatron_mup.benchmark.conversion_report import (
    MARK,
    Measured,
    Round,
    memory_table,
    missed,
    section,
    speed_table,
)
from megatron_mup.benchmark.conversion_runs import Cost


def one_round(wall: float, *, write: float, read: float = 1.0, peak: int = 800_000_000) -> Round:
    cost = Cost(
        wall_seconds=wall,
        peak_bytes=peak,
        read_bytes=3_000_000_000,
        written_bytes=2_000_000_000,
    )
    return Round(cost=cost, write_seconds=write, read_seconds=read)


START = Cost(wall_seconds=2.0, peak_bytes=300_000_000, read_bytes=10, written_bytes=10)
# Shares of a plain write: 0.5, 0.8 and 0.9; of reading and writing: 0.75, 0.9 and 1.
ROUNDS = (
    one_round(4.0, write=2.0),
    one_round(10.0, write=8.0, peak=900_000_000),
    one_round(10.0, write=9.0),
)


def measured(**changes: Any) -> Measured:
    values: dict[str, Any] = {
        "name": "to-hf x",
        "model": "2 x 8192",
        "parameters": 1_000_000_000,
        "largest_bytes": 250_000_000,
        "shard_bytes": 100_000_000,
        "start": START,
        "rounds": ROUNDS,
    }
    return Measured(**{**values, **changes})


def test_the_speed_is_the_median_share_of_a_plain_write() -> None:
    assert measured().speed == 0.8
    row = speed_table([measured()]).splitlines()[-1]
    assert row == (
        "| to-hf x | 2 x 8192 | 3.00 GB | 2.00 GB | 3 | 10.0 | 2.0 | 200 MB/s | 250 MB/s "
        "| 3000 MB/s | 0.90 | 0.80 | 0.50 to 0.90 | 0.70 | yes |"
    )
    assert missed([measured()]) == []


def test_memory_is_the_worst_peak_beyond_the_start() -> None:
    row = memory_table([measured()]).splitlines()[-1]
    assert row == (
        "| to-hf x | 4.00 GB | 0.25 GB | 0.10 GB | 0.90 GB | 0.30 GB | 0.60 GB | 2.40 "
        "| 0.60 GB | yes |"
    )
    # 2 x 250 MB and a shard of 100 MB are 600 MB exactly.
    assert measured().small
    assert not measured(shard_bytes=99_999_999).small


def test_every_row_has_the_cells_of_its_header() -> None:
    for table in (speed_table, memory_table):
        lines = table([measured(), measured(judged=False)]).splitlines()
        assert len({line.count("|") for line in lines}) == 1, lines


def test_what_is_missed_is_named_with_its_numbers() -> None:
    slow = measured(name="slow", rounds=(one_round(10.0, write=6.9),))
    assert missed([slow]) == [
        "slow: 0.69 of a plain write's speed, at least 0.70 is asked for",
    ]
    assert "| 0.70 | NO |" in speed_table([slow])
    large = measured(name="large", shard_bytes=0)
    assert missed([large]) == ["large: 600 MB of memory, at most 500 MB is asked for"]
    assert memory_table([large]).endswith("| NO |")


def test_a_verification_has_no_limit_on_its_speed() -> None:
    verified = measured(rounds=(one_round(10.0, write=1.0),), judged=False)
    assert missed([verified]) == []
    assert speed_table([verified]).endswith("| 0.10 to 0.10 |  |  |")


def test_the_section_says_what_was_converted_and_where() -> None:
    text = section([measured()], {"machine": "M", "command": "`C`"}, models=["line 1", "line 2"])
    assert text.startswith(f"{MARK}\n\n# Speed and memory of conversions\n\n- line 1\n- line 2\n")
    assert "| machine | M |\n| command | `C` |\n" in text
    assert speed_table([measured()]) in text
    assert memory_table([measured()]) in text
