"""``megatron-mup convert <verb>``: reads arguments, calls one function, prints what it made."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NamedTuple

import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from megatron_mup.command_help import PlainCommand
from megatron_mup.errors import ConfigError
from megatron_mup.run_source import RunSource

if TYPE_CHECKING:
    from megatron_mup.config import RunConfig
    from megatron_mup.convert.checked_text import Handling
    from megatron_mup.convert.conversion import Conversion
    from megatron_mup.convert.weights import WeightSource

app = typer.Typer(
    no_args_is_help=True, help="Checkpoints to and from Hugging Face, and to other layouts."
)

Load = Annotated[
    Path, typer.Option("--load", help="Run folder, or one iter_* folder of it.", metavar="DIR")
]
CkptStep = Annotated[
    int | None, typer.Option("--ckpt-step", help="Iteration; unset: the newest.", metavar="N")
]
Save = Annotated[Path, typer.Option("--save", help="Folder of the new checkpoint.", metavar="DIR")]
Overrides = Annotated[
    list[str] | None, typer.Argument(help="key=value or section.key=value", metavar="KEY=VALUE")
]
Config = Annotated[
    Path | None, typer.Option("--config", help="YAML of the target's parameterization.")
]
Preset = Annotated[str | None, typer.Option("--preset", help="Named experiment of the target.")]
Width = Annotated[int | None, typer.Option("--width", help="Hidden size of the preset.")]
TokenizerModel = Annotated[
    Path | None,
    typer.Option("--tokenizer-model", help="sentencepiece .model or tokenizer.json.", metavar="F"),
]
EodToken = Annotated[
    str | None,
    typer.Option("--eod-token", help="The piece that ends a document; unset: the model's."),
]
AnyTokenizer = Annotated[
    bool, typer.Option("--any-tokenizer", help="Accept a tokenizer that is not the recorded one.")
]
Verify = Annotated[
    bool, typer.Option("--verify/--no-verify", help="Compare log-probabilities at the end.")
]
Text = Annotated[
    Path | None, typer.Option("--text", help="Text file to verify on.", metavar="FILE")
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an existing output.")]
CheckFiles = Annotated[
    bool,
    typer.Option("--check/--no-check", help="Read all files and compare their SHA-256 first."),
]
EXIT_NOT_VERIFIED = 1
EXIT_DAMAGED = 1


class FormatName(StrEnum):
    """The values of --format; ``formats.HfFormat`` would import torch for --help."""

    granite = "granite"
    llama = "llama"
    megatron_mup = "megatron_mup"


Output = Annotated[Path, typer.Option("--output", help="Folder to make.", metavar="DIR")]
Format = Annotated[
    FormatName,
    typer.Option("--format", help="granite: own multipliers; llama: folded into weights."),
]
Dtype = Annotated[
    str | None, typer.Option("--dtype", help="float32, bfloat16 or float16; unset: the run's.")
]
MaxShardSize = Annotated[
    str, typer.Option("--max-shard-size", help="Bytes of a file, e.g. 500MB.", metavar="SIZE")
]
AllowNonFinite = Annotated[bool, typer.Option("--allow-non-finite", help="Export a diverged run.")]


@app.command("to-hf", cls=PlainCommand)
def to_hf(
    load: Load,
    output: Output,
    format_name: Format,
    ckpt_step: CkptStep = None,
    dtype: Dtype = None,
    tokenizer_model: TokenizerModel = None,
    eod_token: EodToken = None,
    any_tokenizer: AnyTokenizer = False,
    text: Text = None,
    verify: Verify = True,
    max_shard_size: MaxShardSize = "5GB",
    overwrite: Overwrite = False,
    allow_non_finite: AllowNonFinite = False,
    check: CheckFiles = True,
) -> None:
    """Export a checkpoint as a folder that transformers loads."""
    from megatron_mup.convert import conversion
    from megatron_mup.convert.formats import HfFormat
    from megatron_mup.convert.megatron_source import MegatronSource

    options = conversion.HfOptions(
        hf_format=HfFormat(format_name.value),
        dtype=dtype,
        max_shard_bytes=parse_size(max_shard_size, "--max-shard-size"),
        allow_non_finite=allow_non_finite,
    )
    given = Given(overwrite, verify, check, tokenizer_model, eod_token, text, any_tokenizer)
    source = MegatronSource(load, ckpt_step, check=False)
    with _bar() as bar:
        handling = _handling(bar, given)
        made = conversion.to_huggingface(source, output, options=options, handling=handling)
    if tokenizer_model is None:
        typer.echo("no tokenizer files: pass --tokenizer-model to add them", err=True)
    _tell(made)


@app.command("from-hf", cls=PlainCommand)
def from_hf(
    source_folder: Annotated[
        Path, typer.Option("--input", help="Llama, Granite or our own folder.", metavar="DIR")
    ],
    save: Save,
    overrides: Overrides = None,
    config: Config = None,
    preset: Preset = None,
    width: Width = None,
    tokenizer_model: TokenizerModel = None,
    eod_token: EodToken = None,
    text: Text = None,
    verify: Verify = True,
    overwrite: Overwrite = False,
    trust_remote_code: Annotated[
        bool,
        typer.Option(
            "--trust-remote-code",
            help="Verify with the folder's modeling files, though they are not this version's.",
        ),
    ] = False,
) -> None:
    """Import a Hugging Face folder as weights to train from, under any parameterization."""
    from megatron_mup.convert import conversion
    from megatron_mup.convert.huggingface_source import HuggingFaceSource

    given = Given(overwrite, verify, False, tokenizer_model, eod_token, text)
    source = HuggingFaceSource(source_folder)
    run = _target(source, config, preset, width, overrides)
    with _bar() as bar:
        made = conversion.from_huggingface(
            source,
            save,
            run=run,
            handling=_handling(bar, given),
            trust_remote_code=trust_remote_code,
        )
    _tell(made)


@app.command("from-megatron", cls=PlainCommand)
def from_megatron(
    load: Load,
    save: Save,
    overrides: Overrides = None,
    ckpt_step: CkptStep = None,
    config: Config = None,
    preset: Preset = None,
    width: Width = None,
    tokenizer_model: TokenizerModel = None,
    eod_token: EodToken = None,
    text: Text = None,
    verify: Verify = True,
    overwrite: Overwrite = False,
) -> None:
    """Take over the weights of a checkpoint that Megatron-LM's own training saved."""
    from megatron_mup.convert import conversion
    from megatron_mup.convert.upstream_source import UpstreamSource

    given = Given(overwrite, verify, False, tokenizer_model, eod_token, text)
    source = UpstreamSource(load, iteration=ckpt_step)
    run = _target(source, config, preset, width, overrides)
    with _bar() as bar:
        made = conversion.from_upstream(source, save, run=run, handling=_handling(bar, given))
    _tell(made)


