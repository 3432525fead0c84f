"""The resolved parameter table: one row per logical parameter, one reading of the rules.

The same object feeds initialization, optimizer groups and hooks, is printed by ``describe``, logged
at start, saved with every checkpoint and compared on load. Must not import torch or megatron.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from megatron_mup.parameterization.evaluation import Multipliers, Rules, TensorRule
from megatron_mup.parameterization.options import OptimizerNumbers, ParameterizationConfig
from megatron_mup.parameterization.roles import (
    LogicalTensor,
    ModelShape,
    by_parameter,
    logical_tensors,
)
from megatron_mup.parameterization.sources import row_source

JsonRow = dict[str, str | float | list[int] | None]

JSON_KEYS = (
    "name",
    "role",
    "shape",
    "fan_in",
    "base_fan_in",
    "init_std",
    "lr",
    "weight_decay",
    "decay_per_step",
    "eps",
    "forward_mult",
    "source",
)


NUMBER_KEYS = tuple(key for key in JSON_KEYS if key != "source")
"""Columns that two runs are compared by; the source is an explanation."""


@dataclass(frozen=True, kw_only=True)
class TableRow(TensorRule):
    """One logical parameter with every number that the rules give it.

    ``weight_decay`` is the group's value, which the LR multiplies; ``lr`` is the peak.
    ``width_ratio`` is what muP would divide the LR by: extra warmups start from its inverse.
    """

    tensor: LogicalTensor
    source: str

    @property
    def decay_per_step(self) -> float:
        """Fraction of the weight removed by one step at peak LR."""
        return self.lr * self.weight_decay

    def to_json(self) -> JsonRow:
        """The row with exactly the keys of ``JSON_KEYS``."""
        return {
            "name": self.tensor.name,
            "role": self.tensor.role.value,
            "shape": list(self.tensor.shape),
            "fan_in": self.tensor.fan_in,
            "base_fan_in": self.base_fan_in,
            "init_std": self.init_std,
            "lr": self.lr,
            "weight_decay": self.weight_decay,
            "decay_per_step": self.decay_per_step,
            "eps": self.eps,
            "forward_mult": self.forward_mult,
            "source": self.source,
        }


@dataclass(frozen=True, kw_only=True)
class ParameterTable:
    """All rows of a model and its forward multipliers."""

    rows: tuple[TableRow, ...]
    multipliers: Multipliers

    def to_json(self) -> list[JsonRow]:
        """Rows as plain data, in the order of the forward pass."""
        return [row.to_json() for row in self.rows]

    def by_parameter(self) -> dict[str, tuple[TableRow, ...]]:
        """Rows grouped by the Megatron parameter that holds them.

        Raises:
            ParameterizationError: two rows claim the same part of one parameter.
        """
        # The order of parts is that of the forward pass: query, key, value; gate, up.
        tensors = by_parameter(tuple(row.tensor for row in self.rows))
        rows = {row.tensor.name: row for row in self.rows}
        return {
            parameter: tuple(rows[tensor.name] for tensor in parts)
            for parameter, parts in tensors.items()
        }


def resolve(
    shape: ModelShape, config: ParameterizationConfig, optimizer: OptimizerNumbers
) -> ParameterTable:
    """Evaluate the rule table for a model.

    Args:
        shape: global model shape.
        config: parameterization options, base shape included.
        optimizer: base LR, weight decay and eps.

    Returns:
        The table that everything else reads.

    Raises:
        ParameterizationError: no base shape under muP, or a combination without a rule.
    """
    rules = Rules(shape, config, optimizer)
    rows = tuple(
        TableRow(tensor=tensor, source=row_source(rules, tensor), **vars(rules.evaluate(tensor)))
        for tensor in logical_tensors(shape)
    )
    return ParameterTable(rows=rows, multipliers=rules.multipliers)


def difference(
    saved: Sequence[Mapping[str, object]],
    current: Sequence[Mapping[str, object]],
    *,
    keys: Sequence[str] = NUMBER_KEYS,
    limit: int = 12,
) -> list[str]:
    """Lines that name every number in which two tables differ.

    Args:
        saved: rows read from a checkpoint.
        current: rows of the running configuration.
        keys: which columns count.
        limit: number of lines after which the rest is only counted.

    Returns:
        Human-readable lines, empty when the tables agree (to 12 significant digits).
    """
    # Compared by name: a checkpoint of other depth must name its layers, not shift all rows.
    saved_rows = {str(row["name"]): row for row in saved}
    current_rows = {str(row["name"]): row for row in current}
    lines = [f"{name}: only in the checkpoint" for name in saved_rows if name not in current_rows]
    lines += [f"{name}: not in the checkpoint" for name in current_rows if name not in saved_rows]
    for name, row in current_rows.items():
        for key in keys if name in saved_rows else ():
            if not _same(saved_rows[name].get(key), row.get(key)):
                lines.append(f"{name}: {key} was {saved_rows[name].get(key)}, now {row.get(key)}")
    if len(lines) > limit:
        lines = [*lines[:limit], f"and {len(lines) - limit} more"]
    return lines


def _same(left: object, right: object) -> bool:
    # JSON keeps floats exactly; the slack is for powers computed by another C library.
    if isinstance(left, int | float) and isinstance(right, int | float):
        return math.isclose(left, right, rel_tol=1e-12)
    return left == right
