"""A GPT that was trained with megatron_mup, for transformers 5 (``trust_remote_code=True``).

The decoder is Llama's, with more kinds of norm, nonlinearity and bias, and with the four forward
multipliers of muP, which are part of the function that the weights were trained for:

    x = embedding_multiplier * norm(embed(tokens))     the norm only where config.embedding_norm
    x = x + residual_multiplier * attention(norm(x))   softmax of attention_multiplier * q.k
    x = x + residual_multiplier * mlp(norm(x))
    logits = lm_head(logit_multiplier * norm(x))

Shape suffixes: B batch, S positions, M hidden size, H heads, D head dim, R rotated part of D,
V vocabulary.
"""

from typing import Any

import torch
import torch.nn.functional as functional
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache, DynamicCache
from transformers.generation import GenerationMixin
from transformers.masking_utils import create_causal_mask
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import can_return_tuple

from .configuration_megatron_mup import MegatronMupConfig


class MegatronMupRMSNorm(nn.Module):
    """RMSNorm with a vector gain, one scalar gain, or none."""

    def __init__(self, config: MegatronMupConfig) -> None:
        super().__init__()
        self.eps, self.hidden_size = config.rms_norm_eps, config.hidden_size
        size = {"none": None, "scalar": 1, "vector": config.hidden_size}[config.norm_gain]
        self.weight = None if size is None else nn.Parameter(torch.ones(size))

    def forward(self, hidden_BSM: Tensor) -> Tensor:
        """Normalize over M."""
        if self.weight is not None and self.weight.numel() == self.hidden_size:
            return functional.rms_norm(hidden_BSM, (self.hidden_size,), self.weight, self.eps)
        normed_BSM = functional.rms_norm(hidden_BSM, (self.hidden_size,), None, self.eps)
        return normed_BSM if self.weight is None else normed_BSM * self.weight


