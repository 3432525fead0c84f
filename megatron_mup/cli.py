"""``megatron-mup <verb>``: the command line. Thin: reads arguments, calls one function, prints.

User errors (``MupError``) end with one message and their exit code, without a traceback. Heavy
imports happen inside the verbs, so that ``--help`` and errors are quick.
"""

from __future__ import annotations

import json
import signal
import sys
import traceback
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from megatron_mup import __version__
from megatron_mup.command_help import PlainCommand
from megatron_mup.config import RunConfig
from megatron_mup.convert.commands import app as convert_app
from megatron_mup.data.commands import app as data_app
from megatron_mup.errors import ConfigError, MupError
from megatron_mup.generation_command import generate_command
from megatron_mup.launching.commands import app as launch_app
from megatron_mup.os_processes import end_now, is_one_of_several_ranks
from megatron_mup.planning.command import plan_command
from megatron_mup.transfer.campaign.command import campaign_command
from megatron_mup.transfer.sweep.commands import app as sweep_app

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="muP for Megatron-Core: train, describe, preprocess, check.",
)
app.add_typer(data_app, name="data", help="Tokenizers and token shards.")
app.add_typer(convert_app, name="convert", help="Checkpoints to and from Hugging Face.")
app.add_typer(launch_app, name="launch", help="Steps of the launch scripts around a run.")
app.add_typer(sweep_app, name="sweep", help="Learning rates over sizes: plan, run, follow.")
app.command("generate", cls=PlainCommand)(generate_command)
app.command("plan", cls=PlainCommand)(plan_command)
app.command("campaign", cls=PlainCommand)(campaign_command)

ConfigOption = Annotated[
    Path | None, typer.Option("--config", help="YAML configuration; see docs/configuration.md.")
]
Overrides = Annotated[
    list[str] | None, typer.Argument(help="key=value or section.key=value", metavar="KEY=VALUE")
]


PresetOption = Annotated[
    str | None, typer.Option("--preset", help="Named experiment; see 'megatron-mup presets'.")
]
WidthOption = Annotated[int | None, typer.Option("--width", help="Hidden size of the preset.")]
HeadDimOption = Annotated[
    int | None, typer.Option("--head-dim", help="Head dim of the preset; unset: the paper's 128.")
]
BaseWidthOption = Annotated[
    int | None, typer.Option("--base-width", help="Base width of the preset; unset: one head.")
]

TranslateOption = Annotated[
    str | None,
    typer.Option(
        "--from-megatron-args",
        help="Print the YAML for a Megatron-LM command line instead of training.",
    ),
]
DryRunOption = Annotated[
    bool,
    typer.Option("--dry-run", help="Check and print what would be; no GPU, nothing is written."),
]
DiagnosticsOption = Annotated[
    int | None,
    typer.Option(
        "--diagnostics-interval",
        help="Measure update dynamics every so many iterations; see docs/dynamics.md.",
    ),
]
WorldSizeOption = Annotated[
    int | None,
    typer.Option("--world-size", help="Ranks of the dry run; unset: the fewest that fit."),
]


def _refuse_with_translation(config: Path | None, overrides: list[str]) -> None:
    """Raise ConfigError for arguments that a translation would silently ignore."""
    given = [f"--config {config}"] if config is not None else []
    given += overrides
    if given:
        raise ConfigError(
            f"--from-megatron-args only prints a configuration, but {', '.join(given)} is given as "
            "well; save the printed YAML and pass it with --config FILE"
        )


@app.command()
def train(
    overrides: Overrides = None,
    config: ConfigOption = None,
    preset: PresetOption = None,
    width: WidthOption = None,
    head_dim: HeadDimOption = None,
    base_width: BaseWidthOption = None,
    from_megatron_args: TranslateOption = None,
    dry: DryRunOption = False,
    diagnostics_interval: DiagnosticsOption = None,
    world_size: WorldSizeOption = None,
) -> None:
    """Train a GPT as configured; launch with python, torchrun or srun."""
    overrides = list(overrides or [])
    if diagnostics_interval is not None:
        overrides.append(f"logging.diagnostics_interval={diagnostics_interval}")
    if world_size is not None and not dry:
        raise ConfigError(
            f"--world-size {world_size} is for --dry-run; the launcher (torchrun, srun) says how "
            "many ranks train"
        )
    if from_megatron_args is not None:
        others = [*overrides, *(["--dry-run"] if dry else [])]
        others += [f"--preset {preset}"] if preset is not None else []
        _refuse_with_translation(config, others)
        _print_translation(from_megatron_args)
        return
    from megatron_mup.run_source import RunSource

    source = RunSource(
        config=config, preset=preset, width=width, head_dim=head_dim, base_width=base_width
    )
    run = source.load(overrides)
    if dry:
        _print_dry_run(run, world_size)
    else:
        _train(run)


