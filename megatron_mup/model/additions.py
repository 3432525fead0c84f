"""Parts of the paper's architectures that GPTModel (0.19.2) does not build: added to a built model.

Must run before hooks, initialization and DDP, so that the new parameters are like any others.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core import tensor_parallel
from torch import Tensor

from megatron_mup.model.layer_specs import RMSNorm
from megatron_mup.parameterization.roles import NormGain


def add_unembedding_bias(gpt: torch.nn.Module) -> None:
    """Give the readout a bias [V / TP], split over tensor-parallel ranks as the logits are.

    GPTModel builds its readout without one, but the layer adds, saves and shards whatever
    ``bias`` it has. The logit multiplier acts on the layer's input, so the bias stays outside.

    Args:
        gpt: a GPTModel; stages without a readout are left alone.
    """
    readout: Any = getattr(gpt, "output_layer", None)
    if readout is None:
        return
    dtype = readout.config.params_dtype
    like = readout.weight if readout.weight is not None else next(gpt.parameters())
    bias = torch.nn.Parameter(
        torch.zeros(readout.output_size_per_partition, dtype=dtype, device=like.device)
    )
    tensor_parallel.set_tensor_model_parallel_attributes(bias, True, 0, 1)
    readout.bias = bias


def add_embedding_norm(gpt: torch.nn.Module, *, gain: NormGain) -> None:
    """Normalize the embedding's output [S, B, M].

    Args:
        gpt: a GPTModel; stages without an embedding are left alone.
        gain: which gain is learned; epsilon is that of the layers' norms.
    """
    embedding: Any = getattr(gpt, "embedding", None)
    if embedding is None:
        return
    config = embedding.config
    embedding.norm = RMSNorm(config, config.hidden_size, config.layernorm_epsilon, gain=gain)

    def normalize(module: Any, _inputs: Any, output_SBM: Tensor) -> Any:
        return module.norm(output_SBM)

    embedding.register_forward_hook(normalize)
