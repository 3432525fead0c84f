"""Print the resolved parameter table: for people, as JSON, and as the README's rule table."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.measure import Measurement
from rich.table import Table

from megatron_mup.config import ExtraWarmup, RunConfig
from megatron_mup.parameterization.options import Parameterization, Ratio, UnembeddingInit
from megatron_mup.parameterization.roles import Role
from megatron_mup.parameterization.rules import (
    HIDDEN,
    INIT_EXPONENT,
    RULES,
    UNEMBEDDING_EXPONENT,
)
from megatron_mup.parameterization.table import JSON_KEYS, ParameterTable

MIN_WIDTH = 120
"""Columns of the lines below the table."""
_MAX_WIDTH = 200

_SOURCE = JSON_KEYS.index("source")
_HEADS = {"base_fan_in": "base", "weight_decay": "decay", "forward_mult": "mult", "source": "src"}
_FOLDABLE = ("weight_decay", "decay_per_step", "eps", "forward_mult")
_NUMERIC = ("init_std", "lr", "weight_decay", "decay_per_step", "eps", "forward_mult")


def describe_json(table: ParameterTable) -> str:
    """The table as a JSON list, one object with the keys of ``JSON_KEYS`` per logical parameter."""
    return json.dumps(table.to_json(), indent=1)


def describe_text(table: ParameterTable) -> str:
    """The table for people, as narrow as it goes without losing a number.

    Layers with equal numbers are folded into one row, a column with one value goes below the
    table, and sources are numbered.
    """
    rows = _fold_layers(table)
    sources = list(dict.fromkeys(row[_SOURCE] for row in rows))
    equal = [i for i, key in enumerate(JSON_KEYS) if key in _FOLDABLE and _one_value(rows, i)]
    grid = Table(
        title="parameters", title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0)
    )
    shown = [i for i in range(len(JSON_KEYS)) if i not in equal]
    for i in shown:
        right = JSON_KEYS[i] not in ("name", "role")
        grid.add_column(
            _HEADS.get(JSON_KEYS[i], JSON_KEYS[i]),
            overflow="fold",
            justify="right" if right else "left",
        )
    for row in rows:
        cells = [*row[:_SOURCE], f"[{sources.index(row[_SOURCE]) + 1}]"]
        grid.add_row(*(escape(cells[i]) for i in shown))
    console = Console(width=max(MIN_WIDTH, _natural_width(grid)), highlight=False)
    with console.capture() as capture:
        console.print(grid)
        if equal:
            same = ", ".join(f"{_head(JSON_KEYS[i])} {rows[0][i]}" for i in equal)
            console.print(f"in every row: {same}", markup=False)
        for line in _below(table):
            console.print(line, markup=False)
        for number, source in enumerate(sources, start=1):
            console.print(f"[{number}] {source}", markup=False)
    return capture.get()


def _natural_width(grid: Table) -> int:
    """Columns in which no name is broken over lines, but for absurdly long ones."""
    wide = Console(width=_MAX_WIDTH)
    return Measurement.get(wide, wide.options, grid).maximum


def _head(key: str) -> str:
    return _HEADS.get(key, key)


def describe_run(run: RunConfig) -> str:
    """``describe_text`` of a run's table, and what stands between its options and the table."""
    lines = [describe_text(run.table).rstrip("\n")]
    asked, used = run.optimizer.numbers, run.optimizer_numbers
    if used != asked:
        changes = ", ".join(
            f"{name} {_shown(getattr(asked, name))} -> {_shown(getattr(used, name))}"
            for name in ("lr", "weight_decay", "eps", "betas")
            if getattr(asked, name) != getattr(used, name)
        )
        lines.append(f"horizon_rule={run.parameterization.horizon_rule}: {changes}")
    schedule, base = run.schedule, run.parameterization.base_hidden_size
    if schedule.extra_warmup is not ExtraWarmup.NONE and base is not None:
        lines.append(
            f"extra_warmup={schedule.extra_warmup} on {schedule.extra_warmup_roles} roles: LR "
            f"times {base / run.model.hidden_size:.4g} at first, rising to 1, beside the schedule"
        )
    return "\n".join(lines)


def _shown(value: float | tuple[float, ...] | None) -> str:
    if isinstance(value, tuple):
        return f"({', '.join(f'{part:.6g}' for part in value)})"
    return "none" if value is None else f"{value:.6g}"


