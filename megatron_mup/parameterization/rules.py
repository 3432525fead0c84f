"""THE rule table: role -> init std, learning rate, weight decay, eps, forward multiplier.

Every number of this package that depends on width, depth or parameterization is computed here, from
the exponents in ``RULES`` and ``INIT``, and everywhere else is read from the resolved table.

Notation: M hidden size, P base hidden size, m = M / P, F FFN width, D head dim, L layers,
alpha = base peak LR, lambda = weight decay, r = a tensor's size ratio to its base.
Sources: L = arXiv:2404.05728 (Table 2 and its code), K = arXiv:2510.19093, TP5 = arXiv:2203.03466,
S = arXiv:2310.17813, "ours" = derived in docs/parameterization.md; ``sources`` says in words which
of them a row follows. Must not import torch or megatron.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from megatron_mup.errors import ParameterizationError
from megatron_mup.parameterization.options import (
    AttentionScale,
    DecayMask,
    DecayMode,
    InitScheme,
    OptimizerNumbers,
    OutputForm,
    Parameterization,
    ParameterizationConfig,
    Ratio,
    UnembeddingInit,
    WeightInit,
)
from megatron_mup.parameterization.refusals import refuse_without_rule
from megatron_mup.parameterization.roles import LogicalTensor, ModelShape, Role


@dataclass(frozen=True, kw_only=True)
class Rule:
    """One row: LR = alpha * r ** lr_exponent, with r the named ratio of that tensor.

    ``citation`` names where the rule was published and ``published_ratio`` the ratio used there;
    where ``ratio`` is another one, that choice is ours.
    """

    ratio: Ratio
    lr_exponent: float
    citation: str
    published_ratio: Ratio


def _flat(citation: str) -> Rule:
    """LR alpha at every size."""
    return Rule(ratio=Ratio.NONE, lr_exponent=0.0, citation=citation, published_ratio=Ratio.NONE)


def _inverse(ratio: Ratio, citation: str, *, published: Ratio = Ratio.WIDTH) -> Rule:
    """LR alpha / r."""
    return Rule(ratio=ratio, lr_exponent=-1.0, citation=citation, published_ratio=published)


_TABLE, _ABSOLUTE = "arXiv:2404.05728 Table 2", "arXiv:2404.05728 absolute rule"
_VECTOR_LIKE = (Role.EMBEDDING, Role.GAIN, Role.BIAS)
_READS_WIDTH = (Role.QUERY, Role.KEY, Role.VALUE, Role.FFN_IN, Role.UNEMBEDDING)
"""Roles whose fan-in is M in every model, so that the width and the fan-in ratio are one."""

RULES: dict[Parameterization, dict[Role, Rule]] = {
    Parameterization.SP: dict.fromkeys(Role, _flat("arXiv:2404.05728 sp")),
    Parameterization.MUP: {
        **dict.fromkeys(_VECTOR_LIKE, _flat(_TABLE)),
        **dict.fromkeys(_READS_WIDTH, _inverse(Ratio.WIDTH, _TABLE)),
        # H D and F need not grow in step with M. What keeps an activation's change constant is the
        # number of terms in its sum (TP5), so we divide by their own ratios where L takes M / P.
        Role.ATTENTION_OUT: _inverse(Ratio.FAN_IN, _TABLE),
        Role.FFN_OUT: _inverse(Ratio.FAN_IN, _TABLE),
    },
    # The absolute rule is the relative one with every base size equal to 1.
    Parameterization.ABS_MUP: {
        **dict.fromkeys(_VECTOR_LIKE, _flat(_ABSOLUTE)),
        **dict.fromkeys(_READS_WIDTH, _inverse(Ratio.WIDTH, _ABSOLUTE)),
        Role.ATTENTION_OUT: _inverse(Ratio.FAN_IN, _ABSOLUTE),
        # Unlike in its relative rule, L divides by F here.
        Role.FFN_OUT: _inverse(Ratio.FAN_IN, _ABSOLUTE, published=Ratio.FAN_IN),
    },
}

HIDDEN = tuple(role for role in Role if role not in (*_VECTOR_LIKE, Role.UNEMBEDDING))
"""Roles whose update Muon orthogonalizes; AdamW trains the others, by the rules above."""
# The update is semi-orthogonal times sqrt(fan_out / fan_in), Megatron's unit_rms_norm: its spectral
# norm is what S asks of a change of W at every width, so no ratio is left for the LR.
_SPECTRAL = dict.fromkeys(HIDDEN, _flat("arXiv:2310.17813 Condition 1, orthogonalized update"))

MUON_RULES = {name: {**rules, **_SPECTRAL} for name, rules in RULES.items()}
MUON_RULES[Parameterization.SP] = RULES[Parameterization.SP]

INIT_EXPONENT = -0.5
"""std ~ fan_in^-1/2 for hidden matrices (variance 1/fan_in), L Table 2."""

UNEMBEDDING_EXPONENT = {UnembeddingInit.MUP: -1.0, UnembeddingInit.SP: -0.5}
"""std ~ M^exponent for the unembedding (variance 1/M^2 or 1/M), L Table 2 and u_init."""

_DEFAULT_UNEMBEDDING_INIT = {
    Parameterization.SP: UnembeddingInit.SP,
    Parameterization.MUP: UnembeddingInit.MUP,
    Parameterization.ABS_MUP: UnembeddingInit.MUP,
}
_DEFAULT_ATTENTION_SCALE = {
    Parameterization.SP: AttentionScale.INVERSE_SQRT,
    Parameterization.MUP: AttentionScale.INVERSE,
    Parameterization.ABS_MUP: AttentionScale.INVERSE,
}


@dataclass(frozen=True, kw_only=True)
class Multipliers:
    """The four forward multipliers; one object feeds the hooks and the table.

    ``attention`` multiplies the scores q.k; ``residual`` each residual branch before it is added;
    ``logit`` acts on the final hidden state, which multiplies the logits but not their bias.
    """

    embedding: float
    attention: float
    residual: float
    logit: float


@dataclass(frozen=True, kw_only=True)
class TensorRule:
    """The rules evaluated for one logical tensor; LR and decay are those at peak."""

    base_fan_in: float
    init_std: float
    lr: float
    weight_decay: float
    eps: float | None
    forward_mult: float


class Rules:
    """Rules of one parameterization for one model; evaluates tensors one at a time.

    Args:
        shape: global model shape.
        config: the parameterization options.
        optimizer: base LR, decay and eps.

    Raises:
        ParameterizationError: missing base shape, or a combination that has no published or
            derived rule.
    """

    def __init__(
        self, shape: ModelShape, config: ParameterizationConfig, optimizer: OptimizerNumbers
    ) -> None:
        self.shape = shape
        self.config = config
        self.optimizer = optimizer
        self.u_init = config.u_init or _DEFAULT_UNEMBEDDING_INIT[config.name]
        self.attention_scale = config.attention_scale or _DEFAULT_ATTENTION_SCALE[config.name]
        refuse_without_rule(
            shape, config, optimizer, u_init=self.u_init, attention_scale=self.attention_scale
        )

    @property
    def width_multiplier(self) -> float:
        """m = M / P; 1 where no base is given."""
        base = self.config.base_hidden_size
        return 1.0 if base is None else self.shape.hidden_size / base

    @property
    def multipliers(self) -> Multipliers:
        """The forward multipliers of this model."""
        config, shape = self.config, self.shape
        head_dim = shape.kv_channels
        attention = {
            AttentionScale.INVERSE: 1.0 / head_dim,
            AttentionScale.INVERSE_SQRT: 1.0 / math.sqrt(head_dim),
            AttentionScale.BASE_HEAD_DIM: math.sqrt(config.base_kv_channels or 1) / head_dim,
        }[self.attention_scale]
        # sqrt(D)/D, D**-0.5 and Megatron's 1/sqrt(D) differ in the last bit; at the base head dim
        # the scale is Megatron's.
        if (
            self.attention_scale is AttentionScale.BASE_HEAD_DIM
            and config.base_kv_channels == head_dim
        ):
            attention = 1.0 / math.sqrt(head_dim)
        residual = config.residual_multiplier
        if config.residual_depth_exponent != 0.0 and config.base_num_layers is not None:
            depth = shape.num_layers / config.base_num_layers
            residual *= depth**-config.residual_depth_exponent
        return Multipliers(
            embedding=config.embedding_multiplier,
            attention=attention,
            residual=residual,
            logit=config.logit_multiplier * self.logit_rule,
        )

    @property
    def logit_rule(self) -> float:
        """Width factor of the logits: 1/m in the multiplier form, 1 in the folded one.

        A tied muP model reads out with the embedding's matrix; multiplied by the ratio of the two
        stds it starts with the logits of the untied model (ours, docs/parameterization.md). A tied
        ``sp`` model has no hidden multiplier.
        """
        if self.config.name is Parameterization.SP:
            return 1.0
        if self.shape.tied_embeddings:
            return self._folded_unembedding_std() / self._embedding_std()
        if self.config.output_form is OutputForm.MULTIPLIER:
            return 1.0 / self.width_multiplier
        return 1.0

    def base_fan_in(self, tensor: LogicalTensor) -> float:
        """Fan-in of the same tensor in the base model; its own where no rule compares the two.

        Raises:
            ParameterizationError: the base attention width is ambiguous.
        """
        config = self.config
        if config.base_hidden_size is None or not self._compares_with_base(tensor.role):
            return tensor.fan_in
        if tensor.role is Role.FFN_OUT:
            return config.base_ffn_hidden_size or tensor.fan_in
        if tensor.role is Role.ATTENTION_OUT:
            return self._base_attention_width()
        return config.base_hidden_size

    def _compares_with_base(self, role: Role) -> bool:
        """Whether LR, init or output form of a role refers to the base model."""
        config = self.config
        if role in _VECTOR_LIKE or config.name is Parameterization.SP:
            return False
        # The absolute LR has base 1: only sigma and the multiplier form bring a base model in.
        return (
            config.name is Parameterization.MUP
            or config.init is InitScheme.SIGMA
            or (role is Role.UNEMBEDDING and config.output_form is OutputForm.MULTIPLIER)
        )

    def _base_attention_width(self) -> float:
        config, shape = self.config, self.shape
        if config.base_num_attention_heads is not None and config.base_kv_channels is not None:
            return config.base_num_attention_heads * config.base_kv_channels
        if shape.attention_width != shape.hidden_size or config.base_hidden_size is None:
            raise ParameterizationError(
                f"heads * kv_channels = {shape.attention_width} differs from hidden_size = "
                f"{shape.hidden_size}: set parameterization.base_num_attention_heads (and "
                "base_kv_channels), so that the base width of the attention output is known"
            )
        return config.base_hidden_size

    def size_ratio(self, tensor: LogicalTensor, ratio: Ratio) -> float:
        """The named size ratio of one tensor to its base; absolute rules have base 1."""
        absolute = self.config.name is Parameterization.ABS_MUP
        if ratio is Ratio.NONE:
            return 1.0
        if ratio is Ratio.WIDTH:
            return self.shape.hidden_size if absolute else self.width_multiplier
        if absolute:
            return self._absolute_fan_in(tensor)
        return tensor.fan_in / self.base_fan_in(tensor)

    def _absolute_fan_in(self, tensor: LogicalTensor) -> float:
        """L's absolute rule divides by ff_multiple * M, not by its integer part."""
        if tensor.role is Role.FFN_OUT and self.shape.ffn_multiplier is not None:
            return self.shape.ffn_multiplier * self.shape.hidden_size
        return tensor.fan_in

    def rule(self, role: Role) -> Rule:
        """The row of the table that a role follows under this optimizer."""
        rules = MUON_RULES if self.optimizer.orthogonalized else RULES
        return rules[self.config.name][role]

    def ratio_used(self, role: Role) -> Ratio:
        """Which ratio the LR of a role uses under these options."""
        # Refused unless name=mup, and with Muon, whose ffn_out has no ratio.
        chosen = self.config.ffn_out_lr_ratio if role is Role.FFN_OUT else None
        return chosen or self.rule(role).ratio

    def _embedding_std(self) -> float:
        config = self.config
        if config.embedding_init_method_std is not None:
            return config.embedding_init_method_std
        return 1.0 if config.init is InitScheme.FAN_IN else config.init_method_std

    def _folded_unembedding_std(self) -> float:
        """Std of the unembedding in the folded form."""
        if self.u_init is UnembeddingInit.ZERO:
            return 0.0
        exponent = UNEMBEDDING_EXPONENT[self.u_init]
        if self.config.init is InitScheme.FAN_IN:
            return float(self.shape.hidden_size**exponent)
        if self.config.name is Parameterization.SP:
            return self.config.init_method_std
        return float(self.config.init_method_std * self.width_multiplier**exponent)

    def _hidden_std(self, tensor: LogicalTensor) -> float:
        config, role = self.config, tensor.role
        residual = role in (Role.ATTENTION_OUT, Role.FFN_OUT)
        if role is Role.QUERY and config.q_init is WeightInit.ZERO:
            return 0.0
        if residual and config.r_init is WeightInit.ZERO:
            return 0.0
        if config.init is InitScheme.FAN_IN:
            std = tensor.fan_in**INIT_EXPONENT
        elif config.name is Parameterization.SP:
            std = config.init_method_std
        else:
            ratio = tensor.fan_in / self.base_fan_in(tensor)
            std = config.init_method_std * ratio**INIT_EXPONENT
        if self.scales_by_depth(role):
            std /= (2.0 * self.shape.num_layers) ** 0.5
        return float(std)

    def scales_by_depth(self, role: Role) -> bool:
        """Whether the std of a role is divided by sqrt(2L)."""
        if role not in (Role.ATTENTION_OUT, Role.FFN_OUT):
            return False
        scale = self.config.scale_residual_init
        return self.config.init is InitScheme.SIGMA if scale is None else scale

    def _init_std(self, tensor: LogicalTensor) -> float:
        if tensor.role in (Role.GAIN, Role.BIAS):
            return 0.0
        if tensor.role is Role.EMBEDDING:
            return self._embedding_std()
        if tensor.role is Role.UNEMBEDDING:
            return self._folded_unembedding_std() * self._unfold()
        return self._hidden_std(tensor)

    def _unfold(self) -> float:
        """m in the multiplier form, 1 in the folded one: W = m W', logits = W h / m."""
        multiplier = self.config.output_form is OutputForm.MULTIPLIER
        return self.width_multiplier if multiplier else 1.0

    def evaluate(self, tensor: LogicalTensor) -> TensorRule:
        """Evaluate every rule for one tensor.

        Args:
            tensor: logical tensor with its global shape.

        Returns:
            Its init std, peak LR, weight decay (the value that the LR multiplies), eps and forward
            multiplier.
        """
        exponent = self.rule(tensor.role).lr_exponent
        factor = self.size_ratio(tensor, self.ratio_used(tensor.role)) ** exponent
        muon = self.optimizer.orthogonalized and tensor.role in HIDDEN
        lr, eps = self.optimizer.lr * factor, None if muon else self.optimizer.eps
        if eps is not None and self.config.eps_scaling:
            eps *= factor
        decay = group_weight_decay(self.optimizer, lr=lr, is_matrix=len(tensor.shape) > 1)
        if tensor.role is Role.UNEMBEDDING and self.config.output_form is OutputForm.MULTIPLIER:
            # W = m W': the same function needs LR * m, and eps and coupled decay / m (ours).
            unfold = self._unfold()
            lr *= unfold
            decay /= unfold
            eps = None if eps is None else eps / unfold
        return TensorRule(
            base_fan_in=self.base_fan_in(tensor),
            init_std=self._init_std(tensor),
            lr=lr,
            weight_decay=decay,
            eps=eps,
            forward_mult=self._forward_mult(tensor.role),
        )

    def _forward_mult(self, role: Role) -> float:
        multipliers = self.multipliers
        return {
            Role.EMBEDDING: multipliers.embedding,
            Role.QUERY: multipliers.attention,
            Role.ATTENTION_OUT: multipliers.residual,
            Role.FFN_OUT: multipliers.residual,
            Role.UNEMBEDDING: multipliers.logit,
        }.get(role, 1.0)


def group_weight_decay(optimizer: OptimizerNumbers, *, lr: float, is_matrix: bool) -> float:
    """Weight decay of a tensor: the value that its LR multiplies in each step.

    coupled: lambda (PyTorch AdamW; decay per step shrinks with the LR).
    constant_product: lambda * alpha / lr, so LR * decay = alpha * lambda everywhere (K).
    independent: lambda / lr, so the decay per step is s(t) * lambda whatever the LR (L, use_iwd).

    Args:
        optimizer: base LR (alpha), lambda, mode and mask.
        lr: peak LR of the tensor.
        is_matrix: whether the tensor has two axes.
    """
    # Without decay nothing is divided by an LR that may be 0.
    spared = optimizer.weight_decay_mask is DecayMask.MATRICES and not is_matrix
    if spared or optimizer.weight_decay == 0:
        return 0.0
    if optimizer.weight_decay_mode is DecayMode.COUPLED:
        return optimizer.weight_decay
    if optimizer.weight_decay_mode is DecayMode.CONSTANT_PRODUCT:
        return optimizer.weight_decay * optimizer.lr / lr
    return optimizer.weight_decay / lr
