"""``python -m megatron_mup.benchmark``: measure, print the table, keep it, judge it."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import torch
import typer

from megatron_mup.benchmark.command_line import run_command
from megatron_mup.benchmark.compare import SIZES, compare
from megatron_mup.benchmark.loop_cost import LoopCost, loop_cost
from megatron_mup.benchmark.preprocessing_report import keep_section
from megatron_mup.benchmark.report import (
    Comparison,
    circumstances,
    document,
    loop_table,
    profile_table,
    save_table,
    table,
    write,
)
from megatron_mup.benchmark.save_cost import SaveCost, save_cost
from megatron_mup.errors import ConfigError

EXIT_TOO_SLOW = 1


def _check(pairs: int, threads: int, output: Path) -> None:
    cores = os.cpu_count() or 1
    if pairs < 2:
        raise ConfigError(f"--pairs is {pairs}; an interval needs at least 2")
    if not 1 <= threads <= cores:
        raise ConfigError(f"--threads is {threads}; this machine has {cores} cores")
    if not output.parent.is_dir():
        raise ConfigError(f"--output {output}: the folder {output.parent} does not exist; make it")


def measure_and_report(
    pairs: Annotated[int, typer.Option(help="Pairs of steps (half against PyTorch).")] = 200,
    threads: Annotated[int, typer.Option(help="Threads of each contestant.")] = 2,
    output: Annotated[Path, typer.Option(help="Page to overwrite.")] = Path("docs/benchmarks.md"),
) -> None:
    """Compare the CPU time of a training step with stock Megatron-Core and plain PyTorch."""
    _check(pairs, threads, output)
    torch.set_num_threads(threads)
    comparisons = compare(SIZES, pairs=pairs, echo=typer.echo)
    loops, saves = _run_costs(steps=max(10, pairs // 10), saves=max(2, pairs // 25))
    command = f"python -m megatron_mup.benchmark --pairs {pairs} --threads {threads}"
    # The page is kept even when a limit is missed: a negative result is a result.
    page = document(comparisons, loops, saves, circumstances(command))
    old = output.read_text(encoding="utf-8") if output.exists() else ""
    write(output, keep_section(old, page))
    for text in (table(comparisons), loop_table(loops), profile_table(loops), save_table(saves)):
        typer.echo(f"{text}\n")
    missed = _missed(comparisons, loops, saves)
    for line in missed:
        typer.echo(line, err=True)
    if missed:
        raise typer.Exit(EXIT_TOO_SLOW)


def _missed(
    comparisons: Sequence[Comparison], loops: Sequence[LoopCost], saves: Sequence[SaveCost]
) -> list[str]:
    """One line for each limit that was not kept."""
    lines = [
        f"{row.first} against {row.second} ({row.model}): the interval ends at "
        f"{row.ratio.high:.3f}, more than {row.limit:.2f}"
        for row in comparisons
        if not row.met
    ]
    lines += [
        f"the loop takes {cost.share:.1%} of a step ({cost.model})"
        for cost in loops
        if not cost.met
    ]
    lines += [
        f"a background save stops training for {cost.stopped_steps:.2f} steps ({cost.model})"
        for cost in saves
        if not cost.met
    ]
    return lines


def _run_costs(*, steps: int, saves: int) -> tuple[list[LoopCost], list[SaveCost]]:
    """The loop's share of a step, and what saving costs, for every size."""
    loops, savings = [], []
    with tempfile.TemporaryDirectory() as folder:
        for model, run in SIZES.items():
            typer.echo(f"training loop, {model}: {steps} steps")
            loops.append(loop_cost(run, model, Path(folder), steps=steps))
            typer.echo(f"checkpoints, {model}: {saves} in the background, {saves} at once")
            savings.append(save_cost(run, model, Path(folder), saves=saves))
    return loops, savings


def main() -> None:
    """Run the command line."""
    run_command(measure_and_report)


if __name__ == "__main__":
    main()