@app.command("to-sp", cls=PlainCommand)
def to_sp(
    load: Load,
    save: Save,
    overrides: Overrides = None,
    ckpt_step: CkptStep = None,
    tokenizer_model: TokenizerModel = None,
    eod_token: EodToken = None,
    any_tokenizer: AnyTokenizer = False,
    text: Text = None,
    verify: Verify = True,
    overwrite: Overwrite = False,
    check: CheckFiles = True,
) -> None:
    """Write the same function under the standard parameterization, with a fresh optimizer."""
    from megatron_mup.convert import conversion
    from megatron_mup.convert.megatron_source import MegatronSource

    given = Given(overwrite, verify, check, tokenizer_model, eod_token, text, any_tokenizer)
    with _bar() as bar:
        made = conversion.to_standard(
            MegatronSource(load, ckpt_step, check=False),
            save,
            overrides=overrides or [],
            handling=_handling(bar, given),
        )
    _tell(made)


@app.command("reshard", cls=PlainCommand)
def reshard_command(
    load: Load,
    save: Save,
    layout: Annotated[
        list[str], typer.Argument(help="Options of parallel and recompute.", metavar="KEY=VALUE")
    ],
    ckpt_step: CkptStep = None,
    verify: Annotated[
        bool, typer.Option("--verify/--no-verify", help="Compare all tensors at the end.")
    ] = True,
    overwrite: Overwrite = False,
    check: CheckFiles = True,
) -> None:
    """Rewrite a checkpoint, optimizer state included, as the ranks of another layout hold it."""
    from megatron_mup.convert.reshard import reshard

    with _bar() as bar:
        folder = reshard(
            load,
            save,
            layout=layout,
            iteration=ckpt_step,
            check=check,
            verify=verify,
            overwrite=overwrite,
            progress=_advance(bar, "writing"),
        )
    typer.echo(f"{folder}: {' '.join(layout)}; continue it with checkpoint.load={save}")


