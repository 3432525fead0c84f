"""What was measured of preprocessing, judged, as a section of the page of benchmarks.

The section begins at ``MARK`` and ends where the next command's begins (``page_sections``).
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_mup.benchmark import page_sections
from megatron_mup.benchmark.preprocessing_inputs import Prepared
from megatron_mup.benchmark.preprocessing_memory import Footprint
from megatron_mup.benchmark.preprocessing_runs import Cost

MARK = "<!-- preprocessing: written by python -m megatron_mup.benchmark.preprocessing -->"
"""First line of the section."""

MEMORY_LIMIT_BYTES = 1_000_000_000
"""What preprocessing may hold, whatever the size of its input."""

ENGINE_LIMIT = 0.60
"""Least share of the engine's own speed that the whole job must reach once both are warm."""

REFERENCE_LIMITS = {"BPE": 6.0, "Unigram": 1.5}
"""Least factor over Megatron-LM's way, by the tokenizer's algorithm."""

WHOLE_JOB = "whole job"
START = "whole job on the head"
WARM = "whole job after its start"
ENGINE = "engine alone"
MEGATRON = "Megatron-LM's way"


@dataclass(frozen=True, order=True)
class Contestant:
    """One thing that is timed in every round."""

    name: str
    workers: int

    def __str__(self) -> str:
        return f"{self.name}, {self.workers} worker{'s' if self.workers > 1 else ''}"


@dataclass(frozen=True, kw_only=True)
class Rounds:
    """The rounds with one tokenizer."""

    algorithm: str
    """"BPE" or "Unigram"."""

    workers: int
    """Processes of the contestants that are compared."""

    costs: dict[Contestant, list[Cost]]
    """One cost for each round."""

    difference: str | None
    """Where the shard differs from that of Megatron-LM's way; None if no byte does."""


@dataclass(frozen=True, kw_only=True)
class LargeRun:
    """The whole job, as a command, on a large input."""

    algorithm: str
    form: str
    """How the input is stored."""

    workers: int
    text_bytes: int
    footprint: Footprint

    @property
    def met(self) -> bool:
        """Whether it held less than the limit."""
        return self.footprint.peak_bytes < MEMORY_LIMIT_BYTES


@dataclass(frozen=True, kw_only=True)
class SpeedRatio:
    """How many times as fast one contestant is as another."""

    algorithm: str
    first: Contestant
    second: Contestant
    value: float
    """Ratio of the medians of their speeds."""

    low: float
    """Smallest ratio within a round."""

    high: float
    """Largest ratio within a round."""

    limit: float | None
    """The least value that is asked for."""

    @property
    def met(self) -> bool:
        """Whether it is reached, or nothing is asked for."""
        return self.limit is None or self.value >= self.limit


def with_warm(costs: dict[Contestant, list[Cost]]) -> dict[Contestant, list[Cost]]:
    """Add the whole job after its start: in each round, the whole job less the job on the head."""
    warm = {
        Contestant(WARM, one.workers): [
            Cost(
                text_bytes=whole.text_bytes - head.text_bytes,
                # So little text that noise decides must not divide by zero.
                wall_seconds=max(whole.wall_seconds - head.wall_seconds, 1e-6),
                cpu_seconds=whole.cpu_seconds - head.cpu_seconds,
            )
            for whole, head in zip(
                costs[Contestant(WHOLE_JOB, one.workers)], costs[one], strict=True
            )
        ]
        for one in costs
        if one.name == START
    }
    return {**costs, **warm}


def speed_ratios(rounds: Rounds) -> list[SpeedRatio]:
    """The comparisons that matter, of one tokenizer."""
    job, warm, engine = (Contestant(name, rounds.workers) for name in (WHOLE_JOB, WARM, ENGINE))
    found = [
        _ratio(rounds, warm, engine, ENGINE_LIMIT),
        _ratio(rounds, job, engine, None),
        _ratio(
            rounds,
            job,
            Contestant(MEGATRON, rounds.workers),
            REFERENCE_LIMITS.get(rounds.algorithm),
        ),
    ]
    if rounds.workers > 1:
        found += [
            _ratio(rounds, several, Contestant(several.name, 1), None) for several in (warm, engine)
        ]
    return found


