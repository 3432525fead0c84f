"""What was measured of conversions, judged, as a section of the page of benchmarks."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from megatron_mup.benchmark.conversion_runs import Cost

MARK = "<!-- conversion: written by python -m megatron_mup.benchmark.conversion -->"
"""First line of the section."""

SPEED_LIMIT = 0.70
"""Least share of the speed of a plain write of the same bytes that a conversion must reach."""


@dataclass(frozen=True, kw_only=True)
class Round:
    """One run of a conversion beside a plain write and a plain read."""

    cost: Cost
    write_seconds: float
    """Plain write of as many bytes as the conversion wrote."""

    read_seconds: float
    """Plain read of the conversion's source."""

    @property
    def speed(self) -> float:
        """Share of the plain write's speed."""
        return self.write_seconds / self.cost.wall_seconds

    @property
    def copy_speed(self) -> float:
        """Share of the speed of reading the source and then writing the output."""
        return (self.read_seconds + self.write_seconds) / self.cost.wall_seconds


@dataclass(frozen=True, kw_only=True)
class Measured:
    """All rounds of one conversion.

    Attributes:
        name: of the conversion.
        model: the model in words.
        parameters: of the model.
        largest_bytes: its largest tensor in fp32.
        shard_bytes: an output shard at most.
        start: the same command on a tiny model: all but the weights.
        rounds: the runs.
        judged: whether the speed has a limit; a verification has none.
    """

    name: str
    model: str
    parameters: int
    largest_bytes: int
    shard_bytes: int
    start: Cost
    rounds: tuple[Round, ...]
    judged: bool = True

    @property
    def peak_bytes(self) -> int:
        """Memory of the worst round beyond that of the tiny model."""
        return max(one.cost.peak_bytes for one in self.rounds) - self.start.peak_bytes

    @property
    def memory_limit(self) -> int:
        """What it may hold: two of the largest tensors and one output shard."""
        return 2 * self.largest_bytes + self.shard_bytes

    @property
    def wall_seconds(self) -> float:
        """Median over rounds."""
        return statistics.median(one.cost.wall_seconds for one in self.rounds)

    @property
    def speed(self) -> float:
        """Share of the plain write's speed, median over rounds."""
        return statistics.median(one.speed for one in self.rounds)

    @property
    def fast(self) -> bool:
        """Whether the limit on speed is kept, if there is one."""
        return not self.judged or self.speed >= SPEED_LIMIT

    @property
    def small(self) -> bool:
        """Whether the limit on memory is kept."""
        return self.peak_bytes <= self.memory_limit


def missed(measured: Sequence[Measured]) -> list[str]:
    """One line for each demand that was not met."""
    lines = [
        f"{one.name}: {one.speed:.2f} of a plain write's speed, at least {SPEED_LIMIT:.2f} is "
        "asked for"
        for one in measured
        if not one.fast
    ]
    lines += [
        f"{one.name}: {one.peak_bytes / 1e6:.0f} MB of memory, at most "
        f"{one.memory_limit / 1e6:.0f} MB is asked for"
        for one in measured
        if not one.small
    ]
    return lines


def speed_table(measured: Sequence[Measured]) -> str:
    """Markdown table of the speeds: medians over rounds."""
    rows = [
        "| conversion | model | source | output | rounds | wall s | start s | written | "
        "plain write | plain read | of read + write | of write | least to most | at least | met |",
        "|---" * 15 + "|",
    ]
    for one in measured:
        costs = [item.cost for item in one.rounds]
        ratios = [item.speed for item in one.rounds]
        limit = f"{SPEED_LIMIT:.2f} | {_verdict(one.fast)}" if one.judged else " | "
        cells = [
            one.name,
            one.model,
            _gigabytes(costs[0].read_bytes),
            _gigabytes(costs[0].written_bytes),
            str(len(costs)),
            f"{one.wall_seconds:.1f}",
            f"{one.start.wall_seconds:.1f}",
            _median_speed([(item.written_bytes, item.wall_seconds) for item in costs]),
            _median_speed([(item.cost.written_bytes, item.write_seconds) for item in one.rounds]),
            _median_speed([(item.cost.read_bytes, item.read_seconds) for item in one.rounds]),
            f"{statistics.median(item.copy_speed for item in one.rounds):.2f}",
            f"{one.speed:.2f}",
            f"{min(ratios):.2f} to {max(ratios):.2f}",
        ]
        rows.append(f"| {' | '.join(cells)} | {limit} |")
    return "\n".join(rows)


