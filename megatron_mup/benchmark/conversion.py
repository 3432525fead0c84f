"""``python -m megatron_mup.benchmark.conversion``: convert large checkpoints, keep what it cost.

Needs a disk with room for two source checkpoints, and memory for what it measures: everything is
made, converted and removed one after the other.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from megatron_mup.benchmark.command_line import run_command
from megatron_mup.benchmark.conversion_report import (
    MARK,
    Measured,
    Round,
    memory_table,
    missed,
    section,
    speed_table,
)
from megatron_mup.benchmark.conversion_runs import (
    FULL_LAYERS,
    FULL_WIDTH,
    Storage,
    Work,
    fitting_run,
    folder_bytes,
    largest_tensor_bytes,
    model_run,
    parameters,
    plain_read,
    plain_write,
    remove,
    run_conversion,
    write_source,
)
from megatron_mup.benchmark.page_sections import with_section
from megatron_mup.benchmark.report import circumstances, write
from megatron_mup.config import Activation, RunConfig
from megatron_mup.convert.commands import parse_size
from megatron_mup.errors import ConfigError

EXIT_MISSED = 1

_TINY = 64
"""Width of the model whose conversion is all start."""

_ROOM = 2.05
"""Free space over the size of the source: the source and its largest output."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What the user asked for."""

    gb: float
    rounds: int
    storage: Storage
    width: int
    max_shard_size: str
    verified_layers: int

    def __post_init__(self) -> None:
        if self.gb <= 0:
            raise ConfigError(f"--gb is {self.gb:g}; pass more than 0")
        if self.rounds < 1:
            raise ConfigError(f"--rounds is {self.rounds}; pass at least 1")
        if self.width < _TINY or self.width % _TINY:
            raise ConfigError(f"--width is {self.width}; pass a multiple of {_TINY}")
        if not 0 <= self.verified_layers <= FULL_LAYERS:
            raise ConfigError(f"--verified-layers is {self.verified_layers}; pass 0 to 12")
        # Names the option if it is no size.
        parse_size(self.max_shard_size, "--max-shard-size")

    @property
    def shard_bytes(self) -> int:
        """Data bytes of one file of an export."""
        return parse_size(self.max_shard_size, "--max-shard-size")

    @property
    def command_line(self) -> str:
        """The command for the reader to repeat, without this machine's folders."""
        return (
            f"python -m megatron_mup.benchmark.conversion --gb {self.gb:g} --rounds {self.rounds} "
            f"--storage {self.storage.value} --width {self.width} "
            f"--max-shard-size {self.max_shard_size} --verified-layers {self.verified_layers}"
        )

    def run(self, *, gated: bool) -> RunConfig:
        """The largest model whose source is no larger than was asked for."""
        return fitting_run(self.gb * 1e9, width=self.width, gated=gated, storage=self.storage)


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One conversion.

    Attributes:
        name: for the tables.
        run: the model.
        work: the conversion within a folder.
        shard_bytes: an output shard at most; 0 for files that are streamed.
        keeps_output: the next one reads its output, and its source is not needed any more.
        judged: whether its speed has a limit.
    """

    name: str
    run: RunConfig
    work: Callable[[Path], Work]
    shard_bytes: int = 0
    keeps_output: bool = False
    judged: bool = True


GbOption = Annotated[float, typer.Option(help="Weights of the source at most, 10^9 bytes.")]
RoundsOption = Annotated[int, typer.Option(help="Runs of each conversion.")]
FolderOption = Annotated[
    Path | None, typer.Option(help="On the disk to measure; unset: the temporary folder.")
]
StorageOption = Annotated[
    Storage, typer.Option(help="What the source stores of each weight; bf16 is the most layers.")
]
WidthOption = Annotated[int, typer.Option(help="Hidden size; less than 8192 is to try it out.")]
ShardOption = Annotated[str, typer.Option(help="As for convert to-hf.")]
LayersOption = Annotated[
    int, typer.Option(help="Layers of the model that is verified; 0 leaves it out.")
]
OutputOption = Annotated[Path, typer.Option(help="Page whose section on conversion is replaced.")]


def measure_and_report(
    # The whole 10B model in bf16.
    gb: GbOption = 20.4,
    rounds: RoundsOption = 3,
    folder: FolderOption = None,
    storage: StorageOption = Storage.BF16,
    width: WidthOption = FULL_WIDTH,
    max_shard_size: ShardOption = "2GB",
    verified_layers: LayersOption = 1,
    output: OutputOption = Path("docs/benchmarks.md"),
) -> None:
    """Convert a model shaped like the 10B one: speed against the disk's, and peak memory."""
    settings = Settings(
        gb=gb,
        rounds=rounds,
        storage=storage,
        width=width,
        max_shard_size=max_shard_size,
        verified_layers=verified_layers,
    )
    if not output.parent.is_dir():
        raise ConfigError(f"--output {output}: the folder {output.parent} does not exist; make it")
    where = folder or Path(tempfile.gettempdir())
    check_room(settings, where)
    models = [_model_line(settings, gated=gated) for gated in (False, True)]
    for line in models:
        typer.echo(line)
    with tempfile.TemporaryDirectory(dir=where, prefix="conversion-") as name:
        measured = measure(settings, Path(name))
    # The page is kept even when a limit is missed: a negative result is a result.
    page = output.read_text(encoding="utf-8") if output.exists() else ""
    text = section(measured, _circumstances(settings), models=models)
    write(output, with_section(page, MARK, text))
    typer.echo(f"{speed_table(measured)}\n\n{memory_table(measured)}\n")
    if lines := missed(measured):
        typer.echo("\n".join(lines), err=True)
        raise typer.Exit(EXIT_MISSED)


