"""A plan in words, tables and JSON. Reads what ``make_plan`` found; computes nothing new."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import groupby
from typing import Any

import yaml
from rich.console import Console
from rich.table import Table

from megatron_mup.flops import model_flops_per_token
from megatron_mup.memory import GIB
from megatron_mup.planning.layouts import overrides
from megatron_mup.planning.plan import Plan
from megatron_mup.planning.prediction import Prediction, StageMemory, StepTime

_WIDTH = 140
_WIDEST = 240
"""Of numbers, which must not be cut; the other tables fold at ``_WIDTH``."""

_PARTS: dict[str, Callable[[StageMemory], float]] = {
    "weights": lambda stage: stage.counted.weights,
    "gradients": lambda stage: stage.counted.gradients,
    "optimizer": lambda stage: stage.counted.optimizer,
    "activations": lambda stage: stage.counted.layers,
    "recomputed": lambda stage: stage.counted.recomputed,
    "logits": lambda stage: stage.counted.logits,
    "workspace": lambda stage: stage.workspace,
    "context": lambda stage: stage.context,
}
_STEP_PARTS = ("compute", "tensor", "stages", "bubble", "data", "update")


def render(plan: Plan, *, top: int) -> str:
    """The report for people.

    Args:
        plan: from ``make_plan``.
        top: layouts to show, the best first.
    """
    console = Console(width=_WIDEST, highlight=False)
    with console.capture() as capture:
        console.print(_pairs("run", run_lines(plan)), width=_WIDTH)
        console.print(_ranking(plan, top))
        console.print(_memory_table(plan.best))
        console.print(_step_table(plan.best))
        console.print(_refusal_table(plan), width=_WIDTH)
        console.print(_assumption_table(plan), width=_WIDTH)
    return capture.get() + _options_text(plan.best)


def run_lines(plan: Plan) -> list[tuple[str, str]]:
    """What is planned, as (name, value)."""
    gpu = plan.gpu
    tokens = plan.samples * plan.run.model.seq_length
    fp8, bf16 = gpu.peak_flops(fp8=True) / 1e12, gpu.peak_flops(fp8=False) / 1e12
    return [
        ("parameters", f"{plan.parameters:,}"),
        ("model FLOPs per token", f"{model_flops_per_token(plan.run.model):.4g}"),
        ("model FLOPs of the run", f"{plan.flops:.4g}"),
        ("tokens of the run", f"{tokens:,} in {plan.run.training.train_iters:,} steps"),
        ("GPUs", f"{plan.gpus} x {gpu.name}: {gpu.memory_gb:g} GB, {bf16:g} TFLOP/s bf16, {fp8:g}"
         f" FP8, {gpu.memory_terabytes_per_second:g} TB/s, NVLink "
         f"{gpu.nvlink_gigabytes_per_second:g} GB/s each way ({gpu.source})"),
        ("layouts", f"{len(plan.layouts)} fit, {sum(plan.refusals.counts.values())} do not"),
    ]  # fmt: skip


def _pairs(title: str, lines: Sequence[tuple[str, str]]) -> Table:
    table = Table(title=title, show_header=False, title_justify="left")
    for name, value in lines:
        table.add_row(name, value)
    return table


def _ranking(plan: Plan, top: int) -> Table:
    """The best layouts; intervals from the smaller end to the larger one."""
    title = f"best {min(top, len(plan.layouts))} of {len(plan.layouts)} layouts, {_certainty(plan)}"
    table = Table(title=title, title_justify="left")
    for column in ("", "TP", "PP", "v", "DP", "micro", "FP8", "recompute", "sharded", "GiB"):
        table.add_column(column, justify="right", no_wrap=True)
    for column in ("s/step", "Mtokens/s", "TFLOP/s", "MFU %", "GPU-hours", "days"):
        table.add_column(column, justify="right", no_wrap=True)
    for rank, layout in enumerate(plan.layouts, start=1):
        # The configuration's own layout is shown wherever it stands.
        if rank <= top or overrides(layout.run) == overrides(plan.run):
            table.add_row(str(rank), *_layout_cells(layout), *_time_cells(plan, layout))
    return table


def _certainty(plan: Plan) -> str:
    """What the intervals mean."""
    estimated = [a for a in plan.assumptions.values() if a.known and a.slow != a.fast]
    if not estimated:
        return "from the calibration's numbers"
    return (
        f"not measured on {plan.gpu.name}: intervals from {len(estimated)} assumptions, ranked by "
        "their middle"
    )


def _layout_cells(layout: Prediction) -> list[str]:
    run, parallel = layout.run, layout.run.parallel
    return [
        str(parallel.tensor_model_parallel_size),
        str(parallel.pipeline_model_parallel_size),
        str(parallel.model_chunks),
        str(layout.data_parallel_size),
        str(run.training.micro_batch_size),
        "no" if run.precision.fp8_format is None else "yes",
        str(run.recompute.recompute_granularity or "none"),
        "yes" if parallel.use_distributed_optimizer else "no",
        f"{layout.peak_memory / GIB:.1f}",
    ]


def _time_cells(plan: Plan, layout: Prediction) -> list[str]:
    hours = layout.gpu_hours(plan.samples)
    return [
        interval(layout.fast.total, layout.slow.total),
        interval(*(rate / 1e6 for rate in layout.tokens_per_second)),
        interval(*layout.tflops_per_gpu),
        interval(*(100 * share for share in layout.mfu)),
        interval(*hours),
        interval(*(hour / plan.gpus / 24 for hour in hours)),
    ]


def interval(low: float, high: float) -> str:
    """Two ends to two digits, one number of three if they agree."""
    if f"{low:.3g}" == f"{high:.3g}":
        return _rounded(low, 3)
    return f"{_rounded(low, 2)}-{_rounded(high, 2)}"


def _rounded(value: float, digits: int) -> str:
    """Significant digits without an exponent."""
    number = float(f"{value:.{digits}g}")
    return f"{number:,.0f}" if abs(number) >= 10 ** (digits - 1) else f"{number:g}"


def _memory_table(layout: Prediction) -> Table:
    title = "best layout: memory of one GPU in GiB; recomputed and logits never live together"
    table = Table(title=title, title_justify="left")
    for column in ("stage", *_PARTS, "total"):
        table.add_column(column, justify="right")
    rows = [
        [*(f"{part(stage) / GIB:.2f}" for part in _PARTS.values()), f"{stage.total / GIB:.2f}"]
        for stage in layout.memory
    ]
    for cells, group in groupby(enumerate(rows), key=lambda item: item[1]):
        numbers = [number for number, _ in group]
        first, last = numbers[0], numbers[-1]
        table.add_row(str(first) if first == last else f"{first}-{last}", *cells)
    return table


def _step_table(layout: Prediction) -> Table:
    table = Table(title="best layout: seconds of a step", title_justify="left")
    for column in ("end", *_STEP_PARTS, "total"):
        table.add_column(column, justify="right")
    for name, step in (("fast", layout.fast), ("slow", layout.slow)):
        table.add_row(name, *(f"{value:.4g}" for value in _step_values(step).values()))
    return table


def _step_values(step: StepTime) -> dict[str, float]:
    return {**{part: getattr(step, part) for part in _STEP_PARTS}, "total": step.total}


def _refusal_table(plan: Plan) -> Table:
    table = Table(title="layouts that do not fit", title_justify="left")
    table.add_column("count", justify="right")
    table.add_column("reason, with the numbers of its first")
    for count, message in plan.refusals.lines():
        table.add_row(f"{count:,}", message)
    return table


def _assumption_table(plan: Plan) -> Table:
    table = Table(title="assumptions", title_justify="left")
    for column in ("name", "slow", "fast", "unit", "source"):
        table.add_column(column, overflow="fold", no_wrap=column == "name")
    for name, assumption in plan.assumptions.items():
        ends = [f"{end:g}" if assumption.known else "-" for end in _ends(plan, name)]
        table.add_row(name, *ends, assumption.unit, assumption.source)
    return table


def _ends(plan: Plan, name: str) -> tuple[float, float]:
    return plan.assumptions[name].slow, plan.assumptions[name].fast


def _options_text(layout: Prediction) -> str:
    """Options of the best layout for a command line and for a file."""
    lines = ["best layout, as arguments:", "  " + " ".join(as_arguments(layout)), "and as YAML:"]
    return "\n".join([*lines, yaml.safe_dump(overrides(layout.run), sort_keys=False).rstrip()])


def as_arguments(layout: Prediction) -> list[str]:
    """``key=value`` of everything that the plan chose."""
    return [
        f"{name}={_as_yaml(value)}"
        for options in overrides(layout.run).values()
        for name, value in options.items()
    ]


def _as_yaml(value: str | int | bool | None) -> str:
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else str(value)


def to_json(plan: Plan, *, top: int) -> dict[str, Any]:
    """The report for programs; bytes, seconds and shares, unrounded.

    Args:
        plan: from ``make_plan``.
        top: layouts to give, the best first.
    """
    return {
        "gpu": plan.gpu.name.value,
        "gpus": plan.gpus,
        "parameters": plan.parameters,
        "model_flops": plan.flops,
        "samples": plan.samples,
        "layouts_that_fit": len(plan.layouts),
        "layouts": [_layout_json(plan, layout) for layout in plan.layouts[:top]],
        "refused": [{"count": n, "reason": reason} for n, reason in plan.refusals.lines()],
        "assumptions": {
            name: {
                "slow": assumption.slow if assumption.known else None,
                "fast": assumption.fast if assumption.known else None,
                "unit": assumption.unit,
                "source": assumption.source,
            }
            for name, assumption in plan.assumptions.items()
        },
    }


def _layout_json(plan: Plan, layout: Prediction) -> dict[str, Any]:
    hours = layout.gpu_hours(plan.samples)
    return {
        "options": overrides(layout.run),
        "data_parallel_size": layout.data_parallel_size,
        "microbatches": layout.microbatches,
        "memory_bytes": [
            {**{name: part(stage) for name, part in _PARTS.items()}, "total": stage.total}
            for stage in layout.memory
        ],
        "step_seconds": {"fast": _step_values(layout.fast), "slow": _step_values(layout.slow)},
        "tokens_per_second": _named(*reversed(layout.tokens_per_second)),
        "tflops_per_gpu": _named(*reversed(layout.tflops_per_gpu)),
        "mfu": _named(*reversed(layout.mfu)),
        "gpu_hours": _named(*hours),
        "days": _named(*(hour / plan.gpus / 24 for hour in hours)),
    }


def _named(fast: float, slow: float) -> dict[str, float]:
    return {"fast": fast, "slow": slow}
