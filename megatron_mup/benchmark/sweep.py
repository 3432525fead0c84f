"""``python -m megatron_mup.benchmark.sweep``: what workers side by side gain, what runs cost.

Runs real sweeps on installed Python text, in folders that are removed.
"""

from __future__ import annotations

import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml

from megatron_mup.benchmark.command_line import run_command
from megatron_mup.benchmark.page_sections import with_section
from megatron_mup.benchmark.report import circumstances, write
from megatron_mup.benchmark.sweep_report import MARK, Measured, missed, section, table
from megatron_mup.errors import ConfigError, InstallationError
from megatron_mup.transfer.sweep.pool import Share, cores_of_machine
from megatron_mup.transfer.sweep.session import RunRequest, run_sweep
from megatron_mup.transfer.sweep.shards import make_shards

EXIT_MISSED = 1

_BATCH, _SEQUENCE, _VOCABULARY = 16, 128, 1024
_LOWEST_LOG2_LR = -12.0


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What the user asked for."""

    widths: tuple[int, ...]
    workers: int
    cells: int
    steps: int
    rounds: int

    def __post_init__(self) -> None:
        if any(width < 32 or width % 32 for width in self.widths):
            raise ConfigError(f"--width is {list(self.widths)}; pass multiples of 32")
        if self.workers < 2:
            raise ConfigError(f"--workers is {self.workers}; pass at least 2")
        if self.cells < 2 * self.workers:
            raise ConfigError(
                f"--cells is {self.cells}; pass at least {2 * self.workers}, twice the workers: "
                "the first one of each is not counted"
            )
        for option, value in (("--steps", self.steps), ("--rounds", self.rounds)):
            if value < 1:
                raise ConfigError(f"{option} is {value}; pass at least 1")

    @property
    def command_line(self) -> str:
        """The command for the reader to repeat."""
        widths = " ".join(f"--width {width}" for width in self.widths)
        return (
            f"python -m megatron_mup.benchmark.sweep {widths} --workers {self.workers} "
            f"--cells {self.cells} --steps {self.steps} --rounds {self.rounds}"
        )


WidthOption = Annotated[
    list[int] | None, typer.Option("--width", help="Hidden size; unset: 64 and 128.")
]
WorkersOption = Annotated[int, typer.Option(help="Side by side, against one at a time.")]
CellsOption = Annotated[int, typer.Option(help="Runs of each sweep.")]
StepsOption = Annotated[int, typer.Option(help="Of each run.")]
RoundsOption = Annotated[int, typer.Option(help="Of three sweeps each.")]
OutputOption = Annotated[Path, typer.Option(help="Page whose section on sweeps is replaced.")]


def measure_and_report(
    width: WidthOption = None,
    workers: WorkersOption = 2,
    cells: CellsOption = 12,
    steps: StepsOption = 150,
    rounds: RoundsOption = 3,
    output: OutputOption = Path("docs/benchmarks.md"),
) -> None:
    """Run sweeps with several workers and with one in turn; keep the page."""
    settings = Settings(
        widths=tuple(width or (64, 128)), workers=workers, cells=cells, steps=steps, rounds=rounds
    )
    if not output.parent.is_dir():
        raise ConfigError(f"--output {output}: the folder {output.parent} does not exist; make it")
    with tempfile.TemporaryDirectory(prefix="sweeps-") as name:
        measured = [_measured(settings, width, Path(name)) for width in settings.widths]
    found = circumstances(settings.command_line)
    facts = {
        # Its last words are about torch's threads in this process, which trains nothing.
        "machine": found.machine.rpartition(", ")[0],
        "versions": found.software,
        "commit": found.commit,
        "date": found.date,
        "command": f"`{found.command}`",
    }
    # The page is kept even when a limit is missed: a negative result is a result.
    page = output.read_text(encoding="utf-8") if output.exists() else ""
    write(output, with_section(page, MARK, section(measured, facts)))
    typer.echo(table(measured))
    if lines := missed(measured):
        typer.echo("\n".join(lines), err=True)
        raise typer.Exit(EXIT_MISSED)


def _measured(settings: Settings, width: int, folder: Path) -> Measured:
    """Rounds of sweeps, whose order turns from round to round; short runs at the end."""
    cores = cores_of_machine()
    threads = max(1, cores // settings.workers)
    alone = Share(workers=1, threads=threads)
    shares = [
        alone,
        Share(workers=1, threads=cores),
        Share(workers=settings.workers, threads=threads),
    ]
    seconds: dict[Share, list[float]] = {share: [] for share in shares}
    for number in range(settings.rounds):
        turn = number % len(shares)
        for share in shares[turn:] + shares[:turn]:
            taken = _seconds_a_cell(folder, width, settings, share=share, steps=settings.steps)
            seconds[share].append(taken)
            typer.echo(
                f"width {width}, round {number + 1} of {settings.rounds}, {share.workers} at a "
                f"time with {share.threads} threads: {taken:.2f} s a run"
            )
    overhead = _seconds_a_cell(folder, width, settings, share=alone, steps=1)
    typer.echo(f"width {width}: {overhead:.2f} s a run of one step")
    return Measured(
        width=width,
        workers=settings.workers,
        cells=settings.cells,
        steps=settings.steps,
        alone=tuple(seconds[shares[0]]),
        all_cores=tuple(seconds[shares[1]]),
        together=tuple(seconds[shares[2]]),
        overhead=overhead,
    )


def _seconds_a_cell(
    folder: Path, width: int, settings: Settings, *, share: Share, steps: int
) -> float:
    """Wall seconds for each run of a sweep, without the first one of each worker."""
    ends: list[float] = []

    def hear(line: str) -> None:
        # Lines that a run's end brings begin with the counts.
        if line.startswith("["):
            ends.append(time.monotonic())

    with tempfile.TemporaryDirectory(dir=folder) as name:
        config = Path(name) / "sweep.yaml"
        document = sweep_document(_shards(folder), width=width, cells=settings.cells, steps=steps)
        config.write_text(yaml.safe_dump(document), encoding="utf-8")
        request = RunRequest(config=config, out=Path(name) / "out", text=(), share=share)
        code = run_sweep(request, hear)
    if code or len(ends) != settings.cells:
        raise InstallationError(
            f"a sweep at width {width} ended with exit code {code} after {len(ends)} of "
            f"{settings.cells} runs; run 'megatron-mup doctor'"
        )
    counted = settings.cells - share.workers
    return (ends[-1] - ends[share.workers - 1]) / counted


def sweep_document(shards: Path, *, width: int, cells: int, steps: int) -> dict[str, Any]:
    """A sweep of one width over so many learning rates.

    Args:
        shards: folder of the shards.
        width: hidden size; heads have 16 dimensions.
        cells: runs.
        steps: of each run.
    """
    model = {
        "num_layers": 2,
        "hidden_size": width,
        "num_attention_heads": width // 16,
        "vocab_size": _VOCABULARY,
        "seq_length": _SEQUENCE,
        "activation": "squared_relu",
    }
    base = {"base_hidden_size": 32, "base_ffn_hidden_size": 128, "base_kv_channels": 16}
    data = {name: [str(shards / f"text_{name}")] for name in ("train", "valid")}
    return {
        "name": "benchmark",
        "base": {
            "model": model,
            "parameterization": {**base, "base_num_layers": 2},
            "training": {"global_batch_size": _BATCH, "micro_batch_size": _BATCH},
            "data": {f"{name}_data_path": paths for name, paths in data.items()},
        },
        "scale": {"axis": "width", "values": [width]},
        "learning_rate": {"log2": [_LOWEST_LOG2_LR + 0.25 * number for number in range(cells)]},
        "tokens": {"rule": "fixed_tokens", "tokens": steps * _BATCH * _SEQUENCE},
        "warmup_fraction": 0.1,
        "run": {"eval_tokens": _BATCH * _SEQUENCE},
    }


def _shards(folder: Path) -> Path:
    """Tokenizer and shards of installed text, made by the first sweep."""
    place = folder / "data"
    if not place.exists():
        make_shards(
            place,
            text=(),
            corpus_bytes=2_000_000,
            vocab_size=_VOCABULARY,
            valid_tokens=2 * _BATCH * _SEQUENCE,
            echo=typer.echo,
        )
    return place


def main() -> None:
    """Run the command line."""
    run_command(measure_and_report)


if __name__ == "__main__":
    main()
