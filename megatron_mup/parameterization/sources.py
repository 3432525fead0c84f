"""Where the numbers of a row come from, in words: built from the ratio and the init in force.

A formula is written from the exponents that ``rules`` computes with, so it cannot drift from them;
"ours" marks what docs/parameterization.md derives. Notation as in ``rules``: M hidden size, P base
hidden size, F FFN width, L layers, alpha base peak LR, sigma init_method_std. Must not import torch
or megatron.
"""

from __future__ import annotations

from megatron_mup.parameterization.evaluation import Rules
from megatron_mup.parameterization.options import (
    InitScheme,
    OutputForm,
    Parameterization,
    Ratio,
    UnembeddingInit,
    WeightInit,
)
from megatron_mup.parameterization.roles import LogicalTensor, Role, in_layers
from megatron_mup.parameterization.rules import DIVIDED, INIT_EXPONENT, UNEMBEDDING_EXPONENT

_PAPER, _TABLE = "arXiv:2404.05728", "arXiv:2404.05728 Table 2"
_MEGATRON = "Megatron's base point"
_EXPONENT_OPTION = {
    Role.EMBEDDING: "embedding_lr_exponent",
    Role.UNEMBEDDING: "unembedding_lr_exponent",
}


def row_source(rules: Rules, tensor: LogicalTensor) -> str:
    """The sources of one row's learning rate and initial values.

    Args:
        rules: rules of the model.
        tensor: the row's tensor.

    Returns:
        Clauses separated by semicolons: LR with its ratio, init, and the output layer's form.
    """
    # Decay and eps have one rule for all rows and stand in columns of their own.
    clauses = [_learning_rate(rules, tensor), _init(rules, tensor)]
    if tensor.role is Role.UNEMBEDDING and rules.config.output_form is OutputForm.MULTIPLIER:
        clauses.append(
            "multiplier form: LR and std times M/P, eps, decay and logits times P/M (ours)"
        )
    if tensor.role is Role.EMBEDDING and rules.shape.tied_embeddings:
        clauses.append(_tied(rules))
    rule = rules.rule(tensor.role)
    if rule.eps_exponent:
        sizes = _sizes(rules, tensor, rules.ratio_used(tensor.role))
        depth = power_text("L", "base_L", -rules.depth_exponent) if rules.depth_exponent else "1"
        clauses.append(
            f"eps times {power_text(*sizes, rule.eps_exponent)} times {depth} ({rule.citation})"
        )
    exponent = rules.config.weight_decay_width_exponent
    if exponent and tensor.role in DIVIDED:
        clauses.append(
            f"decay times {power_text('M', 'P', exponent)} (weight_decay_width_exponent)"
        )
    return "; ".join(clauses)


def power_text(top: str, bottom: str, exponent: float) -> str:
    """``(top / bottom) ** exponent`` as text with a positive exponent.

    Args:
        top: symbol of the numerator.
        bottom: symbol of the denominator, or "1".
        exponent: any but 0.
    """
    if exponent < 0:
        top, bottom, exponent = bottom, top, -exponent
    if exponent == 1:
        return f"{top}/{bottom}"
    return f"1/{bottom}^{exponent:g}" if top == "1" else f"({top}/{bottom})^{exponent:g}"


def _learning_rate(rules: Rules, tensor: LogicalTensor) -> str:
    """LR formula, the ratio in it, and whether that ratio is the published one."""
    rule = rules.rule(tensor.role)
    ratio = rules.ratio_used(tensor.role)
    exponent, origin = rules.lr_exponent(tensor.role), rule.citation
    if rules.chosen_exponent(tensor.role) is not None:
        origin = f"{_EXPONENT_OPTION.get(tensor.role, 'hidden_lr_exponent')}={exponent:g}"
    elif ratio is not rule.published_ratio:
        origin = f"ours; {rule.citation} uses the width"
        # The two ratios are the same number wherever the model grows in step with its base.
        if rules.size_ratio(tensor, ratio) == rules.size_ratio(tensor, Ratio.WIDTH):
            origin += ", equal here"
    formula = "alpha"
    if ratio is not Ratio.NONE and exponent:
        formula += f" {power_text(*_sizes(rules, tensor, ratio), exponent)}"
        # alpha 1/M reads alpha/M.
        formula = formula.replace(" 1/", "/")
    depth_exponent = rules.depth_exponent - 1.0
    if rule.depth_rule and depth_exponent and in_layers(tensor):
        formula += f" {power_text('L', 'base_L', depth_exponent)}"
    return f"LR {formula} (ratio {ratio}, {origin})"