def _train(run: RunConfig) -> None:
    from megatron_mup.diagnostics.dynamics import observer_for
    from megatron_mup.training.loop import train as run_training

    result = run_training(run, observer=observer_for(run), echo=typer.echo)
    for number in (signal.SIGUSR1, signal.SIGTERM):
        # The result is there: a time limit that comes now must not make it look like a failure.
        signal.signal(number, signal.SIG_IGN)
    if result.exit_code:
        raise typer.Exit(result.exit_code)


def _print_translation(flags: str) -> None:
    from megatron_mup.megatron_args import translate

    translation = translate(flags)
    # Notes go to stderr, so that stdout can be redirected into a configuration file.
    typer.echo(translation.yaml)
    for line in translation.unmapped:
        typer.echo(line, err=True)


def _print_dry_run(run: RunConfig, world_size: int | None) -> None:
    from megatron_mup.dry_run import dry_run
    from megatron_mup.dry_run_report import render

    typer.echo(render(dry_run(run, world_size=world_size)))


@app.command()
def describe(
    overrides: Overrides = None,
    config: ConfigOption = None,
    preset: PresetOption = None,
    width: WidthOption = None,
    head_dim: HeadDimOption = None,
    base_width: BaseWidthOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Print every parameter with its init, LR, decay, eps, multiplier and source."""
    from megatron_mup.describe import describe_json, describe_run
    from megatron_mup.run_source import RunSource

    source = RunSource(
        config=config, preset=preset, width=width, head_dim=head_dim, base_width=base_width
    )
    run = source.load(overrides or [])
    typer.echo(describe_json(run.table) if as_json else describe_run(run))


@app.command()
def presets(
    name: Annotated[
        str | None, typer.Argument(help="Print this preset's YAML; needs --width.")
    ] = None,
    width: WidthOption = None,
    head_dim: HeadDimOption = None,
    base_width: BaseWidthOption = None,
) -> None:
    """List the named experiments with their change and the paper's verdict."""
    from megatron_mup import preset_report as module

    if name is None:
        typer.echo(module.render())
        return
    typer.echo(module.as_yaml(name, width=width, head_dim=head_dim, base_width=base_width))


@app.command()
def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Print versions, device, active kernels, and what is missing for FP8."""
    from megatron_mup import doctor as module

    report = module.collect()
    typer.echo(json.dumps(asdict(report), indent=1) if as_json else module.render(report))


@app.command()
def plot(
    source: Annotated[
        Path, typer.Argument(help="Folder of checkpoint.save, or a JSON lines file.", metavar="RUN")
    ],
    out: Annotated[
        Path | None, typer.Option(help="Picture (PNG); unset: dynamics.png beside the rows.")
    ] = None,
) -> None:
    """Draw the update dynamics that 'train --diagnostics-interval' measured, and print a table."""
    from megatron_mup.diagnostics import dynamics_plot as module

    typer.echo(module.plot(source, out))


@app.command()
def status(
    folder: Annotated[Path, typer.Argument(help="Run folder, or checkpoint.save.", metavar="DIR")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Print a run's progress, last checkpoint, health and time left; ends with 1 if not healthy."""
    from megatron_mup import status_report as module

    report = module.inspect_folder(folder)
    typer.echo(json.dumps(report.to_json(), indent=1) if as_json else module.render(report))
    if not report.healthy:
        raise typer.Exit(1)


@app.command()
def quickstart(
    text: Annotated[
        list[Path] | None,
        typer.Option(
            help="Text or JSONL file; unset: the folder's own shards, or installed Python."
        ),
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder of data, runs and report.")] = Path(
        "quickstart"
    ),
    widths: Annotated[
        str, typer.Option(help="Hidden sizes, multiples of 16, increasing.")
    ] = "32,64,128",
    log2_lrs: Annotated[
        str, typer.Option(help="Grid of log2 base learning rates, at least 3, increasing.")
    ] = "-8,-7,-6,-5,-4,-3,-2",
    steps: Annotated[int, typer.Option(help="Optimizer steps of each run.")] = 200,
    seeds: Annotated[
        str, typer.Option(help="Seeds; all but the first near the best learning rate only.")
    ] = "1,2,3",
    workers: Annotated[
        int | None, typer.Option(help="Runs at a time; unset: one for each core.")
    ] = None,
) -> None:
    """Train muP and SP at several widths and show where the best learning rate lies."""
    from megatron_mup.transfer import quickstart as module
    from megatron_mup.transfer.sweep.pool import share_of_machine

    plan = module.QuickstartPlan(
        out=out,
        text=tuple(text or ()),
        # int refuses 32.5 and nan where float would take them.
        widths=tuple(int(width) for width in _listed("--widths", widths, int, "whole numbers")),
        log2_lrs=_listed("--log2-lrs", log2_lrs, float, "numbers"),
        steps=steps,
        seeds=tuple(int(seed) for seed in _listed("--seeds", seeds, int, "whole numbers")),
    )
    code = module.run_quickstart(plan, share_of_machine(workers), typer.echo)
    if code:
        raise typer.Exit(code)


@app.command("coord-check")
def coord_check(
    overrides: Overrides = None,
    config: ConfigOption = None,
    preset: PresetOption = None,
    head_dim: Annotated[
        int | None, typer.Option("--head-dim", help="Head dim of the preset; unset: 16.")
    ] = None,
    base_width: Annotated[
        int | None,
        typer.Option("--base-width", help="Base width of the preset; unset: the smallest width."),
    ] = None,
    widths: Annotated[str, typer.Option(help="Hidden sizes, increasing.")] = "64,128,256,512",
    steps: Annotated[int, typer.Option(help="Optimizer steps of each run.")] = 4,
    seeds: Annotated[int, typer.Option(help="Seeds of the initial weights.")] = 3,
    out: Annotated[Path, typer.Option(help="Folder of the CSV files and the picture.")] = Path(
        "coordinate_check"
    ),
    grow: Annotated[str, typer.Option(help="What follows the width: heads or head-dim.")] = "heads",
    data: Annotated[bool, typer.Option(help="Read the configured shards.")] = False,
) -> None:
    """Check that no activation's change grows with the width; ends with 1 if one does."""
    from megatron_mup.diagnostics import coordinate_check as module

    request = module.CheckRequest(
        widths=[int(width) for width in _listed("--widths", widths, int, "whole numbers")],
        config=config,
        preset=preset,
        head_dim=head_dim,
        base_width=base_width,
        steps=steps,
        seeds=seeds,
        out=out,
        grow=module.grow_from_text(grow),
        with_data=data,
        overrides=overrides or [],
    )
    if not module.run_check(request, echo=typer.echo):
        raise typer.Exit(1)


def _listed(
    option: str, text: str, kind: Callable[[str], float], kind_in_words: str
) -> tuple[float, ...]:
    """Parse a comma-separated list.

    Raises:
        ConfigError: something in it is not of that kind.
    """
    try:
        return tuple(kind(part) for part in text.split(","))
    except ValueError as error:
        raise ConfigError(
            f"{option} is '{text}'; give {kind_in_words} separated by commas"
        ) from error


def _print_version(value: bool) -> None:
    if value:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="Print version."),
    ] = False,
) -> None:
    """Options before the verb."""


def main() -> None:
    """Entry point of the console script."""
    try:
        app()
    except MupError as error:
        typer.echo(f"error: {error}", err=True)
        _leave(error.exit_code)
    except Exception:
        traceback.print_exc()
        _leave(1)


def _leave(code: int) -> NoReturn:
    """End a process that failed; one of several ranks without waiting for the others."""
    if is_one_of_several_ranks():
        end_now(code)
    sys.exit(code)