def _ratio(
    rounds: Rounds, first: Contestant, second: Contestant, limit: float | None
) -> SpeedRatio:
    speeds = [[cost.speed for cost in rounds.costs[one]] for one in (first, second)]
    by_round = [fast / slow for fast, slow in zip(*speeds, strict=True)]
    return SpeedRatio(
        algorithm=rounds.algorithm,
        first=first,
        second=second,
        value=statistics.median(speeds[0]) / statistics.median(speeds[1]),
        low=min(by_round),
        high=max(by_round),
        limit=limit,
    )


def missed(rounds: Sequence[Rounds], large: Sequence[LargeRun]) -> list[str]:
    """One line for each demand that was not met."""
    lines = [
        f"{one.algorithm}: the shard is not Megatron-LM's: {one.difference}"
        for one in rounds
        if one.difference is not None
    ]
    lines += [
        f"{ratio.algorithm}: {ratio.first} is {ratio.value:.2f} times as fast as {ratio.second}, "
        f"at least {ratio.limit:.2f} is asked for"
        for one in rounds
        for ratio in speed_ratios(one)
        if not ratio.met
    ]
    lines += [
        f"{run.algorithm}, {run.form}: {run.footprint.peak_bytes / 1e6:.0f} MB of memory, less "
        f"than {MEMORY_LIMIT_BYTES / 1e6:.0f} MB is asked for"
        for run in large
        if not run.met
    ]
    return lines


def speed_table(rounds: Sequence[Rounds]) -> str:
    """Markdown table of what each contestant took: medians over rounds."""
    rows = ["| tokenizer | what | rounds | MB/s | wall s | CPU s |", "|---|---|---|---|---|---|"]
    for one in rounds:
        for contestant, costs in one.costs.items():
            wall, cpu = (
                statistics.median(getattr(cost, name) for cost in costs)
                for name in ("wall_seconds", "cpu_seconds")
            )
            speed = statistics.median(cost.speed for cost in costs)
            rows.append(
                f"| {one.algorithm} | {contestant} | {len(costs)} | {speed:.1f} | {wall:.2f} "
                f"| {cpu:.2f} |"
            )
    return "\n".join(rows)


def ratio_table(rounds: Sequence[Rounds]) -> str:
    """Markdown table of the comparisons."""
    rows = [
        "| tokenizer | speed of | against | ratio | least to most | at least | met |",
        "|---|---|---|---|---|---|---|",
    ]
    for ratio in (ratio for one in rounds for ratio in speed_ratios(one)):
        judged = " | " if ratio.limit is None else f"{ratio.limit:.2f} | {_verdict(ratio.met)}"
        rows.append(
            f"| {ratio.algorithm} | {ratio.first} | {ratio.second} | {ratio.value:.2f} "
            f"| {ratio.low:.2f} to {ratio.high:.2f} | {judged} |"
        )
    return "\n".join(rows)


