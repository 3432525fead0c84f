"""The configuration that a converted checkpoint records.

A conversion knows the model and its multipliers; everything else that a record holds (rule set,
optimizer, schedule) is the user's to say, or a placeholder that the run which starts from the
checkpoint replaces.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from enum import Enum
from typing import Any

from megatron_mup.config import ModelConfig, RunConfig
from megatron_mup.config_io import config_from_dict, qualified
from megatron_mup.convert.rescaling import plain_multipliers
from megatron_mup.parameterization.evaluation import Multipliers
from megatron_mup.parameterization.options import AttentionScale, Parameterization
from megatron_mup.parameterization.roles import NormGain
from megatron_mup.run_source import RunSource

PLACEHOLDERS: Mapping[str, Mapping[str, Any]] = {
    "optimizer": {"lr": 1e-3},
    "training": {"train_iters": 1, "global_batch_size": 1, "micro_batch_size": 1},
}
"""What a record says when the user names no configuration: the function of a checkpoint of weights
alone does not depend on these, and ``checkpoint.finetune`` does not compare them."""

_EXCLUSIVE = {"ffn_hidden_size": "ffn_multiplier", "ffn_multiplier": "ffn_hidden_size"}


def target_run(
    model: ModelConfig,
    multipliers: Multipliers,
    source: RunSource | None,
    overrides: Sequence[str] = (),
) -> RunConfig:
    """Complete what the user said of the target with the model that is converted.

    Args:
        model: the weights' architecture.
        multipliers: the weights' own.
        source: the user's file or preset; None takes the standard parameterization with the
            weights' own multipliers, as far as an option can say them, and ``PLACEHOLDERS``.
        overrides: ``key=value`` or ``section.key=value``.

    Returns:
        The configuration; a model option that the user gave is kept, so that ``RescaledWeights``
        can refuse one that contradicts the weights.

    Raises:
        ConfigError: an unknown or wrong option.
        ParameterizationError: the parameterization has no rule for this model.
    """
    if source is None:
        sections = {name: dict(options) for name, options in PLACEHOLDERS.items()}
        sections["parameterization"] = _standard(model, multipliers)
        origin = "the converted model"
    else:
        sections, origin = source.sections(), source.origin
        sections.setdefault("training", dict(PLACEHOLDERS["training"]))
        sections.setdefault("optimizer", {}).setdefault("lr", PLACEHOLDERS["optimizer"]["lr"])
    given = sections.setdefault("model", {})
    named = {qualified(override).partition("=")[0] for override in overrides}
    said = {*given, *(name.removeprefix("model.") for name in named if name.startswith("model."))}
    for name, value in _options(model).items():
        if name not in said and _EXCLUSIVE.get(name) not in said:
            given[name] = value
    return config_from_dict(sections, overrides, origin=origin)


def standard_run(run: RunConfig, overrides: Sequence[str] = (), *, gains: bool) -> RunConfig:
    """A trained run's configuration under the standard parameterization.

    Args:
        run: the configuration of the source.
        overrides: the user's; ``optimizer.lr`` should be one of them, because the optimum is
            another one.
        gains: whether the model needs vector gains to hold the function.
    """
    model = run.model
    if gains and model.norm_gain is not NormGain.VECTOR:
        model = dataclasses.replace(model, norm_gain=NormGain.VECTOR)
    sections = {
        name: dict(_options(getattr(run, name)))
        for name in ("model", "optimizer", "training", "schedule", "precision")
    }
    sections["model"] = dict(_options(model))
    sections["parameterization"] = _standard(model, plain_multipliers(model))
    return config_from_dict(sections, overrides, origin="the source's configuration")


def _standard(model: ModelConfig, multipliers: Multipliers) -> dict[str, Any]:
    """The standard parameterization with these multipliers; another attention scale is folded."""
    inverse = multipliers.attention == 1 / model.head_dim
    return {
        "name": Parameterization.SP.value,
        "embedding_multiplier": multipliers.embedding,
        "residual_multiplier": multipliers.residual,
        "logit_multiplier": multipliers.logit,
        "attention_scale": (
            AttentionScale.INVERSE if inverse else AttentionScale.INVERSE_SQRT
        ).value,
    }


def _options(section: Any) -> dict[str, Any]:
    """A section as plain data."""
    return {
        item.name: value.value if isinstance(value, Enum) else value
        for item in dataclasses.fields(section)
        if (value := getattr(section, item.name)) is not None
    }
