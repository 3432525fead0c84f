"""``megatron-mup convert <verb>``: reads arguments, calls one function, prints what it made."""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Callable, Iterator
from functools import partial
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
from megatron_mup.convert import command_options as options
from megatron_mup.convert.termination import ends_at_sigterm
from megatron_mup.errors import ConfigError
from megatron_mup.run_source import RunSource

if TYPE_CHECKING:
    from megatron_mup.convert.checked_text import Handling
    from megatron_mup.convert.conversion import Conversion
    from megatron_mup.convert.weights import WeightSource

app = typer.Typer(
    no_args_is_help=True, help="Checkpoints to and from Hugging Face, and to other layouts."
)

_LARGE_PAGES = "THP_MEM_ALLOC_ENABLE"

EXIT_NOT_VERIFIED = 1
EXIT_DAMAGED = 1


@contextlib.contextmanager
def _large_pages() -> Iterator[None]:
    """Give large tensors large pages; torch 2.11 reads the variable when it first makes one.

    Tensors of hundreds of megabytes come and go; in pages of 4 kB the system spends more time on
    handing out their memory than the disk on their values.
    """
    given = _LARGE_PAGES in os.environ
    os.environ.setdefault(_LARGE_PAGES, "1")
    try:
        yield
    finally:
        # Nothing but a conversion gains by it, neither here nor in processes started later.
        if not given:
            del os.environ[_LARGE_PAGES]


@app.callback()
def _around_every_verb(context: typer.Context) -> None:
    context.with_resource(_large_pages())
    context.with_resource(ends_at_sigterm())


@app.command("to-hf", cls=PlainCommand)
def to_hf(
    load: options.Load,
    output: options.Output,
    format_name: options.Format,
    ckpt_step: options.CkptStep = None,
    dtype: options.Dtype = None,
    tokenizer_model: options.TokenizerModel = None,
    eod_token: options.EodToken = None,
    any_tokenizer: options.AnyTokenizer = False,
    text: options.Text = None,
    verify: options.Verify = True,
    max_shard_size: options.MaxShardSize = "5GB",
    overwrite: options.Overwrite = False,
    allow_non_finite: options.AllowNonFinite = False,
    check: options.CheckFiles = True,
) -> None:
    """Export a checkpoint as a folder that transformers loads."""
    from megatron_mup.convert import conversion
    from megatron_mup.convert.formats import HfFormat
    from megatron_mup.convert.megatron_source import MegatronSource

    wanted = conversion.HfOptions(
        hf_format=HfFormat(format_name.value),
        dtype=dtype,
        max_shard_bytes=parse_size(max_shard_size, "--max-shard-size"),
        allow_non_finite=allow_non_finite,
    )
    given = Given(overwrite, verify, check, tokenizer_model, eod_token, text, any_tokenizer)
    source = MegatronSource(load, ckpt_step, check=False)
    with _bar() as bar:
        handling = _handling(bar, given)
        made = conversion.to_huggingface(source, output, options=wanted, handling=handling)
    if tokenizer_model is None:
        typer.echo("no tokenizer files: pass --tokenizer-model to add them", err=True)
    _tell(made)


@app.command("from-hf", cls=PlainCommand)
def from_hf(
    source_folder: options.Input,
    save: options.Save,
    overrides: options.Overrides = None,
    config: options.Config = None,
    preset: options.Preset = None,
    width: options.Width = None,
    tokenizer_model: options.TokenizerModel = None,
    eod_token: options.EodToken = None,
    text: options.Text = None,
    verify: options.Verify = True,
    overwrite: options.Overwrite = False,
    trust_remote_code: options.TrustRemoteCode = False,
    check: options.CheckWeights = True,
) -> None:
    """Import a Hugging Face folder as weights to train from, under any parameterization."""
    from megatron_mup.convert import conversion
    from megatron_mup.convert.huggingface_source import HuggingFaceSource

    source = HuggingFaceSource(source_folder)
    _take_over(
        source,
        Wanted(config, preset, width, overrides),
        Given(overwrite, verify, check, tokenizer_model, eod_token, text),
        partial(conversion.from_huggingface, source, save, trust_remote_code=trust_remote_code),
    )


@app.command("from-megatron", cls=PlainCommand)
def from_megatron(
    load: options.Load,
    save: options.Save,
    overrides: options.Overrides = None,
    ckpt_step: options.CkptStep = None,
    config: options.Config = None,
    preset: options.Preset = None,
    width: options.Width = None,
    tokenizer_model: options.TokenizerModel = None,
    eod_token: options.EodToken = None,
    text: options.Text = None,
    verify: options.Verify = True,
    overwrite: options.Overwrite = False,
) -> None:
    """Take over the weights of a checkpoint that Megatron-LM's own training saved."""
    from megatron_mup.convert import conversion
    from megatron_mup.convert.upstream_source import UpstreamSource

    source = UpstreamSource(load, iteration=ckpt_step)
    _take_over(
        source,
        Wanted(config, preset, width, overrides),
        Given(overwrite, verify, False, tokenizer_model, eod_token, text),
        partial(conversion.from_upstream, source, save),
    )


@app.command("to-sp", cls=PlainCommand)
def to_sp(
    load: options.Load,
    save: options.Save,
    overrides: options.Overrides = None,
    ckpt_step: options.CkptStep = None,
    tokenizer_model: options.TokenizerModel = None,
    eod_token: options.EodToken = None,
    any_tokenizer: options.AnyTokenizer = False,
    text: options.Text = None,
    verify: options.Verify = True,
    overwrite: options.Overwrite = False,
    check: options.CheckFiles = True,
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
    load: options.Load,
    save: options.Save,
    layout: Annotated[
        list[str], typer.Argument(help="Options of parallel and recompute.", metavar="KEY=VALUE")
    ],
    ckpt_step: options.CkptStep = None,
    verify: Annotated[
        bool, typer.Option("--verify/--no-verify", help="Compare all tensors at the end.")
    ] = True,
    overwrite: options.Overwrite = False,
    check: options.CheckFiles = True,
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
    ckpt_step: options.CkptStep = None,
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
    size = 0.0
    if match is not None:
        power = "KMGT".find(match[2].upper()) + 1 if match[2] else 0
        size = float(match[1]) * (1024 if match[3] else 1000) ** power
    if size < 1:
        raise ConfigError(f"{option} is '{text}'; write a size such as 500MB, 5GB or 2GiB")
    return int(size)


class Given(NamedTuple):
    """What several verbs take."""

    overwrite: bool
    verify: bool
    check: bool
    tokenizer_model: Path | None
    eod_token: str | None
    text: Path | None
    any_tokenizer: bool = False


class Wanted(NamedTuple):
    """What an import says of its target."""

    config: Path | None
    preset: str | None
    width: int | None
    overrides: list[str] | None


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


def _take_over(
    source: WeightSource, wanted: Wanted, given: Given, convert: Callable[..., Conversion]
) -> None:
    """Import weights as what the user said of the target."""
    from megatron_mup.convert.target_run import target_run

    said = None
    if wanted[:3] != (None, None, None):
        said = RunSource(config=wanted.config, preset=wanted.preset, width=wanted.width)
    run = target_run(source.model, source.multipliers, said, wanted.overrides or [])
    with _bar() as bar:
        made = convert(run=run, handling=_handling(bar, given))
    _tell(made)


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
