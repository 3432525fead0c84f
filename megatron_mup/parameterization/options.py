"""What a user may choose about the parameterization: enums and one frozen dataclass.

"Unset" is None and means the parameterization's own choice, which the rule table states; no number
doubles as "unset". Sources: L = arXiv:2404.05728. Must not import torch or megatron.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import StrEnum

from megatron_mup.errors import ParameterizationError


class Parameterization(StrEnum):
    """Named rule sets: standard, relative muP (L Table 2), absolute muP (L), CompleteP.

    CompleteP (arXiv:2505.01618) is relative muP with rules for depth.
    """

    SP = "sp"
    MUP = "mup"
    ABS_MUP = "abs_mup"
    COMPLETEP = "completep"

    @property
    def is_relative(self) -> bool:
        """Whether its rules divide by ratios to a base model."""
        return self in (Parameterization.MUP, Parameterization.COMPLETEP)


class InitScheme(StrEnum):
    """How large a tensor is at its base: L's 1/fan_in variances, or Megatron's one sigma."""

    FAN_IN = "fan_in"
    SIGMA = "sigma"


class WeightInit(StrEnum):
    """Initial value of the query or of the residual output projections."""

    SCALED = "scaled"
    ZERO = "zero"


class UnembeddingInit(StrEnum):
    """Initial variance of the unembedding: mup 1/M^2, sp 1/M, or zero (L's u_init)."""

    MUP = "mup"
    SP = "sp"
    ZERO = "zero"


class OutputForm(StrEnum):
    """Folded: small init and LR alpha/m. Multiplier: logits times 1/m, LR alpha. Same function."""

    FOLDED = "folded"
    MULTIPLIER = "multiplier"


class AttentionScale(StrEnum):
    """Factor of the attention scores: 1/D, 1/sqrt(D), or sqrt(base head dim)/D."""

    INVERSE = "inverse"
    INVERSE_SQRT = "inverse_sqrt"
    BASE_HEAD_DIM = "base_head_dim"


class Ratio(StrEnum):
    """Which size ratio to its base a rule uses."""

    NONE = "none"
    WIDTH = "width"
    FAN_IN = "fan_in"


class HorizonRule(StrEnum):
    """How the optimizer's numbers follow batch size B and tokens D; see ``horizon``.

    ``completed_p``: batch and token rules of arXiv:2512.22382. ``token_power``: LR ~ D^-0.32
    (arXiv:2409.19913).
    """

    NONE = "none"
    COMPLETED_P = "completed_p"
    TOKEN_POWER = "token_power"


class DecayMode(StrEnum):
    """What weight decay is a fraction of; see ``rules.group_weight_decay``."""

    COUPLED = "coupled"
    CONSTANT_PRODUCT = "constant_product"
    INDEPENDENT = "independent"


class DecayMask(StrEnum):
    """Which tensors decay: matrices only (Megatron's habit) or all of them (L)."""

    MATRICES = "matrices"
    ALL = "all"


@dataclass(frozen=True, kw_only=True)
class ParameterizationConfig:
    """The parameterization section of a configuration."""

    name: Parameterization = Parameterization.MUP
    """Rule set: ``mup`` (relative), ``abs_mup`` (absolute), ``completep`` or ``sp``."""

    base_hidden_size: int | None = None
    """P: hidden size of the model on which hyperparameters were tuned. Required by ``mup``."""

    base_ffn_hidden_size: int | None = None
    """FFN width of the base model. Required by ``mup``: the FFN ratio need not be constant."""

    base_kv_channels: int | None = None
    """Head dim of the base model. Required by ``mup``; with it the base attention width follows."""

    base_num_layers: int | None = None
    """Depth of the base model. Required by ``mup``; used by ``residual_depth_exponent``."""

    base_num_attention_heads: int | None = None
    """Heads of the base model. Only needed when heads * kv_channels differs from hidden_size."""

    init: InitScheme = InitScheme.FAN_IN
    """``fan_in``: L's variances. ``sigma``: Megatron's ``init_method_std`` at the base shape."""

    init_method_std: float = 0.02
    """Sigma of ``init: sigma`` (Megatron's name and default); ignored by ``fan_in``."""

    embedding_init_method_std: float | None = None
    """Std of the embedding; unset means 1 under ``fan_in`` and ``init_method_std`` otherwise."""

    scale_residual_init: bool | None = None
    """Divide the residual projections' std by sqrt(2L); unset means only under ``sigma``."""

    q_init: WeightInit = WeightInit.SCALED
    """``zero`` initialises the queries, and only them, to zero."""

    r_init: WeightInit = WeightInit.SCALED
    """``zero`` initialises attention_out and ffn_out to zero."""

    u_init: UnembeddingInit | None = None
    """Initial variance of the unembedding; unset means the parameterization's own."""

    output_form: OutputForm = OutputForm.FOLDED
    """Formulation of the output layer; tied embeddings need ``multiplier``."""

    attention_scale: AttentionScale | None = None
    """Scale of attention scores; unset means 1/D under muP and 1/sqrt(D) under ``sp``."""

    embedding_multiplier: float = 1.0
    """Multiplies the embedding's output, at every width."""

    residual_multiplier: float = 1.0
    """Multiplies each residual branch before it is added, at the base depth."""

    residual_depth_exponent: float | None = None
    """Residual branches are also multiplied by (L / base L)^-exponent; unset means 0, and 1 under
    ``completep``, whose learning rates follow it."""

    logit_multiplier: float = 1.0
    """Multiplies the logits at every width, on top of the rule's own factor."""

    eps_scaling: bool = False
    """Multiply Adam's eps by the tensor's learning-rate factor (L's use_eps_scaling)."""

    ffn_out_lr_ratio: Ratio | None = None
    """Ratio that divides ffn_out's LR under ``mup`` and ``completep``, and only there: ``width`` is
    L's own rule, ``fan_in`` is ours; unset means ``fan_in``, and ``none`` is refused."""

    embedding_lr_exponent: float | None = None
    """Embedding LR alpha m^exponent instead of the rule set's own: 1 (arXiv:2605.21486, under
    ``sp``), 0.5 (arXiv:2506.15025), -0.5 (the 1/sqrt(fan_out) of arXiv:2407.17465)."""

    hidden_lr_exponent: float | None = None
    """LR of the hidden matrices alpha r^exponent instead of the rule set's own (``mup`` has -1)."""

    unembedding_lr_exponent: float | None = None
    """Unembedding LR alpha m^exponent instead of the rule set's own (``mup`` has -1)."""

    weight_decay_width_exponent: float = 0.0
    """lambda times m^exponent on the matrices whose LR muP divides. Published: 1 with coupled decay
    (arXiv:2510.19093), 0.5 (arXiv:2510.15262), -1 with independent decay (arXiv:2512.05620)."""

    horizon_rule: HorizonRule = HorizonRule.NONE
    """How LR, decay, eps and betas follow batch and length; needs the base sizes below."""

    base_batch_tokens: int | None = None
    """Positions of one global batch when hyperparameters were tuned: ``completed_p`` needs it, and
    under ``token_power`` it must be this run's."""

    base_train_tokens: int | None = None
    """Positions of the whole run when hyperparameters were tuned; for ``horizon_rule``."""

    def __post_init__(self) -> None:
        """Refuse values that no rule can use.

        Raises:
            ParameterizationError: a size below 1; a std or multiplier that is not positive and
                finite.
        """
        for name in (*BASE_SHAPE_OPTIONS, "base_batch_tokens", "base_train_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ParameterizationError(
                    f"parameterization.{name} is {value}; it must be at least 1"
                )
        # A multiplier of 0 would cut its path off and leave the weights behind it without gradient.
        for name in ("embedding_multiplier", "residual_multiplier", "logit_multiplier"):
            if not 0 < getattr(self, name) < math.inf:
                raise ParameterizationError(
                    f"parameterization.{name} is {getattr(self, name)}; it must be positive and "
                    "finite"
                )
        # Zero starts have options of their own (q_init, r_init, u_init), which say what they zero.
        for name in ("init_method_std", "embedding_init_method_std"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ParameterizationError(
                    f"parameterization.{name} is {value}; it must be positive and finite"
                )
        for name in _EXPONENTS:
            value = getattr(self, name)
            if value is not None and not math.isfinite(value):
                raise ParameterizationError(
                    f"parameterization.{name} is {value}; it must be finite"
                )
        # NONE is for rows of the table whose LR is alpha; ffn_out has no such published rule.
        if self.ffn_out_lr_ratio is Ratio.NONE:
            raise ParameterizationError(
                "parameterization.ffn_out_lr_ratio is 'none'; use 'width' or 'fan_in'"
            )


LR_EXPONENTS = ("embedding_lr_exponent", "hidden_lr_exponent", "unembedding_lr_exponent")
_EXPONENTS = (*LR_EXPONENTS, "residual_depth_exponent", "weight_decay_width_exponent")

# Sizes of the model that was tuned, each its own option: F, D and H need not follow M.
BASE_SHAPE_OPTIONS = (
    "base_hidden_size",
    "base_ffn_hidden_size",
    "base_kv_channels",
    "base_num_layers",
    "base_num_attention_heads",
)


@dataclass(frozen=True, kw_only=True)
class OptimizerNumbers:
    """The optimizer's scalars that the rules distribute over the tensors."""

    lr: float
    """alpha: base peak learning rate."""

    weight_decay: float
    """lambda."""

    weight_decay_mode: DecayMode
    weight_decay_mask: DecayMask
    eps: float | None
    """Adam's epsilon; None for optimizers that have none (Lion)."""

    betas: tuple[float, float] = (0.9, 0.95)
    """Adam's or Lion's; only ``horizon`` changes them."""

    orthogonalized: bool = False
    """Muon: hidden matrices get an orthogonalized update, the other roles keep Adam's rules."""
