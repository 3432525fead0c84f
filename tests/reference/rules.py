"""The numbers of every tensor, written from the papers alone: initial spread, peak LR, decay, eps.

Owns one study (its shape, its rule, its settings) and what the papers say each tensor of it gets.
It must not import the package: it is what the package is compared with. L is arXiv:2404.05728,
K arXiv:2510.19093; tensor names are L's code's (w_aq: attention query, w_fo: feed-forward out,
w_u: unembedding, g_*: gains, b_*: biases), each stacked over the layers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

HIDDEN = frozenset({"w_aq", "w_ak", "w_av", "w_ao", "w_fi", "w_fo"})
DIVIDED = HIDDEN | {"w_u"}
"""Tensors whose LR muP divides by m (L Table 2); decay exponents and extra warmups act on them."""


@dataclass(frozen=True, kw_only=True)
class Study:
    """One training run: M, P, D, G, L, F, the formulation and the recipe."""

    width: int = 128
    base_width: int = 32
    head_dim: int = 32
    kv_heads: int | None = None
    layers: int = 2
    base_layers: int = 2
    ffn_multiple: float = 4.0
    vocabulary: int = 260
    activation: str = "relu"
    gains: str = "none"
    biases: bool = False
    embedding_norm: bool = False
    tied: bool = False
    norm_eps: float = 1e-5
    score_exponent: float = 1.0
    q_init: str = "fan_in"
    u_init: str = "mup"
    rule: str = "mup"
    logits_divided_by_m: bool = False
    depth_rule: bool = False
    embedding_exponent: float = 0.0
    hidden_exponent: float | None = None
    unembedding_exponent: float | None = None
    optimizer: str = "adamw"
    lr: float = 2.0**-6
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    decay: float = 0.0
    decay_mode: str = "coupled"
    decay_exponent: float = 0.0
    extra_warmup: str = "none"
    extra_warmup_steps: int = 0
    extra_warmup_on_all: bool = False
    batch_ratio: float = 1.0
    horizon_ratio: float = 1.0
    horizon_rule: str = "none"
    clip: float = 1.0
    steps: int = 20
    warmup: int = 5
    curve: str = "linear"

    @property
    def m(self) -> float:
        """The width multiplier M / P."""
        return self.width / self.base_width

    @property
    def heads(self) -> int:
        """Query heads, H = M / D."""
        return self.width // self.head_dim

    @property
    def ffn(self) -> int:
        """FFN width, an integer part as in L's int(2.67 M)."""
        return int(self.ffn_multiple * self.width)

    @property
    def branch(self) -> float:
        """Residual branch multiplier: CompleteP's (L / L_base)^-1 (arXiv:2505.01618), else 1."""
        return (self.layers / self.base_layers) ** -1 if self.depth_rule else 1.0


@dataclass(frozen=True)
class TensorRule:
    """Peak LR, decay a step at s(t) = 1, eps, and whether the extra warmup multiplies the LR."""

    lr: float
    decay_a_step: float
    eps: float
    extra_warmup: bool


def tensor_shapes(study: Study) -> dict[str, tuple[int, ...]]:
    """Return the shape of every tensor, in L's layout, the layer axis first."""
    M, D, H, L = study.width, study.head_dim, study.heads, study.layers
    F, V, G = study.ffn, study.vocabulary, study.kv_heads or study.heads
    rows = 2 * F if study.activation == "swiglu" else F
    shapes: dict[str, tuple[int, ...]] = {
        "w_e": (V, M),
        "w_aq": (L, M, H, D),
        "w_ak": (L, M, G, D),
        "w_av": (L, M, G, D),
        "w_ao": (L, H, D, M),
        "w_fi": (L, M, rows),
        "w_fo": (L, F, M),
    }
    if not study.tied:
        shapes["w_u"] = (M, V)
    if study.gains != "none":
        gain = (M,) if study.gains == "vector" else (1,)
        shapes |= {"g_a": (L, *gain), "g_f": (L, *gain), "g_u": gain}
        if study.embedding_norm:
            shapes["g_e"] = gain
    if study.biases:
        shapes |= {"b_aq": (L, H, D), "b_ak": (L, G, D), "b_av": (L, G, D), "b_ao": (L, M)}
        shapes |= {"b_fi": (L, rows), "b_fo": (L, M), "b_u": (V,)}
    return shapes


