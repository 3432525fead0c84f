"""The chapter on how the runs were made."""

import math

from megatron_mup.transfer.report.document import Table
from megatron_mup.transfer.report.provenance import provenance
from megatron_mup.transfer.report.study import study_rows
from megatron_mup.transfer.runs import Row, Status
from tests.transfer.report.sample_rows import a_row


def tables(rows: list[Row], **settings: str) -> tuple[dict[str, str], tuple[str, ...]]:
    """Facts by name, and the line of the first size."""
    blocks = provenance(study_rows(rows), **({"command": "", "source": ""} | settings))
    facts, sizes = (block for block in blocks if isinstance(block, Table))
    return dict(facts.rows), sizes.rows[0]


def test_everything_is_told_from_the_rows():
    rows = [
        a_row(log2_lr=-7.0, seconds=1800.0, started="2026-01-02T03:04:05+00:00"),
        a_row(log2_lr=-6.0, seconds=5400.0, seed=2, started="2026-01-01T00:00:00+00:00"),
        a_row(log2_lr=-5.0, seconds=3600.0, status=Status.DIVERGED, validation_loss=math.nan),
    ]

    facts, size = tables(rows, command="megatron-mup sweep report out", source="out/runs.csv")

    assert facts == {
        "report made by": "megatron-mup sweep report out",
        "table of runs": "out/runs.csv",
        "sweep": "sample",
        "runs": "3 runs: 2 finished, 1 diverged",
        "seeds": "1, 2",
        "run time, summed over runs": "3.0 hours",
        "machine": "two cores of a laptop",
        "first and last start (UTC)": "2026-01-01T00:00:00 to 2026-01-02T03:04:05",
        "data (SHA-256)": "d" * 64,
        "held-out tokens": "200,000",
        "commit": "0123456789abcdef",
        "megatron-mup": "0.1.0",
        "torch": "2.11.0",
        "megatron-core": "0.19.2",
    }
    assert size == ("64", "100,000", "50,000", "500", "2,048,000", "3", "1.5 hours")


def test_time_is_told_for_each_machine():
    rows = [a_row(machine="GPU A", seconds=7200.0), a_row(machine="GPU B", seconds=1800.0, seed=2)]

    facts, _ = tables(rows)

    assert facts["run time, summed over runs"] == (
        "2.5 hours: 2.0 hours on GPU A; 30.0 minutes on GPU B"
    )


def test_what_a_table_of_another_program_lacks_is_not_recorded():
    lacking = {"commit": "", "torch": "", "machine": "", "started": "", "data_sha256": ""}
    rows = [a_row(**lacking, tokens=0, planned_steps=0, validation_tokens=0, seconds=math.nan)]

    facts, size = tables(rows)

    unknown = {name for name, value in facts.items() if value == "not recorded"}
    assert unknown == {
        "report made by",
        "table of runs",
        "run time, summed over runs",
        "machine",
        "first and last start (UTC)",
        "data (SHA-256)",
        "held-out tokens",
        "commit",
        "torch",
    }
    assert size[3:5] == ("not recorded", "not recorded")
    assert size[6] == "not recorded"
