"""Quirks of megatron-core 0.19.2's optimizer factory, each with its reason, in one place."""

from __future__ import annotations

import functools
import inspect
import logging
import os
import shutil
from typing import Any

from emerging_optimizers.scalar_optimizers import Lion
from emerging_optimizers.scalar_optimizers import lion as lion_module
from megatron.core.optimizer import distrib_optimizer, optimizer

from megatron_mup.optimizer.groups import WARMUP_RATIO
from megatron_mup.optimizer.layer_wise import register_layer_wise_optimizer

logger = logging.getLogger(__name__)

_COMPILERS = ("c++", "g++", "clang++")


@functools.cache
def correct_optimizer_factory() -> None:
    """Apply the corrections below that concern every optimizer; idempotent."""
    _identify_groups()
    register_layer_wise_optimizer()


def _identify_groups() -> None:
    """Let groups that differ only in eps or extra warmup stay apart when a checkpoint is loaded.

    Saved groups are matched to current ones by ``param_group_identifier_keys``, which lacks these:
    two such groups collide and one silently takes the other's numbers. Upstream's own comment
    names adding the field as the fix.
    """
    keys = (*optimizer.param_group_identifier_keys, "eps", WARMUP_RATIO)
    optimizer.param_group_identifier_keys = keys
    # The distributed optimizer imported the tuple by name: rebinding one module leaves the other.
    distrib_optimizer.param_group_identifier_keys = keys


def train_with_lion(built: Any, betas: tuple[float, float]) -> None:
    """Put Lion in the place of the AdamW of a freshly built optimizer, for all parameters.

    Upstream sends ``optimizer='lion'`` to a factory that trains embeddings, readout and vectors
    with Adam, gives Lion Adam's betas, and builds no distributed optimizer even when the gradient
    buffers are sharded for one. The AdamW factory does all that right but for the update.

    Args:
        built: ``ChainedOptimizer`` that was built for AdamW and has not stepped.
        betas: Lion's.
    """
    _run_eagerly_without_compiler()
    for part in built.chained_optimizers:
        part.config.optimizer = "lion"
        # A rank without trainable parameters has no inner optimizer.
        if part.optimizer is not None:
            part.optimizer = _lion_over(part.optimizer, betas)
            part.init_state_fn = start_state


def _lion_over(adam: Any, betas: tuple[float, float]) -> Lion:
    """Lion over the groups of an AdamW, whose own numbers are taken out of them."""
    # The distributed optimizer's fp32 shards are views, which torch refuses at construction.
    lion = Lion([{"params": []}], betas=betas)
    for group in adam.param_groups:
        for name in adam.defaults:
            group.pop(name, None)
        # LR and decay here are placeholders: the schedule sets them before each step.
        group.update(lion.defaults)
    lion.param_groups = adam.param_groups
    return lion


def start_state(inner: Any, _config: Any = None) -> None:
    """Make the moments of an emerging optimizer, zero, for parameters that have none."""
    for group in inner.param_groups:
        inner._init_group(group, skip_non_grad_params=False)


@functools.cache
def _run_eagerly_without_compiler() -> None:
    """Take torch.compile off Lion's update where nothing could compile it."""
    if any(shutil.which(name) for name in (os.environ.get("CXX", "c++"), *_COMPILERS)):
        return
    logger.warning(
        "no C++ compiler (%s) was found: Lion's update runs eagerly, which is slower; install one "
        "or set CXX",
        ", ".join(_COMPILERS),
    )
    lion_module.calculate_lion_update = inspect.unwrap(lion_module.calculate_lion_update)