def initial_std(study: Study, name: str) -> float:
    """Return the standard deviation of L's Table 2; gains and biases are constants, so 0."""
    M = study.width
    if name.startswith(("b_", "g_")) or (name == "w_aq" and study.q_init == "zero"):
        return 0.0
    if name == "w_u":
        std = {"mup": 1 / M, "sp": M**-0.5, "zero": 0.0}[study.u_init]
        return std * study.m if study.logits_divided_by_m else std
    variance = {"w_e": 1.0, "w_ao": 1 / (study.heads * study.head_dim), "w_fo": 1 / study.ffn}
    return math.sqrt(variance.get(name, 1 / M))


def logit_multiplier(study: Study) -> float:
    """Return the factor of the logits: 1, or Megatron's 1/m in the multiplier form.

    A tied muP model's is 1/M, the untied readout's std over the embedding's (ours).
    """
    if study.tied and study.rule != "sp":
        return 1 / study.width
    return 1 / study.m if study.logits_divided_by_m else 1.0


def forward_multiplier(study: Study, name: str) -> float:
    """Return what multiplies the scores (w_aq), a branch (w_ao, w_fo) or the logits (w_u)."""
    if name == "w_aq":
        return float(study.head_dim**-study.score_exponent)
    if name in {"w_ao", "w_fo"}:
        return study.branch
    return logit_multiplier(study) if name == "w_u" else 1.0


def lr_factor(study: Study, name: str) -> float:
    """Return LR / alpha before any depth or horizon rule.

    w_fo's factor is P/M under the relative rule whatever F is; the absolute rule divides it by the
    multiple times M, not by F's integer part (L's code).
    """
    if name == "w_e":
        return study.m**study.embedding_exponent
    if name == "w_u" and study.unembedding_exponent is not None:
        return study.m**study.unembedding_exponent
    if name in HIDDEN and study.hidden_exponent is not None:
        return study.m**study.hidden_exponent
    if study.rule == "sp" or name not in DIVIDED:
        return 1.0
    if study.rule == "abs_mup":
        return 1 / (study.ffn_multiple * study.width if name == "w_fo" else study.width)
    return study.base_width / study.width


def horizon_factor(study: Study) -> float:
    """Return what the LR is multiplied by: batch m_B and token horizon m_D as ratios to the base.

    Source: Complete(d)P, arXiv:2512.22382, sqrt(m_B / m_D); or D^-0.32, arXiv:2409.19913.
    """
    if study.horizon_rule == "complete_d_p":
        return math.sqrt(study.batch_ratio / study.horizon_ratio)
    return float(study.horizon_ratio**-0.32) if study.horizon_rule == "token_power" else 1.0


def tensor_rule(study: Study, name: str) -> TensorRule:
    """Return what one tensor trains with."""
    factor = lr_factor(study, name)
    eps, decay = study.eps, study.decay
    if name in DIVIDED:
        decay *= study.m**study.decay_exponent
    if name in HIDDEN and study.depth_rule:
        eps /= study.m * study.layers / study.base_layers
    if study.horizon_rule == "complete_d_p":
        eps /= horizon_factor(study)
        decay *= horizon_factor(study)
    peak = study.lr * horizon_factor(study)
    per_step = {"coupled": peak * factor, "constant_product": peak, "independent": 1.0}
    if study.horizon_rule == "complete_d_p":
        # A coupled step then removes m_B / m_D times as much; an independent one does too (ours).
        per_step["independent"] = horizon_factor(study)
    decay_a_step = decay * per_step[study.decay_mode]
    extra = study.extra_warmup_on_all or name in DIVIDED
    if name == "w_u" and study.logits_divided_by_m:
        # W = m W': its gradient is 1/m of that of W', so LR and eps convert and decay is the same.
        return TensorRule(peak * factor * study.m, decay_a_step, eps / study.m, extra)
    return TensorRule(peak * factor, decay_a_step, eps, extra)


def betas(study: Study) -> tuple[float, float]:
    """Return the betas: (1 - beta) times m_B / m_D under Complete(d)P (arXiv:2512.22382)."""
    if study.horizon_rule != "complete_d_p":
        return study.betas
    ratio = study.batch_ratio / study.horizon_ratio
    return 1 - (1 - study.betas[0]) * ratio, 1 - (1 - study.betas[1]) * ratio
