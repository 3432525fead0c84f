"""A GPT in plain PyTorch: a function of named tensors, one attention matrix, no module.

Owns the forward pass of arXiv:2404.05728 (pre-norm, RMSNorm, rotate-half RoPE of base 10000, ReLU
and kin, grouped key/value heads) and its options. It must not import the package.
Shapes: B rows, T positions, M width, H heads, D head dim, V entries of the vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from tests.reference.rules import Study, logit_multiplier

Weights = dict[str, Tensor]


def _normalized(hidden_BTM: Tensor, gain: Tensor | None, eps: float) -> Tensor:
    """RMSNorm, with or without a gain (a vector or one scalar)."""
    spread = hidden_BTM.square().mean(-1, keepdim=True)
    normal = hidden_BTM / torch.sqrt(spread + eps)
    return normal if gain is None else normal * gain


def _rotated(heads_BTHD: Tensor) -> Tensor:
    """Rotate the first half of every head against its second half, by position."""
    length, dim = heads_BTHD.shape[1], heads_BTHD.shape[3]
    exponents = torch.arange(dim // 2, dtype=heads_BTHD.dtype) * 2 / dim
    angles = torch.arange(length, dtype=heads_BTHD.dtype)[:, None] * 10000.0 ** -exponents[None, :]
    cos, sin = angles.cos()[None, :, None, :], angles.sin()[None, :, None, :]
    first, second = heads_BTHD[..., : dim // 2], heads_BTHD[..., dim // 2 :]
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def _attention(study: Study, layer: dict[str, Tensor], x_BTM: Tensor) -> Tensor:
    """Causal attention, scores times D^-score_exponent."""
    heads = {}
    for kind in "qkv":
        heads[kind] = torch.einsum("btm,mhd->bthd", x_BTM, layer[f"w_a{kind}"])
        if study.biases:
            heads[kind] = heads[kind] + layer[f"b_a{kind}"]
    query, key, value = _rotated(heads["q"]), _rotated(heads["k"]), heads["v"]
    sharing = study.heads // key.shape[2]
    key, value = (kv.repeat_interleave(sharing, dim=2) for kv in (key, value))
    scores = torch.einsum("bthd,bshd->bhts", query, key) * study.head_dim**-study.score_exponent
    future = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
    weights = scores.masked_fill(future, -torch.inf).softmax(-1)
    mixed = torch.einsum("bhts,bshd->bthd", weights, value)
    out = torch.einsum("bthd,hdm->btm", mixed, layer["w_ao"])
    return out + layer["b_ao"] if study.biases else out


def _feed_forward(study: Study, layer: dict[str, Tensor], x_BTM: Tensor) -> Tensor:
    """ReLU, squared ReLU, or SwiGLU whose gate columns come first."""
    inner = x_BTM @ layer["w_fi"]
    if study.biases:
        inner = inner + layer["b_fi"]
    if study.activation == "swiglu":
        gate, up = inner.chunk(2, dim=-1)
        inner = functional.silu(gate) * up
    else:
        inner = inner.relu()
        inner = inner.square() if study.activation == "sqrelu" else inner
    out = inner @ layer["w_fo"]
    return out + layer["b_fo"] if study.biases else out


def logits(study: Study, weights: Weights, tokens_BT: Tensor) -> Tensor:
    """Return the logits [B, T, V] of integer tokens [B, T]."""

    def norm(x: Tensor, gain: Tensor | None) -> Tensor:
        return _normalized(x, gain, study.norm_eps)

    stream = weights["w_e"][tokens_BT]
    if study.embedding_norm:
        stream = norm(stream, weights.get("g_e"))
    stacked = [n for n in weights if n not in {"w_e", "w_u", "b_u", "g_e", "g_u"}]
    for index in range(study.layers):
        layer = {name: weights[name][index] for name in stacked}
        stream = stream + study.branch * _attention(study, layer, norm(stream, layer.get("g_a")))
        stream = stream + study.branch * _feed_forward(study, layer, norm(stream, layer.get("g_f")))
    readout = weights["w_e"].T if study.tied else weights["w_u"]
    result = norm(stream, weights.get("g_u")) @ readout * logit_multiplier(study)
    return result + weights["b_u"] if study.biases else result