def _sizes(rules: Rules, tensor: LogicalTensor, ratio: Ratio) -> tuple[str, str]:
    """Symbols of the size that a ratio compares and of its base."""
    absolute = rules.config.name is Parameterization.ABS_MUP
    if ratio is Ratio.WIDTH:
        return "M", "1" if absolute else "P"
    if absolute and tensor.role is Role.FFN_OUT and rules.shape.ffn_multiplier is not None:
        return "(ffn_multiplier M)", "1"
    return "fan_in", "1" if absolute else "base_fan_in"


def _init(rules: Rules, tensor: LogicalTensor) -> str:
    """How the tensor starts."""
    config, role = rules.config, tensor.role
    if role in (Role.GAIN, Role.BIAS):
        return f"init {1 if role is Role.GAIN else 0} ({_TABLE})"
    if role is Role.EMBEDDING:
        return _embedding_init(rules)
    if role is Role.UNEMBEDDING:
        return _unembedding_init(rules)
    if role is Role.QUERY and config.q_init is WeightInit.ZERO:
        return f"init 0 (q_init=zero, {_PAPER})"
    if role in (Role.ATTENTION_OUT, Role.FFN_OUT) and config.r_init is WeightInit.ZERO:
        return f"init 0 (r_init=zero, {_PAPER})"
    depth = " over sqrt(2L)" if rules.scales_by_depth(role) else ""
    if config.init is InitScheme.FAN_IN:
        variance = power_text("fan_in", "1", 2 * INIT_EXPONENT)
        # The paper has no depth factor: asked for, it comes from Megatron.
        origin = f"{_TABLE}; sqrt(2L): scale_residual_init" if depth else _TABLE
        return f"init var {variance}{', std' + depth if depth else ''} ({origin})"
    # sp has no base: sigma is Megatron's own initialization at every width.
    if config.name is Parameterization.SP:
        return f"init std sigma{depth} ({_MEGATRON})"
    ratio = power_text("fan_in", "base_fan_in", INIT_EXPONENT)
    return f"init std sigma {ratio}{depth} ({_MEGATRON})"


def _embedding_init(rules: Rules) -> str:
    std = rules.config.embedding_init_method_std
    if std is not None:
        return f"init std {std:g} (embedding_init_method_std)"
    if rules.config.init is InitScheme.FAN_IN:
        return f"init var 1 ({_TABLE})"
    return f"init std sigma ({_MEGATRON})"


def _unembedding_init(rules: Rules) -> str:
    """Init of the folded readout; the multiplier form's factor is a clause of its own."""
    config, u_init = rules.config, rules.u_init
    if u_init is UnembeddingInit.ZERO:
        return f"init 0 (u_init=zero, {_PAPER})"
    exponent = UNEMBEDDING_EXPONENT[u_init]
    if config.init is InitScheme.FAN_IN:
        origin = _TABLE if u_init is UnembeddingInit.MUP else f"u_init=sp, {_PAPER}"
        return f"init var {power_text('M', '1', 2 * exponent)} ({origin})"
    if config.name is Parameterization.SP:
        return f"init std sigma ({_MEGATRON})"
    origin = _MEGATRON if u_init is UnembeddingInit.MUP else f"u_init=sp, {_MEGATRON}"
    return f"init std sigma {power_text('M', 'P', exponent)} ({origin})"


def _tied(rules: Rules) -> str:
    """What a tied matrix does as the readout."""
    if rules.config.name is Parameterization.SP:
        return "tied: also the readout, no width factor on the logits (standard tying)"
    return (
        "tied: also the readout, logits times std(readout)/std(embedding) = "
        f"{rules.logit_rule:g} (ours)"
    )
