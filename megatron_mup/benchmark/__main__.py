"""``python -m megatron_mup.benchmark``: measure, print the table, keep it, judge it."""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path
from typing import Annotated

import torch
import typer

from megatron_mup.benchmark.compare import SIZES, compare
from megatron_mup.benchmark.loop_cost import LoopCost, loop_cost
from megatron_mup.benchmark.report import circumstances, document, loop_table, table, write
from megatron_mup.errors import ConfigError, MupError

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
    costs = _loop_costs(steps=max(3, pairs // 10))
    command = f"python -m megatron_mup.benchmark --pairs {pairs} --threads {threads}"
    # The page is kept even when a limit is missed: a negative result is a result.
    write(output, document(comparisons, costs, circumstances(command)))
    typer.echo(f"{table(comparisons)}\n\n{loop_table(costs)}")
    missed = [row for row in comparisons if not row.met]
    for row in missed:
        typer.echo(
            f"{row.first} against {row.second} ({row.model}): the interval ends at "
            f"{row.ratio.high:.3f}, more than {row.limit:.2f}",
            err=True,
        )
    for cost in costs:
        if not cost.met:
            typer.echo(f"the loop takes {cost.share:.1%} of a step ({cost.model})", err=True)
    if missed or not all(cost.met for cost in costs):
        raise typer.Exit(EXIT_TOO_SLOW)


def _loop_costs(*, steps: int) -> list[LoopCost]:
    """The loop's share of a step for every size."""
    costs = []
    with tempfile.TemporaryDirectory() as folder:
        for model, run in SIZES.items():
            typer.echo(f"training loop, {model}: {steps} steps")
            costs.append(loop_cost(run, model, Path(folder), steps=steps))
    return costs


def main() -> None:
    """Run the command line; user errors end with one message and their exit code."""
    try:
        typer.run(measure_and_report)
    except MupError as error:
        typer.echo(f"error: {error}", err=True)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
