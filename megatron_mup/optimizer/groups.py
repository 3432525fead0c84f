"""The table's LR, decay and eps as Megatron's per-parameter overrides.

Parameters with equal numbers share a group, and the keys are disjoint. Every trainable parameter
is looked up in the table first, so none falls back to a default unseen. Decay goes through
``wd_mult``: the group's weight decay is the configured one times ``wd_mult``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from megatron.core.optimizer import ParamKey
from megatron.core.optimizer.optimizer_config import ParamWithNamePredicate

from megatron_mup.errors import ParameterizationError
from megatron_mup.model.naming import rows_of_parameters
from megatron_mup.parameterization.table import ParameterTable, TableRow

Override = dict[str, float]


@dataclass(frozen=True, order=True)
class GroupNumbers:
    """What makes two parameters belong to one group; values at peak."""

    lr: float
    weight_decay: float
    eps: float | None
    warmup_ratio: float = 1.0


WarmupRatio = Callable[[TableRow], float]

WARMUP_RATIO = "extra_warmup_ratio"
"""Key of an optimizer group: m from whose inverse its extra warmup starts; absent for 1."""


def _no_extra_warmup(_row: TableRow) -> float:
    return 1.0


def _numbers(parameter: str, rows: tuple[TableRow, ...], warmup_ratio: WarmupRatio) -> GroupNumbers:
    """The numbers of one Megatron parameter.

    Raises:
        ParameterizationError: its logical tensors have different numbers.
    """
    # No rule of ours gives query, key and value different numbers; one that did must fail here.
    numbers = {GroupNumbers(row.lr, row.weight_decay, row.eps, warmup_ratio(row)) for row in rows}
    if len(numbers) != 1:
        raise ParameterizationError(
            f"'{parameter}' fuses tensors with different learning rates, decays or eps "
            f"({', '.join(f'{row.tensor.role}: {row.lr:g}' for row in rows)}); an optimizer "
            "cannot treat parts of one parameter differently"
        )
    return numbers.pop()


def parameter_groups(
    model: torch.nn.Module,
    table: ParameterTable,
    warmup_ratio: WarmupRatio = _no_extra_warmup,
) -> dict[GroupNumbers, frozenset[str]]:
    """Local parameter names of one stage, by the numbers they share.

    Args:
        model: unwrapped GPTModel.
        table: resolved parameter table.
        warmup_ratio: of each row, where there is an extra warmup.

    Raises:
        ParameterizationError: a parameter without a role, or a fused one with two rules.
    """
    groups: dict[GroupNumbers, set[str]] = {}
    for name, rows in rows_of_parameters(model, table).items():
        groups.setdefault(_numbers(name, rows, warmup_ratio), set()).add(name)
    return {numbers: frozenset(names) for numbers, names in groups.items()}


def config_overrides(
    model_chunks: Sequence[torch.nn.Module],
    table: ParameterTable,
    *,
    defaults: GroupNumbers,
    min_lr_ratio: float,
    warmup_ratio: WarmupRatio = _no_extra_warmup,
) -> dict[ParamKey, Override]:
    """Overrides for ``get_megatron_optimizer``.

    Parameters whose numbers are the optimizer's own get no override: Megatron puts that group
    first, as in a stock run, so the gradient norm is summed in stock's order.

    Args:
        model_chunks: unwrapped GPTModels, the chunks of this rank.
        table: resolved parameter table.
        defaults: the optimizer configuration's LR, weight decay (lambda) and eps.
        min_lr_ratio: final schedule factor; ``min_lr`` is informative, our schedule sets the LR.
        warmup_ratio: of each row, where there is an extra warmup.

    Returns:
        One disjoint key per group of equal numbers.
    """
    overrides: dict[ParamKey, Override] = {}
    for numbers, members in _members(model_chunks, table, warmup_ratio).items():
        if numbers == defaults:
            continue
        label = (
            f"mup:lr={numbers.lr!r},wd={numbers.weight_decay!r},eps={numbers.eps!r},"
            f"warmup={numbers.warmup_ratio!r}"
        )
        key = ParamKey(with_name_predicate=_holding(label, members))
        overrides[key] = _override(numbers, decay=defaults.weight_decay, min_lr_ratio=min_lr_ratio)
    return overrides


def _override(numbers: GroupNumbers, *, decay: float, min_lr_ratio: float) -> Override:
    """What Megatron is told of one group; ``decay`` is the optimizer's lambda."""
    override: Override = {
        "max_lr": numbers.lr,
        "min_lr": numbers.lr * min_lr_ratio,
        # Upstream multiplies: a decay of 0 has no ratio, and any multiple of it is 0.
        "wd_mult": numbers.weight_decay / decay if decay else 0.0,
    }
    # ParamGroupOverride (0.19.2) does not declare eps, but the optimizer's group takes it.
    if numbers.eps is not None:
        override["eps"] = numbers.eps
    if numbers.warmup_ratio != 1.0:
        override[WARMUP_RATIO] = numbers.warmup_ratio
    return override


def _members(
    model_chunks: Sequence[torch.nn.Module], table: ParameterTable, warmup_ratio: WarmupRatio
) -> dict[GroupNumbers, list[torch.nn.Parameter]]:
    """Parameters of this rank by the numbers they share."""
    members: dict[GroupNumbers, list[torch.nn.Parameter]] = {}
    for chunk in model_chunks:
        parameters = dict(chunk.named_parameters())
        for numbers, names in parameter_groups(chunk, table, warmup_ratio).items():
            members.setdefault(numbers, []).extend(parameters[name] for name in sorted(names))
    return members


def _holding(label: str, members: list[torch.nn.Parameter]) -> ParamWithNamePredicate:
    """A predicate that matches exactly these parameters.

    By identity: the chunks of a virtual pipeline use the same local names for different layers,
    and neither DDP nor Float16Module replaces a parameter.
    """
    by_identity = {id(parameter): parameter for parameter in members}
    # Upstream tells predicates apart by name alone (0.19.2), hence the numbers in the label.
    return ParamWithNamePredicate(
        name=label, fn=lambda parameter, _name: id(parameter) in by_identity
    )
