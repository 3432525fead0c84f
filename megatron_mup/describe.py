"""Print the resolved parameter table: for people, as JSON, and as the README's rule table."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from megatron_mup.parameterization.options import Parameterization, Ratio, UnembeddingInit
from megatron_mup.parameterization.roles import Role
from megatron_mup.parameterization.rules import INIT_EXPONENT, RULES, UNEMBEDDING_EXPONENT
from megatron_mup.parameterization.table import JSON_KEYS, ParameterTable

MIN_WIDTH = 160
"""Columns below which the table would be unreadable."""

_NUMERIC = ("init_std", "lr", "weight_decay", "decay_per_step", "eps", "forward_mult")


def describe_json(table: ParameterTable) -> str:
    """The table as a JSON list, one object with the keys of ``JSON_KEYS`` per logical parameter."""
    return json.dumps(table.to_json(), indent=1)


def describe_text(table: ParameterTable, *, width: int | None = None) -> str:
    """The table for people; layers with equal numbers are folded into one row."""
    grid = Table(title="parameters", show_lines=False)
    for key in JSON_KEYS:
        grid.add_column(key, overflow="fold")
    for row in _fold_layers(table):
        grid.add_row(*row)
    multipliers = table.multipliers
    console = Console(width=width or max(MIN_WIDTH, shutil.get_terminal_size((200, 50)).columns))
    with console.capture() as capture:
        console.print(grid)
        console.print(
            f"forward multipliers: embedding {multipliers.embedding:g}, attention scores "
            f"{multipliers.attention:g}, residual {multipliers.residual:g}, "
            f"logits {multipliers.logit:g}"
        )
        console.print("lr and decay_per_step are those at peak; the LR multiplies weight_decay")
        total = sum(math.prod(row.tensor.shape) for row in table.rows)
        console.print(f"{total:,} parameters in {len(table.rows)} logical tensors")
    return capture.get()


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
        "| role | init std (`fan_in`) | LR under `sp` | LR under `mup` | LR under `abs_mup` |",
        "|---|---|---|---|---|",
    ]
    for role in Role:
        rates = [_rate(name, role) for name in (_SP, _MUP, _ABS)]
        lines.append(f"| {role.value} | {_std(role)} | {' | '.join(rates)} |")
    width = _power(_MUP, Ratio.WIDTH, RULES[_MUP][Role.FFN_OUT].lr_exponent)
    lines += ["", f"(*) `ffn_out_lr_ratio: width`, the paper's choice: alpha {width}."]
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