def rotary_tables(
    config: MegatronMupConfig, positions_BS: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Cosines and sines [B, 1, S, R] of the rotary angles; R is at most D."""
    width = int(config.head_dim * config.partial_rotary_factor)
    pairs = torch.arange(0, width, 2, dtype=torch.float32, device=positions_BS.device)
    frequencies = 1.0 / config.rope_theta ** (pairs / width)
    # In fp32 whatever the model's dtype, as in training.
    angles = positions_BS[:, None, :, None].float() * frequencies
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(x_BHSD: Tensor, cos_B1SR: Tensor, sin_B1SR: Tensor) -> Tensor:
    """Rotate the first R elements of each head, the first half against the second."""
    width = cos_B1SR.shape[-1]
    turned, kept = x_BHSD[..., :width], x_BHSD[..., width:]
    first, second = turned.chunk(2, dim=-1)
    turned = turned * cos_B1SR + torch.cat((-second, first), dim=-1) * sin_B1SR
    return torch.cat((turned, kept), dim=-1)


def eager_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float,
    **unused: Any,
) -> tuple[Tensor, Tensor]:
    """Attention in plain operations; the signature is that of transformers' interface."""
    groups = query.shape[1] // key.shape[1]
    key, value = (part.repeat_interleave(groups, dim=1) for part in (key, value))
    scores = query @ key.transpose(2, 3) * scaling
    if attention_mask is not None:
        scores = scores + attention_mask
    accurate = torch.promote_types(query.dtype, torch.float32)
    weights = scores.softmax(dim=-1, dtype=accurate).to(query.dtype)
    return (weights @ value).transpose(1, 2).contiguous(), weights


class MegatronMupAttention(nn.Module):
    """Causal self-attention with rotary positions and the configured scale."""

    def __init__(self, config: MegatronMupConfig, layer_idx: int) -> None:
        super().__init__()
        if config.attention_multiplier is None:
            raise ValueError("config.json has no attention_multiplier, which scales the scores")
        self.config, self.layer_idx, self.is_causal = config, layer_idx, True
        self.head_dim, self.scaling = config.head_dim, config.attention_multiplier
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        query_width = config.num_attention_heads * config.head_dim
        key_width = config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, query_width, bias=config.use_bias)
        self.k_proj = nn.Linear(config.hidden_size, key_width, bias=config.use_bias)
        self.v_proj = nn.Linear(config.hidden_size, key_width, bias=config.use_bias)
        self.o_proj = nn.Linear(query_width, config.hidden_size, bias=config.use_bias)

    def forward(
        self,
        hidden_BSM: Tensor,
        tables: tuple[Tensor, Tensor],
        attention_mask: Tensor | None,
        past_key_values: Cache | None,
        **options: Any,
    ) -> Tensor:
        """Attend to these positions and to the cached ones before them; returns [B, S, M]."""
        batch, length, _ = hidden_BSM.shape
        query, key, value = (
            projection(hidden_BSM).view(batch, length, -1, self.head_dim).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        query, key = rotate(query, *tables), rotate(key, *tables)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        context, _ = attend(
            self, query, key, value, attention_mask, scaling=self.scaling, dropout=0.0, **options
        )
        return self.o_proj(context.reshape(batch, length, -1))


class MegatronMupMLP(nn.Module):
    """Feed-forward layer, with or without a gate."""

    def __init__(self, config: MegatronMupConfig) -> None:
        super().__init__()
        self.gated, self.activation = config.gated, ACT2FN[config.hidden_act]
        outer, inner = config.hidden_size, config.intermediate_size
        if self.gated:
            self.gate_proj = nn.Linear(outer, inner, bias=config.use_bias)
        self.up_proj = nn.Linear(outer, inner, bias=config.use_bias)
        self.down_proj = nn.Linear(inner, outer, bias=config.use_bias)

    def forward(self, hidden_BSM: Tensor) -> Tensor:
        """Map [B, S, M] to [B, S, M]."""
        if self.gated:
            inner = self.activation(self.gate_proj(hidden_BSM)) * self.up_proj(hidden_BSM)
        else:
            inner = self.activation(self.up_proj(hidden_BSM))
        return self.down_proj(inner)


class MegatronMupDecoderLayer(nn.Module):
    """Attention and feed-forward, each behind a norm, each added to the residual stream."""

    def __init__(self, config: MegatronMupConfig, layer_idx: int) -> None:
        super().__init__()
        self.residual_multiplier = config.residual_multiplier
        self.input_layernorm = MegatronMupRMSNorm(config)
        self.self_attn = MegatronMupAttention(config, layer_idx)
        self.post_attention_layernorm = MegatronMupRMSNorm(config)
        self.mlp = MegatronMupMLP(config)

    def forward(self, hidden_BSM: Tensor, **attention: Any) -> Tensor:
        """One layer; ``attention`` is what ``MegatronMupAttention.forward`` takes besides."""
        branch = self.self_attn(self.input_layernorm(hidden_BSM), **attention)
        hidden_BSM = torch.add(hidden_BSM, branch, alpha=self.residual_multiplier)
        branch = self.mlp(self.post_attention_layernorm(hidden_BSM))
        return torch.add(hidden_BSM, branch, alpha=self.residual_multiplier)


class MegatronMupPreTrainedModel(PreTrainedModel):
    """What transformers wants to know about these models."""

    config_class = MegatronMupConfig
    base_model_prefix = "model"
    _no_split_modules = ["MegatronMupDecoderLayer"]  # noqa: RUF012
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True


class MegatronMupModel(MegatronMupPreTrainedModel):
    """The decoder without its readout."""

    def __init__(self, config: MegatronMupConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        if config.embedding_norm:
            self.embed_norm = MegatronMupRMSNorm(config)
        self.layers = nn.ModuleList(
            MegatronMupDecoderLayer(config, index) for index in range(config.num_hidden_layers)
        )
        self.norm = MegatronMupRMSNorm(config)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        *,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        **options: Any,
    ) -> BaseModelOutputWithPast:
        """Run all layers; ``inputs_embeds`` are rows of the embedding, before norm and multiplier.

        Returns:
            The final hidden state [B, S, M], normed; the cache; on request the stream before each
            layer and the final hidden state.
        """
        hidden_BSM = self._embedded(input_ids, inputs_embeds)
        if past_key_values is None and (self.config.use_cache if use_cache is None else use_cache):
            past_key_values = DynamicCache(config=self.config)
        options |= self._shared(hidden_BSM, attention_mask, position_ids, past_key_values)
        streams = []
        for layer in self.layers:
            streams += [hidden_BSM] if output_hidden_states else []
            hidden_BSM = layer(hidden_BSM, past_key_values=past_key_values, **options)
        hidden_BSM = self.norm(hidden_BSM)
        return BaseModelOutputWithPast(
            last_hidden_state=hidden_BSM,
            past_key_values=past_key_values,
            hidden_states=(*streams, hidden_BSM) if output_hidden_states else None,
        )

    def _shared(
        self,
        hidden_BSM: Tensor,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        past_key_values: Cache | None,
    ) -> dict[str, Any]:
        """What every layer is given: positions behind the cached ones, mask and rotary tables."""
        if position_ids is None:
            seen = 0 if past_key_values is None else past_key_values.get_seq_length()
            length = hidden_BSM.shape[1]
            position_ids = (torch.arange(length, device=hidden_BSM.device) + seen)[None]
        mask = create_causal_mask(
            config=self.config,
            inputs_embeds=hidden_BSM,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            position_ids=position_ids,
        )
        tables = rotary_tables(self.config, position_ids, hidden_BSM.dtype)
        return {"attention_mask": mask, "position_ids": position_ids, "tables": tables}

    def _embedded(self, input_ids: Tensor | None, inputs_embeds: Tensor | None) -> Tensor:
        """The residual stream [B, S, M] that the first layer reads."""
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give input_ids or inputs_embeds, and not both")
        hidden_BSM = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        if self.config.embedding_norm:
            hidden_BSM = self.embed_norm(hidden_BSM)
        return hidden_BSM * self.config.embedding_multiplier


class MegatronMupForCausalLM(MegatronMupPreTrainedModel, GenerationMixin):
    """The decoder with its readout."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config: MegatronMupConfig) -> None:
        super().__init__(config)
        self.model = MegatronMupModel(config)
        self.lm_head = nn.Linear(
            config.hidden_size, config.vocab_size, bias=config.unembedding_bias
        )
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        *,
        labels: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        **options: Any,
    ) -> CausalLMOutputWithPast:
        """Logits [B, S, V] of the next tokens, and their loss if there are labels.

        Args:
            input_ids: tokens [B, S].
            attention_mask: [B, S], 0 at padding.
            labels: tokens [B, S], not shifted; -100 is left out.
            logits_to_keep: how many of the last positions get logits, or which; 0 is all.
            **options: as ``MegatronMupModel.forward``.
        """
        outputs = self.model(input_ids, attention_mask, **options)
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        # On the hidden state and not on the logits: a bias stays outside, a tied matrix alone.
        hidden_BSM = outputs.last_hidden_state[:, kept] * self.config.logit_multiplier
        logits_BSV = self.lm_head(hidden_BSM)
        loss = None
        if labels is not None:
            size = self.config.vocab_size
            loss = self.loss_function(logits=logits_BSV, labels=labels, vocab_size=size, **options)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits_BSV,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
        )
