"""A dry run in words and tables: layout, memory, schedule, costs, what would be written.

Only reads what ``dry_run`` found; computes nothing that another part of a run would need.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence

from rich.console import Console
from rich.table import Table

from megatron_mup.config import DecayStyle, RunConfig, TransformerImpl
from megatron_mup.describe import MIN_WIDTH, describe_run
from megatron_mup.dry_run import DryRun, Stage
from megatron_mup.flops import model_flops_per_token
from megatron_mup.memory import GIB, bubble_fraction, checkpoint_bytes, passes_in_flight
from megatron_mup.optimizer.schedule import run_factor
from megatron_mup.training.batches import samples_after


def render(report: DryRun, *, width: int | None = None) -> str:
    """The report for people.

    Args:
        report: from ``dry_run``.
        width: columns; unset means the terminal's, but enough for the parameter table.
    """
    run = report.run
    width = width or max(MIN_WIDTH, shutil.get_terminal_size((MIN_WIDTH, 50)).columns)
    console = Console(width=width, highlight=False)
    with console.capture() as capture:
        console.print(_pairs("layout", layout_lines(report)))
        console.print(_stage_table(report))
        for line in _remarks(run):
            console.print(line, markup=False)
        console.print(_schedule_table(run))
        console.print(_pairs("cost", cost_lines(report)))
        console.print(_pairs("files", file_lines(report)))
    return capture.get() + describe_run(run)


def _pairs(title: str, lines: Sequence[tuple[str, str]]) -> Table:
    table = Table(title=title, show_header=False, title_justify="left")
    for name, value in lines:
        table.add_row(name, value)
    return table


def layout_lines(report: DryRun) -> list[tuple[str, str]]:
    """How ranks and microbatches are laid out, as (name, value)."""
    run, parallel = report.run, report.run.parallel
    data = f"{report.data_parallel_size}"
    if parallel.use_distributed_optimizer:
        data += ", distributed optimizer"
    return [
        ("ranks", f"{report.world_size}"),
        (
            "tensor parallel",
            f"{parallel.tensor_model_parallel_size}"
            + (", sequence parallel" if parallel.sequence_parallel else ""),
        ),
        ("pipeline parallel", f"{parallel.pipeline_model_parallel_size}"),
        ("virtual chunks per rank", f"{parallel.model_chunks}"),
        ("context parallel", f"{parallel.context_parallel_size}"),
        ("data parallel", data),
        (
            "batch",
            f"{run.training.global_batch_size} sequences of {run.model.seq_length} tokens: "
            f"{report.microbatches} microbatches of {run.training.micro_batch_size} on each rank",
        ),
        ("pipeline bubble", f"{bubble_fraction(run, report.microbatches):.1%} of a step"),
        ("precision", _precision(run)),
        ("recomputation", str(run.recompute.recompute_granularity or "none")),
    ]


def _precision(run: RunConfig) -> str:
    name = "bf16 with fp32 main weights" if run.precision.bf16 else "fp32"
    if run.precision.fp8_format is None:
        return name
    return f"{name}, FP8 {run.precision.fp8_format.value}, {run.precision.fp8_recipe.value} scaling"


def _stage_table(report: DryRun) -> Table:
    """Parameters and memory of one rank of each stage; equal stages share a row."""
    table = Table(title="memory of one rank in GiB (estimate)", title_justify="left")
    for column in ("stage", "layers", "passes held", "parameters on a rank", "weights"):
        table.add_column(column, justify="right")
    for column in ("gradients", "optimizer", "activations", "total"):
        table.add_column(column, justify="right")
    for numbers, cells in _grouped(report):
        first, last = numbers[0], numbers[-1]
        table.add_row(str(first) if first == last else f"{first}-{last}", *cells)
    return table


def _grouped(report: DryRun) -> Iterator[tuple[list[int], tuple[str, ...]]]:
    """Consecutive stages with equal cells."""
    numbers: list[int] = []
    previous: tuple[str, ...] = ()
    for number, stage in enumerate(report.stages):
        held = passes_in_flight(report.run, number, report.microbatches)
        cells = _cells(stage, held)
        if numbers and cells != previous:
            yield numbers, previous
            numbers = []
        numbers.append(number)
        previous = cells
    yield numbers, previous


def _cells(stage: Stage, held: int) -> tuple[str, ...]:
    memory = stage.memory
    layers = " + ".join(str(len(chunk.layers)) for chunk in stage.chunks)
    sizes = (
        memory.weights,
        memory.gradients,
        memory.optimizer,
        memory.activations,
        memory.total,
    )
    elements = sum(chunk.elements for chunk in stage.chunks)
    return (layers, str(held), f"{elements:,}", *(f"{size / GIB:.2f}" for size in sizes))


def _remarks(run: RunConfig) -> Iterator[str]:
    yield (
        "Formulas: docs/dry_run.md. Not counted: workspaces, communication buffers, fragmentation, "
        "the CUDA context."
    )
    if run.model.transformer_impl is TransformerImpl.TRANSFORMER_ENGINE:
        yield (
            "transformer_impl=transformer_engine was built with local modules, whose matrices are "
            "the same; TransformerEngine's need a GPU."
        )


def _schedule_table(run: RunConfig) -> Table:
    table = Table(title="schedule", title_justify="left")
    table.add_column("at")
    for column in ("step", "factor s(t)", "base LR", "samples seen", "tokens seen"):
        table.add_column(column, justify="right")
    for name, step in landmarks(run):
        factor, samples = run_factor(run, step), samples_after(run.training, step)
        table.add_row(
            name,
            f"{step:,}",
            f"{factor:.4g}",
            f"{factor * run.optimizer_numbers.lr:.4g}",
            f"{samples:,}",
            f"{samples * run.model.seq_length:,}",
        )
    return table


def landmarks(run: RunConfig) -> list[tuple[str, int]]:
    """Steps, counted from 0, at which the schedule is worth a look, as (name, step)."""
    schedule, end = run.schedule, run.training.train_iters
    steps = [("start", 0), ("end of warmup", schedule.lr_warmup_iters), ("middle", end // 2)]
    if schedule.lr_decay_style is DecayStyle.WSD:
        steps.append(("start of decay", run.decay_iters - (schedule.lr_wsd_decay_iters or 0)))
    steps += [("last step", end - 1), ("end", end)]
    # The schedule may be longer than the run: what is not reached is left out.
    return sorted((item for item in steps if item[1] <= end), key=lambda item: item[1])


def cost_lines(report: DryRun) -> list[tuple[str, str]]:
    """Parameters and model FLOPs, as (name, value)."""
    run = report.run
    flops = model_flops_per_token(run.model)
    tokens = run.model.seq_length * samples_after(run.training, run.training.train_iters)
    step = flops * run.model.seq_length * run.training.global_batch_size
    return [
        ("parameters", f"{report.matrix_elements + report.other_elements:,}, as in the table"),
        ("of the layers' matrices", f"{report.matrix_elements:,}"),
        ("model FLOPs per token", f"{flops:.4g}"),
        ("model FLOPs per step", f"{step:.4g}, {step / report.world_size:.4g} on each rank"),
        ("model FLOPs of the run", f"{flops * tokens:.4g}"),
    ]


def file_lines(report: DryRun) -> list[tuple[str, str]]:
    """What would be read and written where, as (name, value); this machine writes nothing."""
    run = report.run
    lines = [("data", line) for line in report.data]
    if run.checkpoint.load is not None:
        lines.append(("checkpoint.load", f"{run.checkpoint.load}: checked when training starts"))
    if run.checkpoint.save is not None:
        lines.append(("checkpoint.save", f"{run.checkpoint.save}: {_checkpoints(report)}"))
    logging = run.logging
    written = {
        "logging.metrics_path": logging.metrics_path,
        "logging.tensorboard_dir": logging.tensorboard_dir,
        "logging.wandb_save_dir": logging.wandb_save_dir,
        "training.profile_dir": run.training.profile_dir if run.training.profile else None,
        "data.data_cache_path": run.data.data_cache_path,
    }
    return lines + [(name, path) for name, path in written.items() if path is not None]


def _checkpoints(report: DryRun) -> str:
    run = report.run
    size = checkpoint_bytes(run, report.matrix_elements, report.other_elements) / GIB
    interval = run.checkpoint.save_interval or run.training.train_iters
    count = -(-run.training.train_iters // interval)
    kept = run.checkpoint.keep_last
    text = f"{count} checkpoints of {size:.1f} GiB"
    if kept is None or kept >= count:
        return f"{text}, {count * size:.1f} GiB at the end"
    retained = run.checkpoint.save_retain_interval
    last = f"{text}, the last {kept} are kept"
    return last if retained is None else f"{last}, and every multiple of iteration {retained}"
