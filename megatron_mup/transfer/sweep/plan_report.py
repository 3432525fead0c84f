"""``megatron-mup sweep plan``: sizes, lengths and cost, before anything runs. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from megatron_mup.transfer.runs import Row
from megatron_mup.transfer.sweep.cells import Cell
from megatron_mup.transfer.sweep.order import ended
from megatron_mup.transfer.sweep.progress import Rates, duration
from megatron_mup.transfer.sweep.refinement import strategy_of
from megatron_mup.transfer.sweep.scaling import parameter_counts
from megatron_mup.transfer.sweep.spec import Sweep

_COLUMNS = ("arms", "parameters", "non-embedding", "steps", "tokens", "FLOPs a run", "runs")


@dataclass(frozen=True, kw_only=True)
class PlanLine:
    """Runs of one size that cost the same.

    Attributes:
        size: value on the axis.
        arms: names of the variants.
        parameters: all of them, the vocabulary as padded.
        non_embedding_parameters: without embedding and unembedding.
        steps: of each run.
        tokens: of each run.
        flops: model FLOPs of each run, evaluation included.
        first_runs: runs with the first seed.
        all_runs: most runs with all seeds.
    """

    size: float
    arms: tuple[str, ...]
    parameters: int
    non_embedding_parameters: int
    steps: int
    tokens: int
    flops: float
    first_runs: int
    all_runs: int


def plan_lines(cells: Sequence[Cell]) -> list[PlanLine]:
    """One line for each size and cost, in the order of the cells."""
    groups: dict[tuple[object, ...], list[Cell]] = {}
    for cell in cells:
        key = (cell.size, cell.flops, cell.run.model, cell.run.training.global_batch_size)
        groups.setdefault(key, []).append(cell)
    return [_line(group) for group in groups.values()]


def _line(group: Sequence[Cell]) -> PlanLine:
    first = group[0]
    total, rest = parameter_counts(first.run)
    training = first.run.training
    return PlanLine(
        size=first.size,
        arms=tuple(dict.fromkeys(cell.arm for cell in group)),
        parameters=total,
        non_embedding_parameters=rest,
        steps=training.train_iters,
        tokens=training.train_iters * training.global_batch_size * first.run.model.seq_length,
        flops=first.flops,
        first_runs=sum(cell.seed == first.seed for cell in group),
        all_runs=len(group),
    )


def _listed(numbers: Iterable[float]) -> str:
    return ", ".join(f"{number:g}" for number in numbers)


def render_plan(sweep: Sweep, cells: Sequence[Cell], rows: Mapping[str, Row]) -> str:
    """The plan as text.

    Args:
        sweep: what is asked for.
        cells: all of its cells.
        rows: cell id -> row; their times make the estimate.
    """
    lines = plan_lines(cells)
    several = len(sweep.arms) > 1
    text = [
        f"sweep {sweep.name}: seeds {', '.join(map(str, sweep.seeds))}",
        *(f"arm {arm}: log2 learning rates {_listed(sweep.log2_lrs[arm])}" for arm in sweep.arms),
        "",
        f"| {sweep.axis} | {' | '.join(_COLUMNS)} |",
        "|" + " ---: |" * (1 + len(_COLUMNS)),
    ]
    for line in lines:
        arms = "all" if several and len(line.arms) == len(sweep.arms) else ", ".join(line.arms)
        text.append(
            f"| {line.size:g} | {arms} | {line.parameters:,} | {line.non_embedding_parameters:,} | "
            f"{line.steps:,} | {line.tokens:,} | {line.flops:.3g} | {_range(line)} |"
        )
    return "\n".join([*text, "", *_cost_lines(sweep, cells, rows)])


def _range(line: PlanLine) -> str:
    if line.first_runs == line.all_runs:
        return f"{line.all_runs}"
    return f"{line.first_runs} to {line.all_runs}"


def _cost_lines(sweep: Sweep, cells: Sequence[Cell], rows: Mapping[str, Row]) -> list[str]:
    strategy = strategy_of(sweep, cells)
    wanted, undecided = strategy.wanted(rows), strategy.undecided(rows)
    first, further = sum(cell.flops for cell in wanted), sum(cell.flops for cell in undecided)
    count, most = f"{len(wanted)}", ""
    if undecided:
        count = f"{len(wanted)} to {len(wanted) + len(undecided)}"
        most = f" to {first + further:.3g}"
    lines = [f"whole cost: {count} runs, {first:.3g}{most} model FLOPs", *_refine_lines(sweep)]
    left = [cell for cell in wanted if not ended(rows.get(cell.id))]
    rates = Rates(cells, rows)
    times = [[rates.seconds(cell) for cell in kind] for kind in (left, undecided)]
    if any(seconds is None for kind in times for seconds in kind):
        return [*lines, "time: not known before runs have finished in the sweep's folder"]
    least, more = (sum(filter(None, kind)) for kind in times)
    upper = f" to {duration(least + more)}" if more else ""
    return [*lines, f"left: {len(left)} runs, about {duration(least)}{upper} of one worker"]


def _refine_lines(sweep: Sweep) -> list[str]:
    """What the counts cannot hold, because results decide it."""
    if sweep.refine is None:
        return []
    most = (
        "any number of" if sweep.refine.max_cells is None else f"at most {sweep.refine.max_cells}"
    )
    rounds = sweep.refine.max_rounds
    return [f"refine: {most} runs more, in {rounds} round{'s' * (rounds > 1)} at most"]