def check_room(settings: Settings, folder: Path) -> None:
    """Refuse a size that the disk cannot take, before anything is written.

    Raises:
        ConfigError: the folder is missing, or its disk has no room.
    """
    if not folder.is_dir():
        raise ConfigError(f"--folder {folder} does not exist; make it")
    largest = max(parameters(settings.run(gated=gated)) for gated in (False, True))
    needed = _ROOM * settings.storage.bytes_each * largest
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise ConfigError(
            f"--gb {settings.gb:g} with --width {settings.width} needs {needed / 1e9:.1f} GB, but "
            f"{folder} has {free / 1e9:.1f} GB free; pass less or another --folder"
        )


def measure(settings: Settings, folder: Path) -> list[Measured]:
    """Make each source, run its conversions, and remove what they left.

    Args:
        settings: what the user asked for.
        folder: empty; is left empty.
    """
    found = []
    for trials in (_plain_trials(settings), _gated_trials(settings)):
        found += _all_measured(trials, folder, settings)
    if settings.verified_layers:
        once = dataclasses.replace(settings, rounds=1)
        found += _all_measured([_verified_trial(settings)], folder, once)
    return found


def _all_measured(trials: list[Trial], folder: Path, settings: Settings) -> list[Measured]:
    """Conversions of one model."""
    run, tiny = trials[0].run, folder / "tiny"
    write_source(run, folder / "source", settings.storage)
    write_source(_tiny_run(run, settings.storage), tiny / "source", settings.storage)
    typer.echo(f"source: {_words(run)}, {folder_bytes(folder / 'source') / 1e9:.2f} GB")
    found = [_measured(trial, folder, settings.rounds) for trial in trials]
    for path in folder.iterdir():
        remove(path)
    return found


def _measured(trial: Trial, folder: Path, count: int) -> Measured:
    """Run a conversion beside plain writes and reads; the tiny model goes first."""
    small = trial.work(folder / "tiny")
    start = run_conversion(small)
    work = trial.work(folder)
    rounds = []
    for number in range(count):
        remove(work.target)
        # Begins so that the last output can stay: no plain file needs room beside it.
        rounds.append(_round(work, folder / "plain", plain_first=(count - number) % 2 == 1))
        cost = rounds[-1].cost
        speed = f"{cost.written_bytes / 1e6 / cost.wall_seconds:.0f} MB/s"
        typer.echo(
            f"{trial.name}, round {number + 1} of {count}: {cost.wall_seconds:.1f} s, {speed}, "
            f"{rounds[-1].speed:.2f} of a plain write, peak {cost.peak_bytes / 1e9:.2f} GB"
        )
    for one in (small, work):
        remove(one.source if trial.keeps_output else one.target)
    return Measured(
        name=trial.name,
        model=_words(trial.run),
        parameters=parameters(trial.run),
        largest_bytes=largest_tensor_bytes(trial.run),
        shard_bytes=trial.shard_bytes,
        start=start,
        rounds=tuple(rounds),
        judged=trial.judged,
    )


