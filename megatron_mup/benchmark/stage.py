"""``python -m megatron_mup.benchmark.stage``: a stage of a large model, and the plan's error on it.

Measures stages of a configuration's layers on one GPU at the real microbatch, in bf16 and FP8. The
first stage of a precision calibrates the plan; the others say how far the plan is off before and
after that. The calibration file is what ``megatron-mup plan --calibration`` reads.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer
import yaml

from megatron_mup.benchmark.command_line import run_command
from megatron_mup.benchmark.gpu_models import Precision
from megatron_mup.benchmark.stage_measure import ALONE, StageParts, measure_stage
from megatron_mup.benchmark.stage_report import StageReport
from megatron_mup.config import RunConfig
from megatron_mup.data.publication import check_writable, publish_text
from megatron_mup.errors import ConfigError
from megatron_mup.model.layer_specs import check_implementation
from megatron_mup.planning.command import load_without_rate
from megatron_mup.planning.gpus import gpu_called
from megatron_mup.run_source import RunSource

EXIT_FAILED = 1

ENDS: dict[str, dict[str, bool]] = {
    "none": {},
    "embedding": {"embedding": True},
    "readout": {"readout": True},
    "both": {"embedding": True, "readout": True},
}
"""What ``--ends`` takes."""

Overrides = Annotated[list[str] | None, typer.Argument(help="key=value", metavar="KEY=VALUE")]
Layers = Annotated[str, typer.Option(help="Numbers of layers; the first stage calibrates.")]
EndsOption = Annotated[str, typer.Option("--ends", help="Some of none,embedding,readout,both.")]
Kinds = Annotated[str, typer.Option("--precision", help="Some of bf16,fp8.")]
CalibrationOut = Annotated[Path | None, typer.Option(help="Write the calibration of a plan here.")]
Output = Annotated[Path | None, typer.Option(help="JSON file for all numbers; replaced.")]


def measure_and_report(
    overrides: Overrides = None,
    config: Annotated[Path, typer.Option(help="YAML.")] = Path("launch/configs/mup_10b.yaml"),
    layers: Layers = "2,3",
    ends_of_stage: EndsOption = "none,embedding,readout",
    precision: Kinds = "bf16,fp8",
    gpu: Annotated[str, typer.Option(help="h100, h200 or b200.")] = "h200",
    steps: Annotated[int, typer.Option(help="Measured steps of each stage.")] = 10,
    calibration: CalibrationOut = None,
    output: Output = None,
) -> None:
    """Measure stages of a model and compare them with its plan."""
    stages, kinds = chosen(layers, ends_of_stage, precision)
    if steps < 1:
        raise ConfigError(f"--steps is {steps}; give at least 1")
    check_writable(
        [path for path in (calibration, output) if path is not None],
        overwrite=True,
        option="--calibration or --output",
    )
    runs = {
        (kind, parts): stage_run(config, parts, kind, overrides or ())
        for kind in kinds
        for parts in stages
    }
    check_implementation(next(iter(runs.values())).model)
    report = StageReport(gpu_called(gpu))
    for (kind, parts), run in runs.items():
        typer.echo(f"{parts.label}, {kind}")
        _measure(report, kind, parts, run, steps=steps)
        # After each stage: a run that is cut keeps what it has.
        if calibration is not None:
            publish_text(calibration, yaml.safe_dump(report.calibration(), sort_keys=False))
        if output is not None:
            publish_text(output, json.dumps(report.plain(), indent=1) + "\n")
    typer.echo(report.table())
    if report.failed:
        raise typer.Exit(EXIT_FAILED)


def _measure(
    report: StageReport, kind: Precision, parts: StageParts, run: RunConfig, *, steps: int
) -> None:
    """Add a stage to the report, or why it has no numbers: the others are worth having anyway."""
    try:
        report.add(kind, parts, run, measure_stage(run, parts, steps=steps))
    # Out of memory, no compiler, no kernel: RuntimeErrors of torch.
    except RuntimeError as error:
        name = f"{parts.label}, {kind}"
        report.failed[name] = f"{type(error).__name__}: {str(error)[:500]}"
        typer.echo(f"{name}: {report.failed[name]}", err=True)


def chosen(
    layers: str, stage_ends: str, precision: str
) -> tuple[list[StageParts], list[Precision]]:
    """Stages and precisions of the command line; further numbers of layers come without ends.

    Raises:
        ConfigError: something unknown, or no number of layers.
    """
    counts, wanted, kinds = layers.split(","), stage_ends.split(","), precision.split(",")
    if not all(count.isdigit() and int(count) > 0 for count in counts):
        raise ConfigError(f"--layers is '{layers}'; give positive numbers, such as 2,3")
    if wrong := [end for end in wanted if end not in ENDS]:
        raise ConfigError(f"--ends has '{wrong[0]}'; use some of {','.join(ENDS)}")
    if wrong := [kind for kind in kinds if kind not in Precision]:
        raise ConfigError(f"--precision has '{wrong[0]}'; use some of {','.join(Precision)}")
    first, *more = (int(count) for count in counts)
    stages = [StageParts(layers=first, **ENDS[end]) for end in wanted]
    stages += [StageParts(layers=count) for count in more]
    # A stage of layers alone calibrates, if there is one: the plan's rates are those of layers.
    stages.sort(key=lambda parts: parts.embedding + parts.readout)
    return stages, [Precision(kind) for kind in kinds]


def stage_run(
    config: Path, parts: StageParts, precision: Precision, overrides: Sequence[str]
) -> RunConfig:
    """The configuration cut down to a stage, one microbatch a step.

    Args:
        config: of the whole model.
        parts: of the stage.
        precision: bf16 takes the configuration's FP8 format out.
        overrides: ``key=value``, the last word.

    Raises:
        MupError: the configuration cannot be read or cut down.
    """
    source = RunSource(config=config)
    micro = load_without_rate(source, list(overrides)).training.micro_batch_size
    options = [
        *ALONE,
        f"model.num_layers={parts.layers}",
        f"training.global_batch_size={micro}",
        "precision.bf16=true",
    ]
    if precision is Precision.BF16:
        options.append("precision.fp8_format=null")
    run = load_without_rate(source, [*options, *overrides])
    if precision is Precision.FP8 and run.precision.fp8_format is None:
        raise ConfigError(
            f"--precision fp8: {config} sets no FP8; add precision.fp8_format=hybrid, or measure "
            "bf16 alone"
        )
    return run


def main() -> None:
    """Run the command line."""
    run_command(measure_and_report)


if __name__ == "__main__":
    main()
