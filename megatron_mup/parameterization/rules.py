"""THE rule table: role -> init, learning rate, eps and their powers of width and depth, as data.

``evaluation`` turns these exponents into the numbers of one model; nothing else computes a number
that depends on width, depth or parameterization.

Notation: M hidden size, P base hidden size, m = M / P, F FFN width, L layers, l = L / base L,
alpha = base peak LR, r = a tensor's size ratio to its base.
Sources: L = arXiv:2404.05728 (Table 2 and its code), TP5 = arXiv:2203.03466,
C = arXiv:2505.01618 (CompleteP), S = arXiv:2310.17813, "ours" = derived in
docs/parameterization.md; ``sources`` says in words which of them a row follows. Must not import
torch or megatron.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from megatron_mup.parameterization.options import (
    AttentionScale,
    Parameterization,
    Ratio,
    UnembeddingInit,
)
from megatron_mup.parameterization.roles import Role


@dataclass(frozen=True, kw_only=True)
class Rule:
    """One row: LR = alpha * r ** lr_exponent, eps = e * r ** eps_exponent; r: the named ratio.

    ``citation`` names where the rule was published and ``published_ratio`` the ratio used there;
    where ``ratio`` is another one, that choice is ours. A row with ``depth_rule`` also multiplies
    the LR by l ** (a - 1), and eps, if it has a width exponent, by l ** -a, with a the residual
    depth exponent.
    """

    ratio: Ratio
    lr_exponent: float
    citation: str
    published_ratio: Ratio
    eps_exponent: float = 0.0
    depth_rule: bool = False


def _flat(citation: str) -> Rule:
    """LR alpha at every size."""
    return Rule(ratio=Ratio.NONE, lr_exponent=0.0, citation=citation, published_ratio=Ratio.NONE)


def _complete(rule: Rule) -> Rule:
    """CompleteP's version of a muP row inside the layers; hidden matrices also scale eps."""
    eps_exponent = 0.0 if rule.ratio is Ratio.NONE else -1.0
    return replace(rule, citation=_COMPLETE, eps_exponent=eps_exponent, depth_rule=True)


def _inverse(ratio: Ratio, citation: str, *, published: Ratio = Ratio.WIDTH) -> Rule:
    """LR alpha / r."""
    return Rule(ratio=ratio, lr_exponent=-1.0, citation=citation, published_ratio=published)


_TABLE, _ABSOLUTE = "arXiv:2404.05728 Table 2", "arXiv:2404.05728 absolute rule"
_COMPLETE = "arXiv:2505.01618"
VECTOR_LIKE = (Role.EMBEDDING, Role.GAIN, Role.BIAS)
"""Roles whose learning rate muP leaves alone."""
_READS_WIDTH = (Role.QUERY, Role.KEY, Role.VALUE, Role.FFN_IN, Role.UNEMBEDDING)
"""Roles whose fan-in is M in every model, so that the width and the fan-in ratio are one."""

HIDDEN = tuple(role for role in Role if role not in (*VECTOR_LIKE, Role.UNEMBEDDING))
"""Hidden matrices. Muon orthogonalizes their updates; AdamW trains the others, by the rules."""

DIVIDED = (*HIDDEN, Role.UNEMBEDDING)
"""Roles whose learning rate muP divides by a width ratio."""

RULES: dict[Parameterization, dict[Role, Rule]] = {
    Parameterization.SP: dict.fromkeys(Role, _flat("arXiv:2404.05728 sp")),
    Parameterization.MUP: {
        **dict.fromkeys(VECTOR_LIKE, _flat(_TABLE)),
        **dict.fromkeys(_READS_WIDTH, _inverse(Ratio.WIDTH, _TABLE)),
        # H D and F need not grow in step with M. What keeps an activation's change constant is the
        # number of terms in its sum (TP5), so we divide by their own ratios where L takes M / P.
        Role.ATTENTION_OUT: _inverse(Ratio.FAN_IN, _TABLE),
        Role.FFN_OUT: _inverse(Ratio.FAN_IN, _TABLE),
    },
    # The absolute rule is the relative one with every base size equal to 1.
    Parameterization.ABS_MUP: {
        **dict.fromkeys(VECTOR_LIKE, _flat(_ABSOLUTE)),
        **dict.fromkeys(_READS_WIDTH, _inverse(Ratio.WIDTH, _ABSOLUTE)),
        Role.ATTENTION_OUT: _inverse(Ratio.FAN_IN, _ABSOLUTE),
        # Unlike in its relative rule, L divides by F here.
        Role.FFN_OUT: _inverse(Ratio.FAN_IN, _ABSOLUTE, published=Ratio.FAN_IN),
    },
}

RULES[Parameterization.COMPLETEP] = {
    **RULES[Parameterization.MUP],
    **{
        role: _complete(RULES[Parameterization.MUP][role])
        for role in (*HIDDEN, Role.GAIN, Role.BIAS)
    },
}

# The update is semi-orthogonal times sqrt(fan_out / fan_in), Megatron's unit_rms_norm: its spectral
# norm is what S asks of a change of W at every width, so no ratio is left for the LR.
_SPECTRAL = dict.fromkeys(HIDDEN, _flat("arXiv:2310.17813 Condition 1, orthogonalized update"))

MUON_RULES = {name: {**rules, **_SPECTRAL} for name, rules in RULES.items()}
MUON_RULES[Parameterization.SP] = RULES[Parameterization.SP]
MUON_RULES[Parameterization.COMPLETEP] |= {
    role: replace(rule, depth_rule=True) for role, rule in _SPECTRAL.items()
}

INIT_EXPONENT = -0.5
"""std ~ fan_in^-1/2 for hidden matrices (variance 1/fan_in), L Table 2."""

UNEMBEDDING_EXPONENT = {UnembeddingInit.MUP: -1.0, UnembeddingInit.SP: -0.5}
"""std ~ M^exponent for the unembedding (variance 1/M^2 or 1/M), L Table 2 and u_init."""

DEFAULT_UNEMBEDDING_INIT = {
    Parameterization.SP: UnembeddingInit.SP,
    Parameterization.MUP: UnembeddingInit.MUP,
    Parameterization.ABS_MUP: UnembeddingInit.MUP,
    Parameterization.COMPLETEP: UnembeddingInit.MUP,
}
DEFAULT_ATTENTION_SCALE = {
    Parameterization.SP: AttentionScale.INVERSE_SQRT,
    Parameterization.MUP: AttentionScale.INVERSE,
    Parameterization.ABS_MUP: AttentionScale.INVERSE,
    Parameterization.COMPLETEP: AttentionScale.INVERSE,
}
DEFAULT_DEPTH_EXPONENT = {
    Parameterization.SP: 0.0,
    Parameterization.MUP: 0.0,
    Parameterization.ABS_MUP: 0.0,
    Parameterization.COMPLETEP: 1.0,
}
"""a: residual branches are multiplied by l ** -a. 1 is C's, the one that needs no LR for depth."""