def _round(work: Work, plain: Path, *, plain_first: bool) -> Round:
    if plain_first:
        # What the output will take is known only afterwards; the rate is what counts.
        count = folder_bytes(work.source)
        read, seconds = plain_read(work.source), plain_write(plain, count)
        cost = run_conversion(work)
        write_seconds = seconds * cost.written_bytes / count
        return Round(cost=cost, write_seconds=write_seconds, read_seconds=read)
    cost = run_conversion(work)
    remove(work.target)
    write_seconds = plain_write(plain, cost.written_bytes)
    return Round(cost=cost, write_seconds=write_seconds, read_seconds=plain_read(work.source))


def _plain_trials(settings: Settings) -> list[Trial]:
    """The conversions of the model without a gate; the import reads what the export left."""
    run = settings.run(gated=False)
    bf16 = str(settings.storage is not Storage.FP32).lower()

    def resharded(folder: Path) -> Work:
        source, target = folder / "source", folder / "resharded"
        words = ("reshard", "--load", str(source), "--save", str(target))
        layout = "tensor_model_parallel_size=2"
        return Work(arguments=(*words, layout), source=source, target=target)

    def imported(folder: Path) -> Work:
        source, target = folder / "exported", folder / "imported"
        words = ("from-hf", "--input", str(source), "--save", str(target), "--no-verify")
        return Work(arguments=(*words, f"precision.bf16={bf16}"), source=source, target=target)

    return [
        Trial(name="reshard to TP 2", run=run, work=resharded),
        Trial(
            name="to-hf megatron_mup",
            run=run,
            shard_bytes=settings.shard_bytes,
            work=_export("megatron_mup", settings, "--no-verify"),
            keeps_output=True,
        ),
        Trial(name="from-hf megatron_mup", run=run, work=imported),
    ]


def _gated_trials(settings: Settings) -> list[Trial]:
    return [
        Trial(
            name="to-hf llama, multipliers folded",
            run=settings.run(gated=True),
            shard_bytes=settings.shard_bytes,
            work=_export("llama", settings, "--no-verify"),
        )
    ]


def _verified_trial(settings: Settings) -> Trial:
    return Trial(
        name="to-hf megatron_mup, with verification",
        run=model_run(
            width=settings.width,
            layers=settings.verified_layers,
            gated=False,
            storage=settings.storage,
        ),
        shard_bytes=settings.shard_bytes,
        work=_export("megatron_mup", settings, "--verify"),
        judged=False,
    )


def _export(hf_format: str, settings: Settings, verify: str) -> Callable[[Path], Work]:
    def exported(folder: Path) -> Work:
        source, target = folder / "source", folder / "exported"
        words = ("to-hf", "--load", str(source), "--output", str(target), "--format", hf_format)
        options = ("--max-shard-size", settings.max_shard_size, verify)
        return Work(arguments=(*words, *options), source=source, target=target)

    return exported


def _tiny_run(run: RunConfig, storage: Storage) -> RunConfig:
    return model_run(width=_TINY, layers=1, gated=_gated(run), storage=storage)


def _gated(run: RunConfig) -> bool:
    return run.model.activation is Activation.SWIGLU


def _words(run: RunConfig) -> str:
    gate = "gated SiLU" if _gated(run) else "squared ReLU"
    model = run.model
    return f"{model.num_layers} x {model.hidden_size}, {gate}, {parameters(run) / 1e9:.2f} B"


def _model_line(settings: Settings, *, gated: bool) -> str:
    """A model of the measurement, and how much of the 10B one it is."""
    run = settings.run(gated=gated)
    full = model_run(width=FULL_WIDTH, layers=FULL_LAYERS, gated=False, storage=settings.storage)
    share = parameters(run) / parameters(full)
    return (
        f"{_words(run)} parameters ({run.model.num_layers} layers of width "
        f"{run.model.hidden_size}, F {4 * run.model.hidden_size}, {run.model.vocab_size} tokens), "
        f"{share:.1%} of the {parameters(full) / 1e9:.2f} B of the 10B model; the source stores "
        f"{settings.storage.value}, {settings.storage.bytes_each} bytes a parameter."
    )


def _circumstances(settings: Settings) -> dict[str, str]:
    found = circumstances(settings.command_line)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    # Its last words are about torch's threads in this process, which converts nothing.
    machine = found.machine.rpartition(", ")[0]
    return {
        "machine": f"{machine}, {memory / 1e9:.1f} GB of memory",
        "versions": found.software,
        "commit": found.commit,
        "date": found.date,
        "command": f"`{found.command}`",
    }


def main() -> None:
    """Run the command line."""
    run_command(measure_and_report)


if __name__ == "__main__":
    main()
