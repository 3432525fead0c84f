"""Numbers per role of a run: learning rates, and the timescale of weight decay.

Both are read from the parameter table. Inside the layers a role has one learning rate and one
decay, because no rule looks at more than the role and sizes that are the same in every layer; where
CompleteP treats a gain or bias outside of the layers differently, that is a second entry.
"""

from __future__ import annotations

from megatron_mup.config import RunConfig
from megatron_mup.optimizer.schedule import ExtraFactor, warmup_ratio
from megatron_mup.parameterization.roles import in_layers
from megatron_mup.parameterization.table import ParameterTable, TableRow


def rows_by_role(table: ParameterTable) -> dict[str, TableRow]:
    """One row for each role of a table, in the order of the forward pass.

    Returns:
        By role; ``<role>-outside-layers`` where those have another learning rate.
    """
    rows: dict[str, TableRow] = {}
    for row in sorted(table.rows, key=lambda row: not in_layers(row.tensor)):
        known = rows.setdefault(row.tensor.role.value, row)
        if row.lr != known.lr:
            rows.setdefault(f"{row.tensor.role.value}-outside-layers", row)
    order = {row.tensor.name: place for place, row in enumerate(table.rows)}
    return dict(sorted(rows.items(), key=lambda item: order[item[1].tensor.name]))


def learning_rates(
    run: RunConfig, factor: float, extra: ExtraFactor | None = None
) -> dict[str, float]:
    """Current learning rates.

    Args:
        run: the run's configuration.
        factor: s(t), the schedule's fraction of each peak.
        extra: the extra warmup's factor, if there is one.

    Returns:
        ``learning-rate/<role>`` -> s(t) x the role's peak.
    """
    return {
        f"learning-rate/{role}": factor
        * row.lr
        * (1.0 if extra is None else extra(warmup_ratio(run, row), row.decay_per_step))
        for role, row in rows_by_role(run.table).items()
    }


def decay_timescales(run: RunConfig) -> dict[str, float]:
    """Timescale of weight decay, as a fraction of the run (arXiv:2405.13698, in iterations).

    A step at peak removes the fraction d = LR x weight decay of a weight, whatever the decay mode;
    the weights average the updates of about 1/d steps.

    Args:
        run: the run's configuration.

    Returns:
        ``decay-timescale/<role>`` -> tau = 1 / (d x train_iters); roles without decay are left out.
    """
    return {
        f"decay-timescale/{role}": 1.0 / (row.decay_per_step * run.training.train_iters)
        for role, row in rows_by_role(run.table).items()
        if row.decay_per_step > 0
    }


def decay_text(run: RunConfig) -> str:
    """The timescales in words, one line for each distinct one, with its length in tokens.

    Args:
        run: the run's configuration.
    """
    roles: dict[float | None, list[str]] = {}
    taus = decay_timescales(run)
    for role in rows_by_role(run.table):
        roles.setdefault(taus.get(f"decay-timescale/{role}"), []).append(role)
    training = run.training
    tokens = training.train_iters * training.global_batch_size * run.model.seq_length
    lines = ["decay timescale tau = 1 / (decay per step at peak x train_iters):"]
    for tau, members in roles.items():
        length = "no decay" if tau is None else f"{tau:.4g} of the run, {tau * tokens:.4g} tokens"
        lines.append(f"  {', '.join(members)}: {length}")
    return "\n".join(lines)
