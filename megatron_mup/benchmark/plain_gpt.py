"""A GPT in plain PyTorch: the yardstick for what Megatron-Core and muP cost.

The same function as the package's GPT with multipliers of 1 (pre-norm, gain-less RMSNorm, RoPE, no
biases), written as one would without Megatron: batch-first, ``nn.Linear``, fused attention, rotary
angles computed once. Shape suffixes: B batch, S sequence, M hidden, H heads, D head dim, V vocab.
"""

from __future__ import annotations

import torch
import torch.nn.functional as functional
from torch import Tensor, nn

from megatron_mup.config import Activation, ModelConfig
from megatron_mup.errors import ConfigError
from megatron_mup.parameterization.roles import NormGain


def rotary_tables(model: ModelConfig) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the rotary angles, each [S, D], both halves of D alike."""
    exponents = torch.arange(0, model.head_dim, 2, dtype=torch.float32) / model.head_dim
    angles = torch.outer(torch.arange(model.seq_length).float(), 1.0 / model.rotary_base**exponents)
    # Megatron's layout (rotary_interleaved=False): element i turns with element i + D/2.
    both_halves = torch.cat((angles, angles), dim=-1)
    return both_halves.cos(), both_halves.sin()


def _rotate(x_BHSD: Tensor, cos_SD: Tensor, sin_SD: Tensor) -> Tensor:
    first, second = x_BHSD.chunk(2, dim=-1)
    return x_BHSD * cos_SD + torch.cat((-second, first), dim=-1) * sin_SD


class PlainBlock(nn.Module):
    """Attention and FFN, each behind a norm and added to the residual stream."""

    def __init__(self, model: ModelConfig) -> None:
        super().__init__()
        self.heads = model.num_attention_heads
        self.norm_epsilon = model.norm_epsilon
        attention_width = self.heads * model.head_dim
        # All queries, then keys, then values; Megatron interleaves them by query group.
        self.qkv = nn.Linear(model.hidden_size, 3 * attention_width, bias=False)
        self.attention_out = nn.Linear(attention_width, model.hidden_size, bias=False)
        self.ffn_in = nn.Linear(model.hidden_size, model.ffn_width, bias=False)
        self.ffn_out = nn.Linear(model.ffn_width, model.hidden_size, bias=False)

    def forward(self, x_BSM: Tensor, cos_SD: Tensor, sin_SD: Tensor) -> Tensor:
        """One layer; [B, S, M] to [B, S, M]."""
        normed = functional.rms_norm(x_BSM, x_BSM.shape[-1:], eps=self.norm_epsilon)
        x_BSM = x_BSM + self.attention_out(self._attend(normed, cos_SD, sin_SD))
        normed = functional.rms_norm(x_BSM, x_BSM.shape[-1:], eps=self.norm_epsilon)
        branch: Tensor = self.ffn_out(functional.gelu(self.ffn_in(normed)))
        return x_BSM + branch

    def _attend(self, x_BSM: Tensor, cos_SD: Tensor, sin_SD: Tensor) -> Tensor:
        batch, sequence, _ = x_BSM.shape
        query, key, value = (
            part.view(batch, sequence, self.heads, -1).transpose(1, 2)
            for part in self.qkv(x_BSM).chunk(3, dim=-1)
        )
        context_BHSD = functional.scaled_dot_product_attention(
            _rotate(query, cos_SD, sin_SD), _rotate(key, cos_SD, sin_SD), value, is_causal=True
        )
        return context_BHSD.transpose(1, 2).reshape(batch, sequence, -1)


class PlainGPT(nn.Module):
    """The whole model, with the mean cross entropy as output.

    Args:
        model: architecture; query groups other than heads, biases, gains, partial rotation and
            activations other than GELU are not written here.

    Raises:
        ConfigError: the architecture has one of those.
    """

    def __init__(self, model: ModelConfig) -> None:
        super().__init__()
        require_plain(model)
        self.norm_epsilon = model.norm_epsilon
        self.embedding = nn.Embedding(model.padded_vocab_size, model.hidden_size)
        self.blocks = nn.ModuleList(PlainBlock(model) for _ in range(model.num_layers))
        self.output = nn.Linear(model.hidden_size, model.padded_vocab_size, bias=False)
        if not model.untie_embeddings_and_output_weights:
            self.output.weight = self.embedding.weight
        cos_SD, sin_SD = rotary_tables(model)
        # Buffers rather than attributes, so that they move with the model.
        self.register_buffer("cos_SD", cos_SD)
        self.register_buffer("sin_SD", sin_SD)

    def forward(self, tokens_BS: Tensor, labels_BS: Tensor) -> Tensor:
        """Mean token loss of a batch (scalar)."""
        x_BSM = self.embedding(tokens_BS)
        for block in self.blocks:
            x_BSM = block(x_BSM, self.cos_SD, self.sin_SD)
        x_BSM = functional.rms_norm(x_BSM, x_BSM.shape[-1:], eps=self.norm_epsilon)
        logits_BSV = self.output(x_BSM)
        return functional.cross_entropy(logits_BSV.flatten(0, 1), labels_BS.flatten())


def require_plain(model: ModelConfig) -> None:
    """Refuse what this file does not compute.

    Args:
        model: architecture.

    Raises:
        ConfigError: see ``PlainGPT``.
    """
    refused = {
        f"num_query_groups {model.query_groups}": model.query_groups != model.num_attention_heads,
        f"activation {model.activation}": model.activation is not Activation.GELU,
        f"norm_gain {model.norm_gain}": model.norm_gain is not NormGain.NONE,
        f"rotary_percent {model.rotary_percent}": model.rotary_percent != 1.0,
        "add_bias_linear": model.add_bias_linear,
    }
    found = [name for name, present in refused.items() if present]
    if found:
        raise ConfigError(
            f"the plain PyTorch GPT of the benchmark has no {', '.join(found)}; compare a model "
            "with GELU, full RoPE, one query group per head, no biases and no gains"
        )
