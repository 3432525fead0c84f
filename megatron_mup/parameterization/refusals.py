"""Combinations that have no published or derived rule, refused before anything is computed.

Must not import torch or megatron.
"""

from __future__ import annotations

from megatron_mup.errors import ParameterizationError
from megatron_mup.parameterization.options import (
    LR_EXPONENTS,
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
    if shape.tied_embeddings:
        _refuse_for_tied(config, u_init)
    _refuse_ratio_without_effect(config, optimizer)
    _refuse_exponents(shape, config, optimizer)
    divides = optimizer.weight_decay_mode is not DecayMode.COUPLED
    if divides and optimizer.weight_decay > 0 and not optimizer.lr > 0:
        raise ParameterizationError(
            f"weight_decay_mode={optimizer.weight_decay_mode} divides weight_decay "
            f"{optimizer.weight_decay} by the peak LR, which is {optimizer.lr}; "
            "set optimizer.lr above 0 or use coupled"
        )


def _require_base_shape(config: ParameterizationConfig, attention_scale: AttentionScale) -> None:
    """Each rule that compares with the base model needs the sizes that it compares with."""
    # The relative rule asks for all sizes at once: a later change of shape then needs no new ones.
    if config.name.is_relative or (
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
    if config.residual_depth_exponent:
        _require(config, "base_num_layers")
    if config.weight_decay_width_exponent != 0.0 or config.unembedding_lr_exponent is not None:
        _require(config, "base_hidden_size")
    if config.embedding_lr_exponent is not None:
        _require(config, "base_hidden_size")
    if config.hidden_lr_exponent is not None:
        _require(config, "base_hidden_size", "base_ffn_hidden_size", "base_kv_channels")


def _refuse_ratio_without_effect(
    config: ParameterizationConfig, optimizer: OptimizerNumbers
) -> None:
    """``ffn_out_lr_ratio`` chooses between two rules that exist in one case only."""
    if config.ffn_out_lr_ratio is None:
        return
    if not config.name.is_relative:
        raise ParameterizationError(
            f"ffn_out_lr_ratio={config.ffn_out_lr_ratio} chooses between two relative rules and "
            f"has no effect under name={config.name}; leave parameterization.ffn_out_lr_ratio "
            "unset or use name=mup or completep"
        )
    if optimizer.orthogonalized:
        raise ParameterizationError(
            f"ffn_out_lr_ratio={config.ffn_out_lr_ratio} has no effect with optimizer=muon, whose "
            "hidden learning rates do not depend on any size; leave "
            "parameterization.ffn_out_lr_ratio unset"
        )


def _refuse_exponents(
    shape: ModelShape, config: ParameterizationConfig, optimizer: OptimizerNumbers
) -> None:
    """Powers that replace the rule set's own need a row and a ratio to act on."""
    chosen = [name for name in LR_EXPONENTS if getattr(config, name) is not None]
    if chosen and config.name is Parameterization.ABS_MUP:
        raise ParameterizationError(
            f"{chosen[0]}={getattr(config, chosen[0])} is a power of a ratio to a base model, "
            f"which abs_mup does not use; leave parameterization.{chosen[0]} unset or use name=mup "
            "or sp"
        )
    for name in ("embedding_lr_exponent", "unembedding_lr_exponent"):
        if shape.tied_embeddings and name in chosen:
            raise ParameterizationError(
                f"{name}={getattr(config, name)}: a tied matrix is embedding and readout, and no "
                f"published rule scales its LR; leave parameterization.{name} unset or set "
                "model.untie_embeddings_and_output_weights=true"
            )
    if optimizer.orthogonalized and config.hidden_lr_exponent is not None:
        raise ParameterizationError(
            f"hidden_lr_exponent={config.hidden_lr_exponent}: with optimizer=muon the hidden "
            "learning rates do not depend on any size; leave parameterization.hidden_lr_exponent "
            "unset"
        )
    if config.eps_scaling and config.name is Parameterization.COMPLETEP:
        raise ParameterizationError(
            "eps_scaling multiplies eps by the LR's factor, but completep has its own rule for "
            "eps; leave parameterization.eps_scaling at false"
        )


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


def _refuse_for_tied(config: ParameterizationConfig, u_init: UnembeddingInit) -> None:
    """A tied matrix has the embedding's init and LR; only some readouts can be made of it."""
    untie = "set model.untie_embeddings_and_output_weights=true"
    standard = config.name is Parameterization.SP
    if not standard and config.output_form is OutputForm.FOLDED:
        raise ParameterizationError(
            "tied embeddings cannot hold the folded output layer (its init and LR would "
            "shrink the embedding too); set parameterization.output_form=multiplier"
        )
    if u_init is UnembeddingInit.ZERO:
        raise ParameterizationError(f"u_init=zero would zero the tied embedding; {untie}")
    if standard and u_init is UnembeddingInit.MUP:
        raise ParameterizationError(
            "u_init=mup has no effect on a tied readout under sp, which is the embedding itself; "
            f"leave parameterization.u_init unset or {untie}"
        )
    if not standard and u_init is UnembeddingInit.SP:
        # E moves by LR alpha at every width: a factor M^-1/2 leaves sqrt(m) in the logits' change.
        raise ParameterizationError(
            f"u_init=sp has no rule for tied embeddings under {config.name}: the logits' factor "
            "would shrink only as M^-1/2, so their change would grow as sqrt(M); leave "
            f"parameterization.u_init unset or {untie}"
        )


def _require(config: ParameterizationConfig, *names: str) -> None:
    # All missing names in one error, not one a run.
    missing = [name for name in names if getattr(config, name) is None]
    if missing:
        raise ParameterizationError(
            f"parameterization '{config.name}' needs the base shape: set "
            + ", ".join(f"parameterization.{name}" for name in missing)
            + " to the sizes of the model on which hyperparameters were tuned"
        )
