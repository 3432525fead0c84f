"""``python -m megatron_mup.benchmark.preprocessing``: measure, print the tables, keep them, judge.

The processes that it measures do not import it; see ``preprocessing_runs``.
"""

from __future__ import annotations

import dataclasses
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated

import typer
from sentencepiece import sentencepiece_model_pb2

from megatron_mup.benchmark.command_line import run_command
from megatron_mup.benchmark.preprocessing_inputs import (
    Prepared,
    enlarge,
    head_of,
    prepare_input,
    train_model,
)
from megatron_mup.benchmark.preprocessing_memory import footprint
from megatron_mup.benchmark.preprocessing_reference import first_difference
from megatron_mup.benchmark.preprocessing_report import (
    ENGINE,
    MEGATRON,
    START,
    WHOLE_JOB,
    Contestant,
    LargeRun,
    Rounds,
    identity_lines,
    large_table,
    missed,
    ratio_table,
    section,
    speed_table,
    with_section,
    with_warm,
)
from megatron_mup.benchmark.preprocessing_runs import (
    Cost,
    Job,
    engine_alone,
    megatron_way,
    whole_job,
)
from megatron_mup.data.engines import EngineOption
from megatron_mup.data.tokenizer import load_tokenizer
from megatron_mup.errors import ConfigError

EXIT_TOO_SLOW = 1

_RUNS: dict[str, Callable[[Job], Cost]] = {
    WHOLE_JOB: whole_job,
    START: whole_job,
    ENGINE: engine_alone,
    MEGATRON: megatron_way,
}
_ALGORITHMS = {1: "Unigram", 2: "BPE"}
_PACKAGES = ("sentencepiece", "gigatoken", "splintr-rs", "orjson")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What the user asked for."""

    input_path: Path | None
    title: str | None
    models: list[Path]
    engine: EngineOption
    workers: int
    rounds: int
    large_gb: float

    def __post_init__(self) -> None:
        cores = os.cpu_count() or 1
        if self.rounds < 1:
            raise ConfigError(f"--rounds is {self.rounds}; pass at least 1")
        if not 1 <= self.workers <= cores:
            raise ConfigError(f"--workers is {self.workers}; this machine has {cores} cores")
        if self.large_gb < 0:
            raise ConfigError(f"--large-gb is {self.large_gb}; pass 0 or more")

    @property
    def text_name(self) -> str:
        """What the page calls the text."""
        name = self.input_path.name if self.input_path else "installed Python sources and docs"
        return self.title or name

    @property
    def command_line(self) -> str:
        """The command for the reader to repeat, without this machine's folders."""
        words = ["python -m megatron_mup.benchmark.preprocessing"]
        words += [f"--input {self.input_path.name}"] if self.input_path else []
        words += [f"--tokenizer-model {model.name}" for model in self.models]
        words += [f"--engine {self.engine.value} --workers {self.workers} --rounds {self.rounds}"]
        return " ".join([*words, f"--large-gb {self.large_gb:g}"])


InputOption = Annotated[
    Path | None, typer.Option(help="Text; default: installed Python sources and documentation.")
]
TitleOption = Annotated[str | None, typer.Option(help="What to call the text on the page.")]
ModelOption = Annotated[
    list[Path] | None,
    typer.Option(help="sentencepiece models; default: BPE and Unigram trained on the text."),
]
EngineChoice = Annotated[EngineOption, typer.Option(help="As for data preprocess.")]
WorkersOption = Annotated[int | None, typer.Option(help="Processes; default: all cores.")]
RoundsOption = Annotated[int, typer.Option(help="Runs of each contestant.")]
LargeOption = Annotated[
    float, typer.Option(help="Text of the large input, 10^9 bytes; 0 leaves it out.")
]
OutputOption = Annotated[
    Path, typer.Option(help="Page whose section on preprocessing is replaced.")
]


def measure_and_report(
    input: InputOption = None,
    title: TitleOption = None,
    tokenizer_model: ModelOption = None,
    engine: EngineChoice = EngineOption.auto,
    workers: WorkersOption = None,
    rounds: RoundsOption = 5,
    large_gb: LargeOption = 2.0,
    output: OutputOption = Path("docs/benchmarks.md"),
) -> None:
    """Compare preprocessing with its engine alone and with Megatron-LM's way."""
    settings = Settings(
        input_path=input,
        title=title,
        models=tokenizer_model or [],
        engine=engine,
        workers=(os.cpu_count() or 1) if workers is None else workers,
        rounds=rounds,
        large_gb=large_gb,
    )
    if not output.parent.is_dir():
        raise ConfigError(f"--output {output}: the folder {output.parent} does not exist; make it")
    prepared, rounds_done, large = _measure(settings)
    where = _circumstances(settings)
    # The page is kept even when a limit is missed: a negative result is a result.
    _write(output, section(rounds_done, large, prepared, settings.text_name, where))
    for table in (speed_table(rounds_done), ratio_table(rounds_done), identity_lines(rounds_done)):
        typer.echo(f"{table}\n")
    if lines := missed(rounds_done, large):
        typer.echo("\n".join(lines), err=True)
        raise typer.Exit(EXIT_TOO_SLOW)


