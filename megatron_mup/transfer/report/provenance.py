"""How the runs were made, from their rows alone; what a row does not tell is "not recorded"."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from megatron_mup.transfer.report.document import Block, Heading, Paragraph, Table
from megatron_mup.transfer.report.study import Study
from megatron_mup.transfer.report.wording import counted, duration, shortened, size_text
from megatron_mup.transfer.runs import Row, Status


def provenance(study: Study, *, command: str, source: str) -> list[Block]:
    """The chapter "how this was made".

    Args:
        study: whose runs to describe.
        command: that made the report; empty: not said.
        source: the table that was read; empty: not said.
    """
    rows = study.rows
    facts = [
        ("report made by", command),
        ("table of runs", source),
        ("sweep", shortened(_texts(row.sweep for row in rows))),
        ("runs", _runs(rows)),
        ("seeds", _seeds(study)),
        ("run time, summed over runs", _hours(rows)),
        ("machine", shortened(_texts(row.machine for row in rows))),
        ("first and last start (UTC)", _period(rows)),
        ("data (SHA-256)", shortened(_texts(row.data_sha256 for row in rows))),
        ("held-out tokens", shortened(_counts(row.validation_tokens for row in rows))),
        ("commit", shortened(_texts(row.commit for row in rows))),
        ("megatron-mup", shortened(_texts(row.version for row in rows))),
        ("torch", shortened(_texts(row.torch for row in rows))),
        ("megatron-core", shortened(_texts(row.megatron_core for row in rows))),
    ]
    shown = tuple((name, value or "not recorded") for name, value in facts)
    return [
        Heading("How this was made"),
        Table(("what", "value"), shown),
        _sizes(study),
        Paragraph(
            "Each run's whole configuration is named by its cell in the table of runs; "
            "'megatron-mup sweep config DIR CELL' prints it."
        ),
    ]


def _seeds(study: Study) -> str:
    if not study.seeds_known:
        return ""
    return shortened([str(seed) for seed in sorted({row.seed for row in study.rows})], most=12)


def _texts(values: Iterable[str]) -> list[str]:
    return [value for value in values if value]


def _counts(values: Iterable[int]) -> list[str]:
    """Zero is what a table of another program leaves."""
    return [f"{value:,}" for value in sorted(set(values)) if value]


def _runs(rows: Sequence[Row]) -> str:
    found = [row.status for row in rows]
    names = {Status.STOPPED_EARLY: "stopped early"}
    parts = [
        f"{found.count(status):,} {names.get(status, status.value)}"
        for status in Status
        if status in found
    ]
    return f"{counted(len(rows), 'run')}: {', '.join(parts)}"


def _hours(rows: Sequence[Row]) -> str:
    """Total, and by machine where there are several kinds."""
    by_machine: dict[str, float] = {}
    for row in rows:
        if math.isfinite(row.seconds):
            by_machine[row.machine] = by_machine.get(row.machine, 0.0) + row.seconds
    total = sum(by_machine.values())
    if not total:
        return ""
    if len(by_machine) == 1:
        return duration(total)
    parts = [
        f"{duration(spent)} on {name or 'an unnamed machine'}" for name, spent in by_machine.items()
    ]
    return f"{duration(total)}: {'; '.join(parts)}"


def _period(rows: Sequence[Row]) -> str:
    starts = sorted(_texts(row.started for row in rows))
    return f"{starts[0][:19]} to {starts[-1][:19]}" if starts else ""


def _sizes(study: Study) -> Table:
    """What a run of each size costs."""
    lines = []
    for size in study.sizes:
        rows = [row for row in study.rows if row.size == size]
        whole = [row for row in rows if row.status is Status.FINISHED]
        seconds = sorted(row.seconds for row in whole if math.isfinite(row.seconds))
        middle = duration(seconds[len(seconds) // 2]) if seconds and seconds[-1] else ""
        lines.append(
            (
                size_text(size),
                shortened(_counts(row.parameters for row in rows)),
                shortened(_counts(row.non_embedding_parameters for row in rows)),
                shortened(_counts(row.planned_steps for row in rows)),
                shortened(_counts(row.tokens for row in whole)),
                f"{len(rows):,}",
                middle,
            )
        )
    head = (study.axis, "parameters", "non-embedding", "steps", "tokens a run", "runs")
    filled = tuple(tuple(cell or "not recorded" for cell in line) for line in lines)
    return Table((*head, "time of a run (median)"), filled)