@app.command("inspect", cls=PlainCommand)
def inspect_command(
    path: Annotated[Path, typer.Argument(help="Checkpoint or Hugging Face folder.")],
    ckpt_step: CkptStep = None,
    check: Annotated[
        bool, typer.Option("--check", help="Compare the SHA-256 of all files.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Print what a checkpoint holds and where it comes from; ends with 1 if it is damaged."""
    from megatron_mup.convert.inspection import inspect_checkpoint
    from megatron_mup.convert.inspection_report import inspection_text

    found = inspect_checkpoint(path, ckpt_step, check=check)
    typer.echo(json.dumps(found.to_json(), indent=1) if as_json else inspection_text(found))
    if found.problems:
        raise typer.Exit(EXIT_DAMAGED)


def parse_size(text: str, option: str) -> int:
    """Bytes of a size such as 500MB, 5GB or 2GiB.

    Raises:
        ConfigError: it is none.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B?", text.strip(), re.IGNORECASE)
    if match is None or float(match[1]) <= 0:
        raise ConfigError(f"{option} is '{text}'; write a size such as 500MB, 5GB or 2GiB")
    power = "KMGT".find(match[2].upper()) + 1 if match[2] else 0
    return int(float(match[1]) * (1024 if match[3] else 1000) ** power)


class Given(NamedTuple):
    """What several verbs take."""

    overwrite: bool
    verify: bool
    check: bool
    tokenizer_model: Path | None
    eod_token: str | None
    text: Path | None
    any_tokenizer: bool = False


def _handling(bar: Progress, given: Given) -> Handling:
    from megatron_mup.convert.checked_text import Handling
    from megatron_mup.data.tokenizer import load_tokenizer

    model = given.tokenizer_model
    return Handling(
        overwrite=given.overwrite,
        check=given.check,
        verify=given.verify,
        tokenizer=None if model is None else load_tokenizer(model, eod_token=given.eod_token),
        any_tokenizer=given.any_tokenizer,
        text=given.text,
        progress=_advance(bar, "writing"),
        say=bar.console.print,
    )


def _target(
    source: WeightSource,
    config: Path | None,
    preset: str | None,
    width: int | None,
    overrides: list[str] | None,
) -> RunConfig:
    from megatron_mup.convert.target_run import target_run

    said = None
    if config is not None or preset is not None or width is not None:
        said = RunSource(config=config, preset=preset, width=width)
    return target_run(source.model, source.multipliers, said, overrides or [])


def _bar() -> Progress:
    """A progress bar on stderr, so that stdout holds the results alone."""
    return Progress(
        "{task.description}",
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
    )


def _advance(bar: Progress, description: str) -> Callable[[int, int], None]:
    # Seen from the first byte on: what is refused has written nothing.
    task = bar.add_task(description, total=None, visible=False)
    return lambda done, total: bar.update(task, completed=done, total=total, visible=True)


def _tell(made: Conversion) -> None:
    """Print what was made; ends with ``EXIT_NOT_VERIFIED`` if it computes another function."""
    if made.report is not None:
        typer.echo(made.report.render())
    if not made.passed:
        typer.echo(
            f"error: the output computes another function than its source; it is now {made.folder}",
            err=True,
        )
        raise typer.Exit(EXIT_NOT_VERIFIED)
    for line in made.lines:
        typer.echo(line)
    if made.report is None:
        typer.echo("not verified (--no-verify)", err=True)