def memory_table(measured: Sequence[Measured]) -> str:
    """Markdown table of peak memory: the worst of the rounds."""
    rows = [
        "| conversion | weights in fp32 | largest tensor | output shard | peak | of it start "
        "| beyond start | in largest tensors | at most | met |",
        "|---" * 10 + "|",
    ]
    for one in measured:
        peak = one.peak_bytes + one.start.peak_bytes
        sizes = (4 * one.parameters, one.largest_bytes, one.shard_bytes, peak)
        cells = [one.name, *map(_gigabytes, sizes), _gigabytes(one.start.peak_bytes)]
        cells += [_gigabytes(one.peak_bytes), f"{one.peak_bytes / one.largest_bytes:.2f}"]
        cells += [_gigabytes(one.memory_limit), _verdict(one.small)]
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)


def section(
    measured: Sequence[Measured], circumstances: Mapping[str, str], *, models: Sequence[str]
) -> str:
    """The whole section, Markdown.

    Args:
        measured: the conversions.
        circumstances: Machine, versions, commit, date and command, by name.
        models: one line for each model that was converted.
    """
    facts = "\n".join(f"| {name} | {value} |" for name, value in circumstances.items())
    parts = [
        MARK,
        "# Speed and memory of conversions",
        "\n".join(f"- {line}" for line in models),
        "Speed, medians over rounds:",
        speed_table(measured),
        "Memory, the worst of the rounds:",
        memory_table(measured),
        f"| | |\n|---|---|\n{facts}",
        _METHOD,
    ]
    return "\n\n".join(parts)


def _median_speed(runs: Sequence[tuple[int, float]]) -> str:
    return f"{statistics.median(count / 1e6 / seconds for count, seconds in runs):.0f} MB/s"


def _gigabytes(count: int) -> str:
    return f"{count / 1e9:.2f} GB"


def _verdict(met: bool) -> str:
    return "yes" if met else "NO"


# A constant, so that no measurement's number can slip into what does not depend on it.
_METHOD = """\
## What is measured

The commands `megatron-mup convert ...`, each in a process of its own, on checkpoints of random
weights that are drawn and written tensor by tensor. MB and GB are 10^6 and 10^9 bytes; source and
output are the sizes of all their files.

- **wall**: from the start of the command, imports included, until its output is synced. Checksums
  of the source are compared meanwhile, as by default, so that a checkpoint's files are read twice.
- **start**: the same command on a model of width 64 with one layer: imports and all else that does
  not depend on the size.
- **plain write**: in each round, random bytes to one file in the same folder, 16 MiB at a time,
  then fsync: as many as the conversion wrote, or before it, where that is not known yet, as many
  as its source has, scaled. **Plain read**: the source's files, 16 MiB at a time. Which comes
  first, the conversion or the plain runs, turns round from round to round.
- **of write**: the plain write's time over the conversion's; **of read + write**: the sum of both
  plain times over the conversion's, which may exceed 1 because a conversion reads while the kernel
  writes.
- **page cache**: before each conversion and each plain read the source's files are synced and put
  out of it (`posix_fadvise`, DONTNEED), so both read from the disk; what lies below the kernel (a
  hypervisor's cache) is not emptied. All writes end with fsync.
- **memory**: the largest resident memory of the command and all its processes, looked at ten times
  a second, less that of the tiny model ("beyond start"). It may be two of the largest tensors in
  fp32 and one output shard (`--max-shard-size`; Megatron's files are streamed and need none, their
  shard is counted as 0).
- **with verification**: once, on a model of few layers of the same width; both models compute
  log-probabilities, so its speed is not judged.
"""
