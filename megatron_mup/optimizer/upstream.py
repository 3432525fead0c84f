"""Quirks of megatron-core 0.19.2's optimizer factory, each with its reason, in one place."""

from __future__ import annotations

import functools
from typing import Any

from emerging_optimizers.scalar_optimizers import Lion
from megatron.core.optimizer import distrib_optimizer, emerging_optimizers, optimizer


@functools.cache
def correct_optimizer_factory() -> None:
    """Apply the corrections below; idempotent."""
    _identify_groups_by_eps()
    _register_lion()


def _identify_groups_by_eps() -> None:
    """Let groups that differ only in eps stay apart when a checkpoint is loaded.

    Saved groups are matched to current ones by ``param_group_identifier_keys``, which lacks eps:
    two such groups collide and one silently takes the other's numbers. Upstream's own comment
    names adding the field as the fix.
    """
    keys = (*optimizer.param_group_identifier_keys, "eps")
    optimizer.param_group_identifier_keys = keys
    # The distributed optimizer imported the tuple by name: rebinding one module leaves the other.
    distrib_optimizer.param_group_identifier_keys = keys


def _register_lion() -> None:
    """Train every parameter with Lion, with Lion's betas.

    Upstream's default entry sends embeddings, readout and vectors to Adam and gives Lion Adam's
    betas; arXiv:2404.05728 uses Lion for all parameters. Registering an entry is the way that the
    module documents.
    """
    emerging_optimizers._EMERGING_OPTIMIZERS["lion"] = emerging_optimizers.EmergingOptimizerEntry(
        optimizer_cls=Lion, config_to_kwargs=_lion_arguments, default_param_overrides={}
    )


def _lion_arguments(config: Any, _model_chunks: Any, _groups: Any) -> dict[str, Any]:
    # Groups carry their own peak LR; this one is only the default that a group would fall back to.
    return {
        "lr": config.lr,
        "betas": (config.lion_beta1, config.lion_beta2),
        "weight_decay": config.weight_decay,
    }