def _one_value(rows: Sequence[Sequence[str]], column: int) -> bool:
    return len({row[column] for row in rows}) == 1


def _below(table: ParameterTable) -> list[str]:
    """What concerns the whole model."""
    multipliers = table.multipliers
    total = sum(math.prod(row.tensor.shape) for row in table.rows)
    return [
        f"forward multipliers: embedding {multipliers.embedding:g}, attention scores "
        f"{multipliers.attention:g}, residual {multipliers.residual:g}, "
        f"logits {multipliers.logit:g}",
        "base is the fan-in in the base model; lr and decay_per_step are those at peak; "
        "the LR multiplies decay; mult acts on the forward pass",
        f"{total:,} parameters in {len(table.rows)} logical tensors",
    ]


def _fold_layers(table: ParameterTable) -> list[list[str]]:
    """Rows as strings; consecutive layers that differ only in their number become one row."""
    folded: dict[tuple[str, ...], list[int]] = {}
    for row in table.to_json():
        parts = str(row["name"]).split(".")
        layer = int(parts[2]) if parts[:2] == ["decoder", "layers"] else None
        name = ".".join(["decoder.layers.*", *parts[3:]]) if layer is not None else row["name"]
        cells = (str(name), *(_cell(key, row[key]) for key in JSON_KEYS[1:]))
        folded.setdefault(cells, [])
        if layer is not None:
            folded[cells].append(layer)
    return [_with_range(list(cells), layers) for cells, layers in folded.items()]


def _with_range(cells: list[str], layers: Sequence[int]) -> list[str]:
    if layers:
        span = f"{layers[0]}-{layers[-1]}" if len(layers) > 1 else str(layers[0])
        cells[0] = cells[0].replace("layers.*", f"layers.{span}")
    return cells


def _cell(key: str, value: object) -> str:
    if value is None:
        return "-"
    if key in _NUMERIC and isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list):
        return "x".join(str(size) for size in value)
    return str(value)


def rule_table_markdown() -> str:
    """The README's rule table, generated from ``RULES``; a test compares the two.

    Symbols: M hidden size; ``base`` marks the size in the base model.
    """
    lines = [
        "| role | init std (`fan_in`) | LR under `sp` | LR under `mup` | LR under `abs_mup` "
        "| (abs_)mup, Muon |",
        "|---|---|---|---|---|---|",
    ]
    for role in Role:
        rates = [_rate(name, role) for name in (_SP, _MUP, _ABS)]
        rates.append("alpha (+)" if role in HIDDEN else "by AdamW")
        lines.append(f"| {role.value} | {_std(role)} | {' | '.join(rates)} |")
    width = _power(_MUP, Ratio.WIDTH, RULES[_MUP][Role.FFN_OUT].lr_exponent)
    lines += [
        "",
        f"(*) `ffn_out_lr_ratio: width`, the paper's choice: alpha {width}. (+) The update is",
        "orthogonalized and multiplied by sqrt(fan_out / fan_in); AdamW trains the other roles by",
        "the columns before.",
    ]
    return "\n".join(lines)


_SP, _MUP, _ABS = Parameterization.SP, Parameterization.MUP, Parameterization.ABS_MUP


def _std(role: Role) -> str:
    if role is Role.EMBEDDING:
        return "1"
    if role in (Role.GAIN, Role.BIAS):
        return "1 (value)" if role is Role.GAIN else "0 (value)"
    if role is Role.UNEMBEDDING:
        mup, sp = (UNEMBEDDING_EXPONENT[kind] for kind in (UnembeddingInit.MUP, UnembeddingInit.SP))
        return f"M^{mup:g} (`sp`: M^{sp:g})"
    return f"fan_in^{INIT_EXPONENT:g}"


def _rate(name: Parameterization, role: Role) -> str:
    rule = RULES[name][role]
    if rule.ratio is Ratio.NONE:
        return "alpha"
    note = " (*)" if (name, role) == (_MUP, Role.FFN_OUT) else ""
    return f"alpha {_power(name, rule.ratio, rule.lr_exponent)}{note}"


def _power(name: Parameterization, ratio: Ratio, exponent: float) -> str:
    size = "M" if ratio is Ratio.WIDTH else "fan_in"
    return f"{size if name is _ABS else f'({size} / base {size})'}^{exponent:g}"