def large_table(runs: Sequence[LargeRun]) -> str:
    """Markdown table of the runs on a large input."""
    rows = [
        "| tokenizer | input | text | workers | MB/s | peak memory | under | met |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for run in runs:
        speed = run.text_bytes / 1e6 / run.footprint.wall_seconds
        rows.append(
            f"| {run.algorithm} | {run.form} | {run.text_bytes / 1e9:.2f} GB | {run.workers} "
            f"| {speed:.1f} | {run.footprint.peak_bytes / 1e6:.0f} MB "
            f"| {MEMORY_LIMIT_BYTES / 1e6:.0f} MB | {_verdict(run.met)} |"
        )
    return "\n".join(rows)


def identity_lines(rounds: Sequence[Rounds]) -> str:
    """What the comparison of the shards found, a line for each tokenizer."""
    return "\n".join(
        f"- {one.algorithm}: .bin and .idx are those of Megatron-LM's way, byte for byte."
        if one.difference is None
        else f"- {one.algorithm}: NOT the shard of Megatron-LM's way: {one.difference}."
        for one in rounds
    )


def _verdict(met: bool) -> str:
    return "yes" if met else "NO"


def section(
    rounds: Sequence[Rounds],
    large: Sequence[LargeRun],
    prepared: Prepared,
    title: str,
    circumstances: dict[str, str],
) -> str:
    """The whole section, Markdown.

    Args:
        rounds: The rounds, of one tokenizer each.
        large: The runs on a large input; none leaves their table out.
        prepared: The text that was measured on.
        title: What that text is.
        circumstances: Machine, versions, commit, date and command, by name.
    """
    facts = "\n".join(f"| {name} | {value} |" for name, value in circumstances.items())
    parts = [
        MARK,
        "# Speed of preprocessing",
        f"Text: {title}; {prepared.text_bytes / 1e6:.1f} MB in {prepared.documents} documents "
        f"({prepared.left_out} without text or with U+2581 left out). Medians over rounds.",
        speed_table(rounds),
        "Ratios are those of the medians; least and most are those within a round.",
        ratio_table(rounds),
        identity_lines(rounds),
    ]
    if large:
        parts += [_LARGE_TEXT, large_table(large)]
    return "\n\n".join([*parts, f"| | |\n|---|---|\n{facts}", _METHOD])


def with_section(page: str, new_section: str) -> str:
    """Put the section into a page, in place of the one that is there."""
    return page_sections.with_section(page, MARK, new_section)


def keep_section(old_page: str, new_page: str) -> str:
    """Return a new page with the marked sections that the old one has, if it has any."""
    kept = page_sections.sections_of(old_page)
    return f"{new_page.rstrip()}\n\n{kept}" if kept else new_page


# Constants, so that no measurement's number can slip into what does not depend on it.
_LARGE_TEXT = """\
One run each of the command `megatron-mup data preprocess` on an input larger than the limit on its
memory, from the start of the command to its end. The input repeats the text; in the k-th repetition
the words of each document are rotated by k (the first k go to its end) and the letters are moved on
by k in the alphabet, so that an engine that remembers words meets new ones all the time. It is not
English any more, and slower to encode. Memory is the largest sum, over the command and all its
processes, of resident memory, looked at ten times a second; shared pages count in each process."""

_METHOD = """\
## What is measured

MB are 10^6 bytes of UTF-8 text. Each round runs every contestant once, in an order that turns round
from one round to the next; each run has processes of its own. The input was read just before, so it
is in the page cache for all.

- **whole job**: `data.preprocess.preprocess` into one shard, with `--engine auto`: from loading the
  tokenizer to the published manifest. Included are the start of the worker processes, the parity
  check of the engine, reading, JSON, hashing, the sampled audit, writing, syncing to the disk and
  assembly. The engine's caches are cold when it begins.
- **whole job after its start**: the whole job less, in the same round, the whole job on the first
  megabytes of the text ("on the head"). What is left is the speed once processes run and engines
  are built, which an engine alone that is warm is fairly compared with, and which a large corpus
  gets.
- **engine alone**: the engine that `--engine auto` takes, on texts in memory, each process with
  its share. The processes have started, hold their texts and have encoded the head before the
  clock starts, which is not counted: both have seen the same text then. Nothing is read, hashed
  or written.
- **Megatron-LM's way**: `megatron_mup/benchmark/preprocessing_reference.py`, written from the
  behaviour of Megatron-LM's `tools/preprocess_data.py`: a pool of processes, 32 lines at a time,
  sentencepiece ids as Python lists, written by the parent process through megatron-core's
  `IndexedDatasetBuilder`; nothing is synced. The imports of torch and megatron-core, which take
  seconds, are not counted.
"""
