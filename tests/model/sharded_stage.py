"""Modules with the parameter names and shard shapes of one Megatron rank, and nothing else.

They stand for a rank of any layout without starting processes or building a model; every parameter
starts as garbage.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from megatron_mup.parameterization.roles import ModelShape, NormGain


class Layer(torch.nn.Module):
    """One layer's parameters; ``layer_number`` counts from 1 over all stages, as in Megatron."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.layer_number = number


class ShardedStage(torch.nn.Module):
    """Parameters that tensor-parallel rank ``any`` of ``size`` holds of some layers.

    Args:
        shape: global shape.
        size: tensor-parallel size.
        layers: global layer indices from 0.
        embedding: whether the embedding is here.
        readout: whether the readout is here.
    """

    def __init__(
        self,
        shape: ModelShape,
        size: int,
        layers: Sequence[int],
        *,
        embedding: bool = True,
        readout: bool = True,
    ) -> None:
        super().__init__()
        self.share_embeddings_and_output_weights = shape.tied_embeddings
        hidden = shape.hidden_size
        vocabulary = (shape.vocab_size // size, hidden)
        if embedding:
            self._add("embedding.word_embeddings.weight", vocabulary)
        if readout:
            self._add("output_layer.weight", vocabulary)
        for local, index in enumerate(layers):
            self._add_layer(f"decoder.layers.{local}", Layer(index + 1))
            heads = shape.num_attention_heads + 2 * shape.num_query_groups
            qkv = heads * shape.kv_channels // size
            ffn = shape.ffn_hidden_size // size
            fc1 = ffn * (2 if shape.gated_linear_unit else 1)
            for name, size_of in (
                ("self_attention.linear_qkv.weight", (qkv, hidden)),
                ("self_attention.linear_proj.weight", (hidden, shape.attention_width // size)),
                ("mlp.linear_fc1.weight", (fc1, hidden)),
                ("mlp.linear_fc2.weight", (hidden, ffn)),
            ):
                self._add(f"decoder.layers.{local}.{name}", size_of)
            if shape.add_bias_linear:
                self._add(f"decoder.layers.{local}.self_attention.linear_qkv.bias", (qkv,))
                self._add(f"decoder.layers.{local}.mlp.linear_fc1.bias", (fc1,))
            if shape.norm_gain is NormGain.VECTOR:
                self._add(f"decoder.layers.{local}.input_layernorm.weight", (hidden,))

    def _add_layer(self, path: str, layer: Layer) -> None:
        parent, name = path.rsplit(".", 1)
        self._module(parent).add_module(name, layer)

    def _module(self, path: str) -> torch.nn.Module:
        module: torch.nn.Module = self
        for name in path.split("."):
            if name not in module._modules:
                module.add_module(name, torch.nn.Module())
            module = module.get_submodule(name)
        return module

    def _add(self, path: str, size: tuple[int, ...]) -> None:
        parent, name = path.rsplit(".", 1)
        garbage = torch.nn.Parameter(torch.empty(size))
        self._module(parent).register_parameter(name, garbage)