def _measure(settings: Settings) -> tuple[Prepared, list[Rounds], list[LargeRun]]:
    """Prepare the text, and run everything; what is made is thrown away."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prepared = prepare_input(settings.input_path, folder)
        head = head_of(prepared)
        jobs = [
            Job(
                input_path=prepared.path,
                text_bytes=prepared.text_bytes,
                model_path=model,
                engine=settings.engine,
                workers=settings.workers,
                prefix=folder / "shards" / "shard",
            )
            for model in _models(settings.models, prepared, folder)
        ]
        jobs[0].prefix.parent.mkdir()
        rounds = [_rounds(job, head, settings.rounds) for job in jobs]
        text_bytes = round(settings.large_gb * 1e9)
        large = list(_large_runs(jobs, prepared, text_bytes)) if text_bytes else []
        return prepared, rounds, large


def _models(given: list[Path], prepared: Prepared, folder: Path) -> list[Path]:
    """The models to measure with; refuses what Megatron-LM's sentencepiece path cannot read."""
    if not given:
        typer.echo("training a BPE and a Unigram model")
        return [train_model(prepared, folder, model_type=kind) for kind in ("bpe", "unigram")]
    for path in given:
        if (kind := load_tokenizer(path).kind) != "sentencepiece":
            raise ConfigError(
                f"--tokenizer-model {path} is a {kind} tokenizer; the yardstick reads "
                "sentencepiece models only"
            )
    return given


def _algorithm(model: Path) -> str:
    proto = sentencepiece_model_pb2.ModelProto.FromString(model.read_bytes())
    return _ALGORITHMS.get(proto.trainer_spec.model_type, model.name)


def _rounds(job: Job, head: Prepared, count: int) -> Rounds:
    """Run every contestant in turn, and compare the shards of the last round."""
    algorithm, theirs = _algorithm(job.model_path), job.prefix.with_name("reference")
    each = sorted({job.workers, 1}, reverse=True)
    contestants = [Contestant(name, n) for name in (WHOLE_JOB, START, ENGINE) for n in each]
    contestants.append(Contestant(MEGATRON, job.workers))
    costs: dict[Contestant, list[Cost]] = {one: [] for one in contestants}
    starting = dataclasses.replace(job, input_path=head.path, text_bytes=head.text_bytes)
    starting = dataclasses.replace(starting, prefix=job.prefix.with_name("start"))
    jobs = {START: starting, MEGATRON: dataclasses.replace(job, prefix=theirs)}
    for number in range(count):
        for one in contestants if number % 2 == 0 else reversed(contestants):
            cost = _RUNS[one.name](
                dataclasses.replace(jobs.get(one.name, job), workers=one.workers)
            )
            costs[one].append(cost)
            speed = f"{cost.wall_seconds:.2f} s, {cost.speed:.1f} MB/s"
            typer.echo(f"{algorithm}, round {number + 1} of {count}: {one}: {speed}")
    return Rounds(
        algorithm=algorithm,
        workers=job.workers,
        costs=with_warm(costs),
        difference=first_difference(job.prefix, theirs),
    )


def _large_runs(jobs: list[Job], prepared: Prepared, text_bytes: int) -> Iterator[LargeRun]:
    """Run the command itself on a large input, plain and compressed."""
    folder = prepared.path.parent
    forms = {"JSON lines": folder / "large.jsonl", "JSON lines, .gz": folder / "large.jsonl.gz"}
    typer.echo(f"writing {text_bytes / 1e9:.2f} GB of text, plain and compressed")
    written = enlarge(prepared, list(forms.values()), text_bytes=text_bytes).text_bytes
    for job in jobs:
        for form, path in forms.items():
            run = LargeRun(
                algorithm=_algorithm(job.model_path),
                form=form,
                workers=job.workers,
                text_bytes=written,
                footprint=footprint(_command(dataclasses.replace(job, input_path=path))),
            )
            typer.echo(large_table([run]).splitlines()[-1])
            yield run


def _command(job: Job) -> list[str]:
    """The command line of the whole job, as a user gives it."""
    return [
        str(Path(sys.executable).with_name("megatron-mup")),
        *("data", "preprocess", "--input", str(job.input_path)),
        *("--tokenizer-model", str(job.model_path), "--output-prefix", str(job.prefix)),
        *("--engine", job.engine.value, "--workers", str(job.workers)),
        *("--valid-fraction", "0", "--overwrite", "--log-interval", "0"),
    ]


def _circumstances(settings: Settings) -> dict[str, str]:
    # It loads torch, which worker processes must not.
    from megatron_mup.benchmark.report import circumstances

    found = circumstances(settings.command_line)
    # Its last words are about torch's threads.
    machine = found.machine.rpartition(", ")[0]
    return {
        "machine": f"{machine}, {settings.workers} worker processes",
        "versions": f"{found.software}, {', '.join(_versions())}",
        "commit": found.commit,
        "date": found.date,
        "command": f"`{found.command}`",
    }


def _versions() -> Iterator[str]:
    for name in _PACKAGES:
        try:
            yield f"{name} {version(name)}"
        except PackageNotFoundError:
            yield f"no {name}"


def _write(output: Path, text: str) -> None:
    from megatron_mup.benchmark.report import write

    page = output.read_text(encoding="utf-8") if output.exists() else ""
    write(output, with_section(page, text))


def main() -> None:
    """Run the command line."""
    run_command(measure_and_report)


if __name__ == "__main__":
    main()
