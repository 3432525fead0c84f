"""``megatron-mup plan``: reads arguments, makes a plan, prints it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from megatron_mup.errors import ConfigError

if TYPE_CHECKING:
    from megatron_mup.config import RunConfig
    from megatron_mup.run_source import RunSource

_ANY_LR = 1.0
"""Stands in for a peak learning rate that is not tuned yet; no layout depends on it."""

Overrides = Annotated[
    list[str] | None, typer.Argument(help="key=value or section.key=value", metavar="KEY=VALUE")
]
Config = Annotated[Path | None, typer.Option("--config", help="YAML configuration.")]
Preset = Annotated[str | None, typer.Option("--preset", help="Named experiment.")]
Width = Annotated[int | None, typer.Option("--width", help="Hidden size of the preset.")]
HeadDim = Annotated[int | None, typer.Option("--head-dim", help="Head dim of the preset.")]
BaseWidth = Annotated[int | None, typer.Option("--base-width", help="Base width of the preset.")]
GpuKind = Annotated[str, typer.Option("--gpu", help="h100, h200 or b200.")]
Gpus = Annotated[int, typer.Option("--gpus", help="Number of GPUs.")]
Top = Annotated[int, typer.Option("--top", help="Layouts to show, the best first.")]
JsonFile = Annotated[
    Path | None, typer.Option("--json", help="Also write the plan to this file.", metavar="FILE")
]
Calibration = Annotated[
    Path | None,
    typer.Option("--calibration", help="YAML of measured numbers; see docs/plan.md."),
]


def plan_command(
    gpu: GpuKind,
    gpus: Gpus,
    overrides: Overrides = None,
    config: Config = None,
    preset: Preset = None,
    width: Width = None,
    head_dim: HeadDim = None,
    base_width: BaseWidth = None,
    top: Top = 10,
    json_file: JsonFile = None,
    calibration: Calibration = None,
) -> None:
    """Rank the layouts of a run on so many GPUs by memory, step time and GPU-hours."""
    from megatron_mup.planning.assumptions import assumptions_for
    from megatron_mup.planning.gpus import gpu_called
    from megatron_mup.run_source import RunSource

    if top < 1:
        raise ConfigError(f"--top is {top}; give the number of layouts to show, at least 1")
    kind = gpu_called(gpu)
    assumptions = assumptions_for(kind.name, calibration)
    source = RunSource(
        config=config, preset=preset, width=width, head_dim=head_dim, base_width=base_width
    )
    run = load_without_rate(source, overrides or [])
    # Torch, for the checks of a layout, takes a second to import: only after the arguments.
    from megatron_mup.planning.plan import make_plan
    from megatron_mup.planning.report import render, to_json

    plan = make_plan(run, gpu=kind, gpus=gpus, assumptions=assumptions)
    if json_file is not None:
        _write(json_file, json.dumps(to_json(plan, top=top), indent=1))
    typer.echo(render(plan, top=top))


def load_without_rate(source: RunSource, overrides: list[str]) -> RunConfig:
    """The configuration, whether or not it has a learning rate.

    Args:
        source: file or preset.
        overrides: ``key=value``.

    Raises:
        MupError: what ``RunSource.load`` refuses, but for a missing learning rate.
    """
    from megatron_mup.config_io import config_from_dict, qualified

    sections = source.sections()
    given = {qualified(override).partition("=")[0] for override in overrides}
    if "optimizer.lr" not in given:
        sections.setdefault("optimizer", {}).setdefault("lr", _ANY_LR)
    return config_from_dict(sections, overrides, origin=source.origin)


def _write(path: Path, text: str) -> None:
    try:
        path.write_text(text + "\n", encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"cannot write --json '{path}': {error.strerror}") from error
