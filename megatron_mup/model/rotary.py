"""Rotary position embedding with cosines and sines computed once instead of in every layer.

Upstream's unfused rotation (``rope_utils._apply_rotary_pos_emb_bshd``, megatron-core 0.19.2) takes
cosine and sine of the same angles for the query and the key of every layer in every step, and makes
four temporary copies of its input. This one computes the same function, bit for bit in fp32, with
one output and one temporary half. Owns no parameters, so names and checkpoints do not change. Shape
suffixes: S sequence, B batch, H heads, D head dim, R rotated part of D.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.transformer.attention import SelfAttention
from torch import Tensor


class _Rotate(torch.autograd.Function):
    """Rotation by given angles; its derivative is the rotation by the opposite angles."""

    @staticmethod
    def forward(ctx: Any, x_SBHD: Tensor, cos_S11R: Tensor, sin_S11R: Tensor) -> Tensor:
        ctx.save_for_backward(cos_S11R, sin_S11R)
        return _rotated(x_SBHD, cos_S11R, sin_S11R, direction=1)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        cos_S11R, sin_S11R = ctx.saved_tensors
        return _rotated(gradients[0], cos_S11R, sin_S11R, direction=-1), None, None


def _rotated(x_SBHD: Tensor, cos_S11R: Tensor, sin_S11R: Tensor, *, direction: int) -> Tensor:
    """``x * cos + direction * rotate_half(x) * sin`` on the first R elements of each head."""
    width = cos_S11R.shape[-1]
    half = width // 2
    if width == x_SBHD.shape[-1]:
        out_SBHD = rotated = x_SBHD * cos_S11R
    else:
        out_SBHD = x_SBHD.clone()
        rotated = out_SBHD[..., :width].mul_(cos_S11R)
    first, second = x_SBHD[..., :half], x_SBHD[..., half:width]
    # Not addcmul_: it rounds once where upstream rounds twice.
    rotated[..., :half].sub_(second * sin_S11R[..., :half], alpha=direction)
    rotated[..., half:].add_(first * sin_S11R[..., half:], alpha=direction)
    return out_SBHD


def rotate(x_SBHD: Tensor, cos_S11R: Tensor, sin_S11R: Tensor) -> Tensor:
    """Rotate queries or keys by their positions' angles.

    Args:
        x_SBHD: queries or keys [S, B, H, D]; any strides.
        cos_S11R: cosines [S, 1, 1, R] in x's dtype, both halves of R alike; R <= D, even.
        sin_S11R: sines, likewise.

    Returns:
        Rotated tensor [S, B, H, D]; the last D - R elements of each head pass unchanged.
    """
    return _Rotate.apply(x_SBHD, cos_S11R, sin_S11R)  # type: ignore[no-any-return,no-untyped-call]


class RotaryTables:
    """Cosines and sines of the latest angles, shared by the layers of a stage.

    Upstream's ``RotaryEmbedding`` returns the same tensor for the same sequence length, so its
    identity says whether the tables still hold.
    """

    def __init__(self) -> None:
        self._angles: Tensor | None = None
        self._tables: dict[torch.dtype, tuple[Tensor, Tensor]] = {}

    def cos_sin(self, angles_S11R: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Cosines and sines [S, 1, 1, R] of fp32 angles (radians), rounded to ``dtype``."""
        # Upstream caches the angles per length (lru_cache of RotaryEmbedding.forward, 0.19.2).
        if angles_S11R is not self._angles:
            self._angles, self._tables = angles_S11R, {}
        if dtype not in self._tables:
            self._tables[dtype] = (angles_S11R.cos().to(dtype), angles_S11R.sin().to(dtype))
        return self._tables[dtype]


class CachedRotarySelfAttention(SelfAttention):  # type: ignore[misc]  # untyped upstream base
    """Megatron's self-attention that rotates with shared tables.

    Only the training path differs: with an inference context or packed sequences, whose positions
    do not start at 0, upstream's own rotation runs.

    Args:
        rotary_tables: the stage's tables.
    """

    def __init__(self, *args: Any, rotary_tables: RotaryTables, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.rotary_tables = rotary_tables
        self._angles: Tensor | None = None

    def forward(self, *args: Any, rotary_pos_emb: Any = None, **kwargs: Any) -> Any:
        """Attend; arguments and result are those of ``SelfAttention.forward``.

        Args:
            *args: passed on.
            rotary_pos_emb: angles [S, 1, 1, R], fp32 radians, or what upstream also accepts.
            **kwargs: passed on.
        """
        stock = (
            not isinstance(rotary_pos_emb, Tensor)
            or kwargs.get("inference_context") is not None
            or kwargs.get("packed_seq_params") is not None
        )
        # Upstream rotates only if it is given angles: those kept back here are applied below.
        self._angles = None if stock else rotary_pos_emb
        return super().forward(*args, rotary_pos_emb=rotary_pos_emb if stock else None, **kwargs)

    def get_query_key_value_tensors(self, *args: Any, **kwargs: Any) -> Any:
        """Upstream's query, key and value, the first two already rotated if angles were given."""
        parts = super().get_query_key_value_tensors(*args, **kwargs)
        if self._angles is None:
            return parts
        query_SBHD, key_SBHD, *others = parts
        tables = self.rotary_tables.cos_sin(self._angles, query_SBHD.dtype)
        return (rotate(query_SBHD, *tables), rotate(key_SBHD, *tables), *others)
