"""The runs whose tables the tests compare with numbers written down from the paper.

Base: M = 32, F = 128, head dim 16, 2 layers. Wide: M = 128, 8 heads of dim 16. Base learning rate
2^-6, eps 1e-8. Head dim is constant, as in arXiv:2404.05728.
"""

from __future__ import annotations

from megatron_mup.config import RunConfig
from megatron_mup.parameterization.table import TableRow
from tests.configurations import tiny

ALPHA = 0.015625
WIDE = ("hidden_size=128", "num_attention_heads=8", f"lr={ALPHA}")
NARROW = ("hidden_size=32", "num_attention_heads=2", f"lr={ALPHA}")


def wide(*overrides: str) -> RunConfig:
    """Four times the base width."""
    return tiny(*WIDE, *overrides)


def narrow(*overrides: str) -> RunConfig:
    """The base model itself."""
    return tiny(*NARROW, *overrides)


def rows_by_role(run: RunConfig) -> dict[str, TableRow]:
    """One row per role, after checking that all layers agree."""
    rows: dict[str, TableRow] = {}
    for row in run.table.rows:
        known = rows.setdefault(row.tensor.role.value, row)
        numbers = (row.init_std, row.lr, row.weight_decay, row.eps, row.forward_mult)
        assert numbers == (
            known.init_std,
            known.lr,
            known.weight_decay,
            known.eps,
            known.forward_mult,
        ), row.tensor.name
    return rows


def stds(run: RunConfig) -> dict[str, float]:
    """Initial std per role, gains and biases aside."""
    rows = rows_by_role(run)
    return {role: row.init_std for role, row in rows.items() if role not in ("gain", "bias")}


def rates(run: RunConfig) -> dict[str, float]:
    """Peak learning rate per role."""
    return {role: row.lr for role, row in rows_by_role(run).items()}
