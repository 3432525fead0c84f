"""``python -m megatron_mup.benchmark.gpu_speed``: training speed on one GPU, and its verdict.

Compares muP with SP, stock Megatron-Core and plain PyTorch, and FP8 with bf16; prints tokens per
second, model FLOP/s, MFU, peak memory and whether that is what was asked for. Options of the
package are given as ``key=value`` and hold for every contestant that knows them.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from megatron_mup import doctor, platform
from megatron_mup.benchmark.command_line import run_command
from megatron_mup.benchmark.contestants import random_batches
from megatron_mup.benchmark.gpu_contest import (
    BATCHES,
    MUP,
    Contest,
    Contestant,
    Timed,
    by_itself,
    chosen,
    contestant,
    one_by_one,
    pairings,
    side_by_side,
)
from megatron_mup.benchmark.gpu_models import Precision, SpeedModel, default_micro_batch
from megatron_mup.benchmark.gpu_profile import Profile, profile, render
from megatron_mup.benchmark.gpu_report import (
    comparison_rows,
    comparison_table,
    missed,
    speed_rows,
    speed_table,
)
from megatron_mup.benchmark.report import circumstances
from megatron_mup.data.publication import check_writable, publish_text
from megatron_mup.errors import ConfigError
from megatron_mup.model.layer_specs import check_implementation
from megatron_mup.training.processes import Launch, parallel_processes

EXIT_TOO_SLOW = 1

_COMMAND = "python -m megatron_mup.benchmark.gpu_speed"

Overrides = Annotated[
    list[str] | None, typer.Argument(help="key=value of the package", metavar="KEY=VALUE")
]
Sequences = Annotated[
    int | None, typer.Option("--micro-batch-size", help="Sequences of a step; unset: 32k tokens.")
]
Against = Annotated[str, typer.Option(help="Some of sp,stock,plain; empty: muP alone.")]
Kinds = Annotated[str, typer.Option("--precision", help="Some of bf16,fp8.")]
PairCount = Annotated[int, typer.Option(help="Steps of each contestant of a comparison.")]
Alone = Annotated[bool, typer.Option("--alone", help="One contestant in memory at a time.")]
Compiled = Annotated[bool, typer.Option(help="Compile plain PyTorch.")]
Profiled = Annotated[bool, typer.Option("--profile", help="Profile muP instead of comparing.")]
Output = Annotated[Path | None, typer.Option(help="JSON file for all numbers; replaced.")]


def measure_and_report(
    overrides: Overrides = None,
    width: Annotated[int, typer.Option(help="Hidden size.")] = 2048,
    depth: Annotated[int, typer.Option(help="Layers.")] = 24,
    seq_length: Annotated[int, typer.Option(help="Tokens of a sequence.")] = 2048,
    micro_batch_size: Sequences = None,
    against: Against = "sp,stock,plain",
    precision: Kinds = "bf16,fp8",
    pairs: PairCount = 12,
    alone: Alone = False,
    compiled: Compiled = True,
    profiled: Profiled = False,
    output: Output = None,
) -> None:
    """Measure the training speed of one model on one GPU."""
    others, precisions = chosen(against, precision)
    if pairs < 2:
        raise ConfigError(f"--pairs is {pairs}; an interval needs at least 2")
    size = default_micro_batch(seq_length) if micro_batch_size is None else micro_batch_size
    model = SpeedModel(width=width, depth=depth, seq_length=seq_length, micro_batch_size=size)
    given = tuple(overrides or ())

    def make(name: str, kind: Precision) -> Contestant:
        return contestant(name, model, kind, overrides=given, compiled=compiled)

    # Built before anything runs, so that a wrong option of any of them is refused now.
    wanted = [(make(*a), make(*b)) for a, b in pairings(others, precisions)]
    solo = [make(MUP, kind) for kind in precisions]
    check_implementation(solo[0].run.model)
    keeper = _Keeper(model, given, output)
    if profiled:
        keeper.profile(solo)
    elif wanted:
        compare = one_by_one if alone else side_by_side
        keeper.compare(wanted, lambda one, two: compare(one, two, pairs=pairs))
    else:
        keeper.measure(solo, steps=pairs)
    if keeper.show():
        raise typer.Exit(EXIT_TOO_SLOW)


class _Keeper:
    """Collects what was measured, and writes it after each measurement: a cut run keeps the rest.

    Args:
        model: sizes.
        overrides: ``key=value``.
        output: JSON file; None for none.
    """

    def __init__(self, model: SpeedModel, overrides: tuple[str, ...], output: Path | None) -> None:
        if output is not None:
            check_writable([output], overwrite=True, option="--output")
        self.model = model
        self.output = output
        self.device = torch.cuda.get_device_name() if platform.has_cuda() else "CPU"
        self.timed: list[Timed] = []
        self.contests: list[Contest] = []
        self.profiles: dict[str, Profile] = {}
        self.failed: dict[str, str] = {}
        self.head: dict[str, Any] = {
            "model": dataclasses.asdict(model),
            "options": overrides,
            "device": self.device,
            "kernels": {kernel.name: kernel.active for kernel in doctor.collect().kernels},
            "circumstances": dataclasses.asdict(circumstances(_COMMAND)),
        }
        typer.echo(f"{model.name}; {self.device}; {' '.join(overrides)}")
        off = [name for name, active in self.head["kernels"].items() if not active]
        typer.echo(f"kernels that are off: {', '.join(off) or 'none'}")

    def compare(
        self,
        wanted: list[tuple[Contestant, Contestant]],
        compare: Callable[[Contestant, Contestant], Contest],
    ) -> None:
        """Measure every pair."""
        for first, second in wanted:
            found = self._attempt(f"{first.label} against {second.label}", compare, first, second)
            if found is not None:
                self.contests.append(found)
                self.timed += [found.first, found.second]
            self._write()

    def measure(self, contestants: list[Contestant], *, steps: int) -> None:
        """Measure each alone."""
        for each in contestants:
            found = self._attempt(each.label, by_itself, each, steps=steps)
            self.timed += [] if found is None else [found]
            self._write()

    def profile(self, contestants: list[Contestant]) -> None:
        """Profile each alone."""
        for each in contestants:
            found = self._attempt(f"profile of {each.label}", _profiled, each)
            if found is not None:
                self.profiles[each.label] = found
                typer.echo(render(found))
            self._write()

    def _attempt(self, name: str, measure: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """A measurement, or None if it fails: the others are worth having all the same."""
        typer.echo(name)
        try:
            return measure(*args, **kwargs)
        # Out of memory, no compiler, no kernel: RuntimeErrors of torch.
        except RuntimeError as error:
            self.failed[name] = f"{type(error).__name__}: {str(error)[:500]}"
            typer.echo(f"{name}: {self.failed[name]}", err=True)
            return None

    def report(self) -> dict[str, Any]:
        """Everything so far, as plain data."""
        return self.head | {
            "speeds": speed_rows(self.model, self.timed, device=self.device),
            "comparisons": comparison_rows(self.contests),
            "seconds": [
                {"contestant": found.contestant.label, "seconds": found.seconds}
                for found in self.timed
            ],
            "profiles": {name: dataclasses.asdict(found) for name, found in self.profiles.items()},
            "failed": self.failed,
        }

    def _write(self) -> None:
        if self.output is not None:
            publish_text(self.output, json.dumps(self.report(), indent=1) + "\n")

    def show(self) -> list[str]:
        """Print the tables; returns and prints what was not met."""
        report = self.report()
        if self.timed:
            typer.echo(speed_table(report["speeds"]))
        if self.contests:
            typer.echo(comparison_table(report["comparisons"]))
        lines = missed(report)
        for line in lines:
            typer.echo(line, err=True)
        return lines


def _profiled(each: Contestant) -> Profile:
    with parallel_processes(each.run, Launch()):
        return profile(each.build(each.run), random_batches(each.run, BATCHES))


def main() -> None:
    """Run the command line."""
    run_command(measure_and_report)


if __name__ == "__main__":
    main()
