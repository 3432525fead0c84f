"""The rule table evaluated for one model: exponents in, numbers out.

Notation: M hidden size, P base hidden size, m = M / P, F FFN width, D head dim, L layers,
alpha = base peak LR, lambda = weight decay. Sources: L = arXiv:2404.05728, K = arXiv:2510.19093,
"ours" = derived in docs/parameterization.md. Must not import torch or megatron.
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
from megatron_mup.parameterization.roles import LogicalTensor, ModelShape, Role, in_layers
from megatron_mup.parameterization.rules import (
    DEFAULT_ATTENTION_SCALE,
    DEFAULT_DEPTH_EXPONENT,
    DEFAULT_UNEMBEDDING_INIT,
    DIVIDED,
    HIDDEN,
    INIT_EXPONENT,
    MUON_RULES,
    RULES,
    UNEMBEDDING_EXPONENT,
    VECTOR_LIKE,
    Rule,
)


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
    width_ratio: float


_MUP_ROWS = RULES[Parameterization.MUP]


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
        self.u_init = config.u_init or DEFAULT_UNEMBEDDING_INIT[config.name]
        self.attention_scale = config.attention_scale or DEFAULT_ATTENTION_SCALE[config.name]
        refuse_without_rule(
            shape, config, optimizer, u_init=self.u_init, attention_scale=self.attention_scale
        )

    @property
    def width_multiplier(self) -> float:
        """m = M / P; 1 where no base is given."""
        base = self.config.base_hidden_size
        return 1.0 if base is None else self.shape.hidden_size / base

    @property
    def depth_exponent(self) -> float:
        """a: residual branches are multiplied by (L / base L) ** -a."""
        chosen = self.config.residual_depth_exponent
        return DEFAULT_DEPTH_EXPONENT[self.config.name] if chosen is None else chosen

    @property
    def depth_ratio(self) -> float:
        """L / base L; 1 where no base is given."""
        base = self.config.base_num_layers
        return 1.0 if base is None else self.shape.num_layers / base

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
        return Multipliers(
            embedding=config.embedding_multiplier,
            attention=attention,
            residual=config.residual_multiplier * self.depth_ratio**-self.depth_exponent,
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
        if role in VECTOR_LIKE:
            return False
        if config.name is Parameterization.SP:
            return self.chosen_exponent(role) is not None
        # The absolute LR has base 1: only sigma and the multiplier form bring a base model in.
        return (
            config.name.is_relative
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
        if chosen is None and self.chosen_exponent(role) is not None:
            # A power that was asked for is one of the ratio that muP divides by.
            return Ratio.WIDTH if role is Role.EMBEDDING else _MUP_ROWS[role].ratio
        return chosen or self.rule(role).ratio

    def chosen_exponent(self, role: Role) -> float | None:
        """The power of a role's LR that the user asked for instead of the rule set's."""
        config = self.config
        if role in HIDDEN:
            return config.hidden_lr_exponent
        if role is Role.EMBEDDING:
            return config.embedding_lr_exponent
        return config.unembedding_lr_exponent if role is Role.UNEMBEDDING else None

    def lr_exponent(self, role: Role) -> float:
        """The power of ``ratio_used`` in a role's LR."""
        chosen = self.chosen_exponent(role)
        return self.rule(role).lr_exponent if chosen is None else chosen

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
        ratio = self.size_ratio(tensor, self.ratio_used(tensor.role))
        factor = ratio ** self.lr_exponent(tensor.role)
        depth_factor, eps_factor = self._depth_factors(tensor, ratio)
        muon = self.optimizer.orthogonalized and tensor.role in HIDDEN
        lr = self.optimizer.lr * factor * depth_factor
        eps = None if muon or self.optimizer.eps is None else self.optimizer.eps * eps_factor
        if eps is not None and self.config.eps_scaling:
            eps *= factor
        decay = group_weight_decay(self.optimizer, lr=lr, is_matrix=len(tensor.shape) > 1)
        if tensor.role in DIVIDED:
            decay *= self.width_multiplier**self.config.weight_decay_width_exponent
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
            width_ratio=self._width_ratio(tensor),
        )

    def _depth_factors(self, tensor: LogicalTensor, ratio: float) -> tuple[float, float]:
        """Factors of LR and eps that come from depth and from rows with an eps rule."""
        rule, depth = self.rule(tensor.role), 1.0
        if rule.depth_rule and in_layers(tensor):
            depth = self.depth_ratio
        eps = ratio**rule.eps_exponent
        if rule.eps_exponent:
            eps *= depth**-self.depth_exponent
        return depth ** (self.depth_exponent - 1.0), eps

    def _width_ratio(self, tensor: LogicalTensor) -> float:
        """What muP divides this tensor's LR by, whatever the rule set; 1 where it does not."""
        if tensor.role not in DIVIDED or self.config.base_hidden_size is None:
            return 1.0
        return self.width_multiplier

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
