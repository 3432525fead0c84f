"""What a model, optimizer or schedule made elsewhere may not be, said before anything is changed.

A layer whose tensors have no row in the table is refused by its name; so is an option that would
decide a second time what the table decides.
"""

from __future__ import annotations

from typing import Any

from megatron.core.optimizer import OptimizerConfig
from megatron.core.transformer import TransformerConfig

from megatron_mup.errors import ConfigError, ParameterizationError
from megatron_mup.parameterization.evaluation import Multipliers
from megatron_mup.parameterization.options import HorizonRule, ParameterizationConfig

_WITHOUT_RULES: dict[str, tuple[str, tuple[object, ...]]] = {
    "num_moe_experts": ("MoE experts and their router", (None,)),
    "multi_latent_attention": ("multi-latent attention (MLA)", (False,)),
    "is_hybrid_model": ("Mamba layers", (False,)),
    "mtp_num_layers": ("multi-token prediction", (None, 0)),
    "experimental_attention_variant": ("an experimental attention", (None,)),
    "heterogeneous_block_specs": ("layers of different shapes", (False,)),
    "attention_output_gate": ("a gate on the attention's output", (False,)),
    "softmax_type": ("learned softmax offsets", ("vanilla", "off-by-one")),
    "normalization": ("a norm with a bias", ("RMSNorm",)),
    "layernorm_zero_centered_gamma": ("gains that start at 0", (False,)),
    "apply_residual_connection_post_layernorm": ("post-norm residual branches", (False,)),
    "qk_layernorm": ("QK norm", (False,)),
    "qk_l2_norm": ("QK norm", (False,)),
}
"""Options of TransformerConfig: what they build, and the values that have rules."""

_DECIDED_TWICE: dict[str, tuple[str, tuple[object, ...]]] = {
    "use_mup": ("is upstream's muP, which would be applied on top of the table", (False,)),
    "apply_query_key_layer_scaling": ("scales attention by layer number", (False,)),
    "init_model_with_meta_device": ("builds a model that initial values cannot enter", (False,)),
}


def refuse_config(config: TransformerConfig) -> None:
    """Refuse a model configuration whose layers have no rules, or that decides what the table does.

    Args:
        config: upstream's, as its ``GPTModel`` would get it.

    Raises:
        ParameterizationError: names the option, what it builds, and the value to use.
    """
    for option, (what, allowed) in _WITHOUT_RULES.items():
        value = getattr(config, option)
        if value not in allowed:
            raise ParameterizationError(
                f"TransformerConfig.{option}={value} builds {what}, for which the rule table has "
                f"no row; use {option}={allowed[0]}, or add a row (docs/extending.md)"
            )
    for option, (what, allowed) in _DECIDED_TWICE.items():
        value = getattr(config, option)
        if value not in allowed:
            raise ParameterizationError(
                f"TransformerConfig.{option}={value} {what}; set {option}={allowed[0]}"
            )
    if config.add_qkv_bias and not config.add_bias_linear:
        raise ParameterizationError(
            "TransformerConfig.add_qkv_bias=True with add_bias_linear=False gives biases to query, "
            "key and value alone, for which the rule table has no row; set both or none"
        )


def refuse_horizon(parameterization: ParameterizationConfig) -> None:
    """Refuse a rule for batch and length, which only the script knows.

    Raises:
        ParameterizationError: with the function that applies the rule.
    """
    rule = parameterization.horizon_rule
    if rule is not HorizonRule.NONE:
        raise ParameterizationError(
            f"horizon_rule={rule} needs the run's batch and length, which the script keeps to "
            "itself; scale OptimizerConfig by megatron_mup.parameterization.horizon."
            "scaled_for_horizon and leave horizon_rule at none"
        )


def refuse_scale(config: TransformerConfig, multipliers: Multipliers) -> None:
    """Refuse an attention scale other than the table's; unset is left to ``Mup.apply``.

    Raises:
        ParameterizationError: with the scale to use.
    """
    scale = config.softmax_scale
    if scale is not None and scale != multipliers.attention:
        raise ParameterizationError(
            f"TransformerConfig.softmax_scale is {scale}, the table says {multipliers.attention}; "
            "leave it unset and take Mup.softmax_scale, or choose parameterization.attention_scale"
        )


def refuse_optimizer(optimizer: OptimizerConfig) -> None:
    """Refuse an optimizer that the table's numbers are not for.

    Args:
        optimizer: upstream's, as ``get_megatron_optimizer`` would get it.

    Raises:
        ConfigError: names the option and the value to use.
    """
    if optimizer.optimizer != "adam":
        raise ConfigError(
            f"OptimizerConfig.optimizer={optimizer.optimizer}: in a script of your own the rules "
            "hold for adam (AdamW); Lion and Muon are trained by 'megatron-mup train', and "
            "docs/extending.md tells how an optimizer gets rules"
        )
    if not optimizer.decoupled_weight_decay:
        raise ConfigError(
            "OptimizerConfig.decoupled_weight_decay=False is Adam with an L2 penalty, which has no "
            "rule for weight decay; set it to True"
        )
    if optimizer.lr is None:
        raise ConfigError("OptimizerConfig.lr is unset; it is alpha, the base peak learning rate")
    if optimizer.decoupled_lr is not None:
        raise ConfigError(
            f"OptimizerConfig.decoupled_lr={optimizer.decoupled_lr} sets the LR of embedding and "
            "readout, which the table does; leave it unset and use "
            "parameterization.embedding_lr_exponent or unembedding_lr_exponent"
        )


def refuse_schedule(scheduler: Any, optimizer: OptimizerConfig) -> None:
    """Refuse a schedule that moves the groups out of ratio.

    Args:
        scheduler: upstream's ``OptimizerParamScheduler``.
        optimizer: the configuration that the table was resolved with.

    Raises:
        ConfigError: names the option and the value to use.
    """
    # Megatron-LM's --lr-warmup-init: hidden groups could even start above their peak.
    if scheduler.lr_warmup_steps > 0 and scheduler.init_lr != 0:
        raise ConfigError(
            f"OptimizerParamScheduler.init_lr={scheduler.init_lr} starts every group at the same "
            "absolute LR and breaks the ratios between groups; set init_lr (lr_warmup_init) to 0"
        )
    decay = optimizer.weight_decay
    if scheduler.end_wd != decay:
        raise ConfigError(
            f"OptimizerParamScheduler.end_wd={scheduler.end_wd} replaces OptimizerConfig."
            f"weight_decay={decay}, which the groups' wd_mult refers to; set them equal"
        )
