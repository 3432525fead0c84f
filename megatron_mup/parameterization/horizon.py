"""Batch size and token horizon: how the optimizer's numbers follow them, as one pure function.

m_B = batch / base batch and m_D = tokens of the run / base tokens, both in positions. Sources:
arXiv:2512.22382 (Complete(d)P), whose factors depend on m_B / m_D alone; arXiv:2409.19913 for the
power of the horizon. Must not import torch or megatron.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from megatron_mup.errors import ParameterizationError
from megatron_mup.parameterization.options import (
    DecayMode,
    HorizonRule,
    OptimizerNumbers,
    ParameterizationConfig,
)

TOKEN_EXPONENT = -0.32
"""LR ~ D ** TOKEN_EXPONENT at a fixed batch, arXiv:2409.19913."""


@dataclass(frozen=True)
class Horizon:
    """How much a run trains on.

    Attributes:
        batch_tokens: positions of one global batch.
        train_tokens: positions of the whole run.
    """

    batch_tokens: int
    train_tokens: int


def scaled_for_horizon(
    numbers: OptimizerNumbers,
    config: ParameterizationConfig,
    horizon: Horizon,
    *,
    adam: bool,
) -> OptimizerNumbers:
    """The optimizer's numbers for this run's batch and length.

    Args:
        numbers: as tuned at the base batch and length.
        config: names the rule and the base sizes.
        horizon: this run's batch and length.
        adam: whether AdamW trains every parameter; ``completed_p`` was derived for it alone.

    Returns:
        The numbers that the width rules start from; ``numbers`` itself without a rule.

    Raises:
        ParameterizationError: a base size is missing, or the rule does not fit the optimizer or
            the batch, or drives a beta below 0.
    """
    if config.horizon_rule is HorizonRule.NONE:
        return numbers
    if config.horizon_rule is HorizonRule.TOKEN_POWER:
        return replace(numbers, lr=numbers.lr * _token_power(config, horizon))
    if not adam:
        raise ParameterizationError(
            "horizon_rule=completed_p holds for AdamW (optimizer=adam); use horizon_rule=none or "
            "token_power with this optimizer"
        )
    return _completed_p(numbers, _batch_over_tokens(config, horizon))


def _completed_p(numbers: OptimizerNumbers, change: float) -> OptimizerNumbers:
    """The numbers at m_B / m_D = ``change``."""
    betas = tuple(1.0 - (1.0 - beta) * change for beta in numbers.betas)
    if min(betas) < 0:
        raise ParameterizationError(
            f"horizon_rule=completed_p multiplies 1 - beta by m_B / m_D = {change:g}, which makes "
            f"the betas {numbers.betas} {betas}; tune at a batch and length nearer to this run's "
            "(parameterization.base_batch_tokens, base_train_tokens)"
        )
    root = math.sqrt(change)
    # The rule is for AdamW's lambda, which the LR multiplies: a step removes m_B / m_D times as
    # much. An independent lambda is that fraction itself (ours).
    independent = numbers.weight_decay_mode is DecayMode.INDEPENDENT
    return replace(
        numbers,
        lr=numbers.lr * root,
        weight_decay=numbers.weight_decay * (change if independent else root),
        eps=None if numbers.eps is None else numbers.eps / root,
        betas=(betas[0], betas[1]),
    )


def _token_power(config: ParameterizationConfig, horizon: Horizon) -> float:
    """m_D ** TOKEN_EXPONENT, which holds at a fixed batch."""
    batch, tokens = config.base_batch_tokens, config.base_train_tokens
    if tokens is None:
        raise _missing(config, "base_train_tokens")
    if batch is not None and batch != horizon.batch_tokens:
        raise ParameterizationError(
            f"horizon_rule=token_power holds at a fixed batch, but base_batch_tokens is {batch} "
            f"and this run's batch {horizon.batch_tokens} positions; use "
            "parameterization.horizon_rule=completed_p, or tune at this batch"
        )
    return float((horizon.train_tokens / tokens) ** TOKEN_EXPONENT)


def _batch_over_tokens(config: ParameterizationConfig, horizon: Horizon) -> float:
    """m_B / m_D."""
    batch, tokens = config.base_batch_tokens, config.base_train_tokens
    if batch is None or tokens is None:
        raise _missing(config, "base_batch_tokens", "base_train_tokens")
    return (horizon.batch_tokens / batch) / (horizon.train_tokens / tokens)


def _missing(config: ParameterizationConfig, *names: str) -> ParameterizationError:
    options = " and ".join(f"parameterization.{name}" for name in names)
    return ParameterizationError(
        f"horizon_rule={config.horizon_rule} needs {options}, in positions: those of one global "
        "batch and of the whole run that hyperparameters were tuned with"
    )
