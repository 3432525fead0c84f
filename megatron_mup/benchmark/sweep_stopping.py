"""``python -m megatron_mup.benchmark.sweep_stopping DIR``: what ``stop_early`` would have changed.

Applies the rule to the recorded losses of a sweep whose runs all went to their end: how many steps
it saves, and whether the fitted minima move. Nothing is trained or written.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from megatron_mup.benchmark.command_line import run_command
from megatron_mup.errors import ConfigError, DataError
from megatron_mup.transfer.fits import Curve, Minimum, fit_minima
from megatron_mup.transfer.fits.window import WIDE
from megatron_mup.transfer.runs import Row, Status
from megatron_mup.transfer.sweep.cells import make_cells
from megatron_mup.transfer.sweep.curves import read_curve
from megatron_mup.transfer.sweep.folder import SweepFolder
from megatron_mup.transfer.sweep.refinement import strategy_of
from megatron_mup.transfer.sweep.stopping import looks, near_rates, surely_worse

Group = tuple[str, tuple[tuple[str, str], ...]]


@dataclass(frozen=True, kw_only=True)
class Replayed:
    """What the rule does to the runs of one arm, size and seed.

    Attributes:
        ends: log2 learning rate -> step after which a run is stopped.
        steps: that are made.
        planned: steps of all runs.
    """

    ends: Mapping[float, int]
    steps: int
    planned: int


def replay(
    curves: Mapping[float, Sequence[float]],
    planned: int,
    *,
    after: float,
    margin: float,
    octaves: float = WIDE,
) -> Replayed:
    """Apply the rule to runs that start one after another, the middle learning rate first.

    Args:
        curves: log2 learning rate -> losses, one a step; of runs that diverged fewer.
        planned: steps of a run.
        after: as the option.
        margin: as the option.
        octaves: that a fit uses on each side of the lowest loss.
    """
    middle = (min(curves) + max(curves)) / 2
    ends: dict[float, int] = {}
    known: dict[float, Sequence[float]] = {}
    for rate in sorted(curves, key=lambda rate: (abs(rate - middle), rate)):
        losses = curves[rate]
        near = near_rates(rate, list(curves), octaves)
        for step in looks(after, planned):
            worse = surely_worse(
                losses, known, near=near, step=step, planned=planned, margin=margin
            )
            if worse:
                # One step more is under way.
                ends[rate] = step + 1
                break
        known[rate] = losses[: ends.get(rate, planned)]
    return Replayed(
        ends=ends,
        steps=sum(len(losses) for losses in known.values()),
        planned=sum(map(len, curves.values())),
    )


DirArgument = Annotated[Path, typer.Argument(help="Folder of the sweep.", metavar="DIR")]
AfterOption = Annotated[float, typer.Option(help="As stop_early.after.")]
MarginOption = Annotated[list[float] | None, typer.Option(help="As stop_early.margin.")]
OctavesOption = Annotated[
    float, typer.Option(help="That a fit uses on each side of the lowest loss; 0: neighbours.")
]


def replay_and_report(
    folder: DirArgument,
    after: AfterOption = 0.5,
    margin: MarginOption = None,
    octaves: OctavesOption = WIDE,
) -> None:
    """Print the steps that are saved, and every minimum with all runs and without the stopped."""
    if not 0 < after < 1:
        raise ConfigError(f"--after is {after:g}; pass a part of a run between 0 and 1")
    place = SweepFolder(folder)
    rows = _rows(place)
    typer.echo(
        "| arm | size | margin | stopped | steps saved | optimum, all runs | optimum, stopped left "
        "out |\n|---|---:|---:|---:|---:|---|---|"
    )
    for level in margin or [1.0]:
        for line in _lines(place, rows, after=after, margin=level, octaves=octaves):
            typer.echo(line)


def _rows(folder: SweepFolder) -> list[Row]:
    """Rows of the sweep's runs; those of other YAMLs are none of its curves.

    Raises:
        DataError: a run was stopped early, so that nobody knows what it would have come to.
    """
    sweep = folder.read_sweep()
    rows = {row.cell: row for row in folder.rows()}
    wanted = strategy_of(sweep, make_cells(sweep, folder.data)).wanted(rows)
    found = [rows[cell.id] for cell in wanted if cell.id in rows]
    stopped = [row.cell for row in found if row.status is Status.STOPPED_EARLY]
    if stopped:
        raise DataError(
            f"{len(stopped)} runs of '{folder.path}' were stopped early, the first one "
            f"{stopped[0]}; give the folder of a sweep without stop_early"
        )
    return found


def _lines(
    folder: SweepFolder, rows: Sequence[Row], *, after: float, margin: float, octaves: float
) -> list[str]:
    groups: dict[Group, list[Row]] = {}
    for row in rows:
        if row.status in (Status.FINISHED, Status.DIVERGED):
            groups.setdefault((row.arm, tuple(sorted(row.settings.items()))), []).append(row)
    lines = []
    for (arm, settings), members in groups.items():
        sizes = sorted({row.size for row in members})
        stopped: set[str] = set()
        saved = {}
        for size in sizes:
            found = [row for row in members if row.size == size]
            ended, made, planned = _replay_size(
                folder, found, after=after, margin=margin, octaves=octaves
            )
            stopped |= ended
            saved[size] = (len(ended), 1 - made / planned)
        before = _minima(members, sizes)
        kept = _minima([row for row in members if row.cell not in stopped], sizes)
        name = " ".join([arm, *(f"{key}={value}" for key, value in settings)])
        lines += [
            f"| {name} | {size:g} | {margin:g} | {saved[size][0]} | {saved[size][1]:.0%} | "
            f"{_words(before[size])} | {_words(kept[size])} |"
            for size in sizes
        ]
    return lines


def _replay_size(
    folder: SweepFolder, rows: Sequence[Row], *, after: float, margin: float, octaves: float
) -> tuple[set[str], int, int]:
    """Cells that are stopped, steps that are made, steps without the rule."""
    stopped: set[str] = set()
    made = planned = 0
    for seed in sorted({row.seed for row in rows}):
        found = {row.log2_lr: row for row in rows if row.seed == seed}
        curves = {rate: _losses(folder, row) for rate, row in found.items()}
        steps = max(row.planned_steps for row in found.values())
        result = replay(curves, steps, after=after, margin=margin, octaves=octaves)
        stopped |= {found[rate].cell for rate in result.ends}
        made, planned = made + result.steps, planned + result.planned
    return stopped, made, planned


def _losses(folder: SweepFolder, row: Row) -> list[float]:
    """Losses of a run; of a diverged one, which has no record, as many NaN as it made steps."""
    if row.status is Status.DIVERGED:
        return [float("nan")] * row.steps
    path = folder.curve(row.cell)
    if not path.exists():
        raise DataError(
            f"'{path}' is missing: the run {row.cell} was made before losses were kept; run the "
            "sweep in a new folder"
        )
    return read_curve(path)


def _minima(rows: Sequence[Row], sizes: Sequence[float]) -> dict[float, Minimum]:
    curves = []
    for size in sizes:
        found = [row for row in rows if row.size == size]
        curves.append(
            Curve(
                size=size,
                log2_lrs=tuple(row.log2_lr for row in found),
                losses=tuple(row.validation_loss for row in found),
                seeds=tuple(row.seed for row in found),
            )
        )
    return dict(zip(sizes, fit_minima(curves), strict=True))


def _words(minimum: Minimum) -> str:
    found = minimum.log2_lr
    ends = ["none" if end is None else f"{end:.4f}" for end in (found.low, found.high)]
    value = "none" if found.value is None else f"{found.value:.4f}"
    return f"{value} ({ends[0]} to {ends[1]})"


def main() -> None:
    """Run the command line."""
    run_command(replay_and_report)


if __name__ == "__main__":
    main()
