"""The attention scale that a kernel really uses, and the kernels that really run.

Shape suffixes: S sequence, B batch, H heads, D head dim.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from megatron.core.transformer.enums import AttnMaskType

from megatron_mup.config import ModelConfig

BACKENDS = ("fused_attention", "flash_attention", "unfused_attention")
"""Modules of TransformerEngine's DotProductAttention; the one that is called does the work."""


def observed_scale(
    core: torch.nn.Module, model: ModelConfig, *, expected: float, like: torch.Tensor
) -> float:
    """Scale of the scores, from the output of a core attention on constructed inputs.

    Only the last key and value differ from zero, so that the last query's output is the softmax
    weight p of one score z = scale q.k among S - 1 zeros, and z = log(p (S - 1) / (1 - p)). The key
    is such that p is about one half if the scale is as expected: bf16's rounding of p, at most
    2^-9, is then at most 0.008 of z, which is log(S - 1).

    Args:
        core: called with queries, keys, values [S, B, H, D], mask and mask type.
        model: sizes.
        expected: where the measurement is precise.
        like: a tensor of the device and dtype to use.

    Returns:
        The scale; infinite if p rounds to 1, as it does where the scale is several times too large.
    """
    length, dim = model.seq_length, model.head_dim
    query = like.new_ones(length, 1, model.num_attention_heads, dim)
    key, value = (like.new_zeros(length, 1, model.query_groups, dim) for _ in range(2))
    key[-1] = math.log(length - 1) / (dim * expected)
    value[-1] = 1.0
    with torch.no_grad():
        output = core(query, key, value, None, AttnMaskType.causal)
    weight = float(output[-1].double().mean())
    if weight >= 1.0:
        return math.inf
    score = math.log(weight * (length - 1) / (1.0 - weight))
    return score / (dim * float(key[-1, 0, 0, 0]))


@contextmanager
def backends_called(model: torch.nn.Module) -> Iterator[Counter[str]]:
    """Counts the calls of each attention backend while the context lasts."""
    calls: Counter[str] = Counter()

    def counting(name: str) -> Any:
        return lambda *_: calls.update([name])

    handles = [
        module.register_forward_pre_hook(counting(name.rpartition(".")[2]))
        for name, module in model.named_modules()
        if name.endswith(BACKENDS)
    ]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()
