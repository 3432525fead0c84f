"""Combinations that have no published or derived rule, refused before anything is computed.

Must not import torch or megatron.
"""

from __future__ import annotations

from megatron_mup.errors import ParameterizationError
from megatron_mup.parameterization.options import (
    AttentionScale,
    DecayMode,
    InitScheme,
    OptimizerNumbers,
    OutputForm,
    Parameterization,
    ParameterizationConfig,
    UnembeddingInit,
)
from megatron_mup.parameterization.roles import ModelShape


def refuse_without_rule(
    shape: ModelShape,
    config: ParameterizationConfig,
    optimizer: OptimizerNumbers,
    *,
    u_init: UnembeddingInit,
    attention_scale: AttentionScale,
) -> None:
    """Refuse combinations without a rule.

    Args:
        shape: global model shape.
        config: the parameterization options.
        optimizer: base LR and decay.
        u_init: the unembedding's init, default resolved.
        attention_scale: the attention scale, default resolved.

    Raises:
        ParameterizationError: with the options that would mend it.
    """
    _require_base_shape(config, attention_scale)
    if config.name is Parameterization.SP:
        _refuse_for_sp(config)
    elif shape.tied_embeddings and config.output_form is OutputForm.FOLDED:
        raise ParameterizationError(
            "tied embeddings cannot hold the folded output layer (its init and LR would "
            "shrink the embedding too); set parameterization.output_form=multiplier"
        )
    if shape.tied_embeddings and u_init is UnembeddingInit.ZERO:
        raise ParameterizationError(
            "u_init=zero would zero the tied embedding; "
            "set model.untie_embeddings_and_output_weights=true"
        )
    if optimizer.weight_decay_mode is not DecayMode.COUPLED and not optimizer.lr > 0:
        raise ParameterizationError(
            f"weight_decay_mode={optimizer.weight_decay_mode} divides by the peak LR, "
            f"which is {optimizer.lr}; set optimizer.lr above 0 or use coupled"
        )


def _require_base_shape(config: ParameterizationConfig, attention_scale: AttentionScale) -> None:
    """Each rule that compares with the base model needs the sizes that it compares with."""
    if config.name is Parameterization.MUP or (
        config.name is Parameterization.ABS_MUP
        and (config.init is InitScheme.SIGMA or config.output_form is OutputForm.MULTIPLIER)
    ):
        _require(
            config,
            "base_hidden_size",
            "base_ffn_hidden_size",
            "base_kv_channels",
            "base_num_layers",
        )
    if attention_scale is AttentionScale.BASE_HEAD_DIM:
        _require(config, "base_kv_channels")
    if config.residual_depth_exponent != 0.0:
        _require(config, "base_num_layers")


def _refuse_for_sp(config: ParameterizationConfig) -> None:
    """Options that only mean something under muP."""
    if config.output_form is OutputForm.MULTIPLIER:
        raise ParameterizationError(
            "output_form=multiplier is a formulation of muP's output layer; under sp leave "
            "parameterization.output_form at folded"
        )
    if config.init is InitScheme.SIGMA and config.u_init is UnembeddingInit.MUP:
        raise ParameterizationError(
            "u_init=mup scales the unembedding against a base width, which sp with "
            "init=sigma does not have; use u_init=sp or name=mup"
        )


def _require(config: ParameterizationConfig, *names: str) -> None:
    missing = [name for name in names if getattr(config, name) is None]
    if missing:
        raise ParameterizationError(
            f"parameterization '{config.name}' needs the base shape: set "
            + ", ".join(f"parameterization.{name}" for name in missing)
            + " to the sizes of the model on which hyperparameters were tuned"
        )
