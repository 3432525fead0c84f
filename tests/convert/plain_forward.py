"""The model's function in fp64, written from its definition: no module, no name of transformers.

Takes tensors by logical name. Shapes: B rows, T positions, M width, H heads, G key/value heads,
D head dim.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from megatron_mup.config import Activation
from tests.convert.memory_weights import MemoryWeights


class PlainModel:
    """Log-probabilities of a source's model in fp64."""

    def __init__(self, source: MemoryWeights) -> None:
        self.model, self.multipliers = source.model, source.multipliers
        self.tensors = {name: values.double() for name, values in source.tensors.items()}

    def logprobs(self, tokens_BT: Tensor) -> Tensor:
        """Of the next token, [B, T, V]."""
        stream = self.tensors["embedding.word_embeddings.weight"][tokens_BT]
        if self.model.embedding_norm:
            stream = self._norm(stream, "embedding.norm")
        stream = stream * self.multipliers.embedding
        for index in range(self.model.num_layers):
            layer = f"decoder.layers.{index}"
            normal = self._norm(stream, f"{layer}.input_layernorm")
            stream = stream + self.multipliers.residual * self._attention(normal, layer)
            normal = self._norm(stream, f"{layer}.pre_mlp_layernorm")
            stream = stream + self.multipliers.residual * self._ffn(normal, layer)
        final = self._norm(stream, "decoder.final_layernorm") * self.multipliers.logit
        untied = self.model.untie_embeddings_and_output_weights
        readout = "output_layer" if untied else "embedding.word_embeddings"
        return self._linear(final, readout, bias="output_layer.bias").log_softmax(-1)

    def _norm(self, x: Tensor, name: str) -> Tensor:
        x = x / (x.square().mean(-1, keepdim=True) + self.model.norm_epsilon).sqrt()
        return x * self.tensors.get(f"{name}.weight", torch.ones(1))

    def _linear(self, x: Tensor, name: str, part: str = "", *, bias: str | None = None) -> Tensor:
        out = x @ self.tensors[f"{name}.weight{part}"].T
        return out + self.tensors.get(bias or f"{name}.bias{part}", torch.zeros(1))

    def _rotate(self, heads_BTHD: Tensor) -> Tensor:
        width = int(self.model.head_dim * self.model.rotary_percent)
        length, half = heads_BTHD.shape[1], width // 2
        steps = torch.arange(half, dtype=torch.float64) * 2 / width
        positions = torch.arange(length, dtype=torch.float64)
        angles = (positions[:, None] * self.model.rotary_base ** -steps[None])[None, :, None]
        first, second = heads_BTHD[..., :half], heads_BTHD[..., half:width]
        turned = [
            first * angles.cos() - second * angles.sin(),
            second * angles.cos() + first * angles.sin(),
        ]
        return torch.cat([*turned, heads_BTHD[..., width:]], dim=-1)

    def _attention(self, x_BTM: Tensor, layer: str) -> Tensor:
        rows, length, _ = x_BTM.shape
        qkv = f"{layer}.self_attention.linear_qkv"
        query, key, value = (
            self._linear(x_BTM, qkv, f".{part}").view(rows, length, -1, self.model.head_dim)
            for part in ("query", "key", "value")
        )
        sharing = query.shape[2] // key.shape[2]
        key, value = (t.repeat_interleave(sharing, dim=2) for t in (self._rotate(key), value))
        scores = torch.einsum("bthd,bshd->bhts", self._rotate(query), key)
        future = torch.ones(length, length, dtype=torch.bool).triu(1)
        scores = (scores * self.multipliers.attention).masked_fill(future, -torch.inf)
        mixed = torch.einsum("bhts,bshd->bthd", scores.softmax(-1), value)
        return self._linear(mixed.flatten(2), f"{layer}.self_attention.linear_proj")

    def _ffn(self, x: Tensor, layer: str) -> Tensor:
        name = f"{layer}.mlp.linear_fc1"
        if self.model.activation is Activation.SWIGLU:
            inner = functional.silu(self._linear(x, name, ".gate")) * self._linear(x, name, ".up")
        else:
            inner = self._linear(x, name)
            inner = {
                Activation.RELU: torch.relu,
                Activation.SQUARED_RELU: lambda t: torch.relu(t).square(),
                Activation.GELU: lambda t: t * 0.5 * (1 + torch.erf(t / 2**0.5)),
            }[self.model.activation](inner)
        return self._linear(inner, f"{layer}.mlp.linear_fc2")
