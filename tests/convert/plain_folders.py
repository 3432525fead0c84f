"""Hugging Face folders made by transformers itself, and ways to spoil them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import GraniteConfig, GraniteForCausalLM, LlamaConfig, LlamaForCausalLM

from megatron_mup.config import ModelConfig
from megatron_mup.convert.formats import HfFormat, hf_name, stored_model, stored_multipliers
from megatron_mup.convert.rescaling import RescaledWeights
from megatron_mup.convert.weights import WeightSource
from megatron_mup.parameterization.evaluation import Multipliers
from megatron_mup.parameterization.roles import logical_tensors

EditTensors = Callable[[dict[str, Tensor]], None]


def save_folder(
    source: WeightSource,
    folder: Path,
    hf_format: HfFormat = HfFormat.GRANITE,
    *,
    dtype: torch.dtype = torch.float32,
    edit: EditTensors | None = None,
) -> RescaledWeights:
    """Save a source through transformers' ``save_pretrained``.

    Args:
        source: of a model that the format can hold.
        folder: where to.
        hf_format: llama or granite.
        dtype: of the files.
        edit: changes the tensors (fp32, by their names in transformers) before they are saved.

    Returns:
        What the files were cast from.
    """
    exported = RescaledWeights(
        source,
        stored_model(hf_format, source.model),
        stored_multipliers(hf_format, source.model, source.multipliers),
    )
    tensors = {
        hf_name(tensor): exported.read(tensor.name)
        for tensor in logical_tensors(exported.model.shape)
    }
    if edit is not None:
        edit(tensors)
    granite = hf_format is HfFormat.GRANITE
    options = _options(source.model)
    model: Any = (
        GraniteForCausalLM(GraniteConfig(**options, **_multipliers(source.multipliers)))
        if granite
        else LlamaForCausalLM(LlamaConfig(**options))
    )
    tied = options["tie_word_embeddings"]
    missing = model.load_state_dict(tensors, strict=False).missing_keys
    assert missing == (["lm_head.weight"] if tied else [])
    model.to(dtype).save_pretrained(folder)
    return exported


def edit_config(folder: Path, **changes: Any) -> None:
    """Change entries of config.json."""
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def _options(model: ModelConfig) -> dict[str, Any]:
    return {
        "vocab_size": model.padded_vocab_size,
        "hidden_size": model.hidden_size,
        "intermediate_size": model.ffn_width,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_attention_heads,
        "num_key_value_heads": model.query_groups,
        "head_dim": model.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": model.seq_length,
        "rms_norm_eps": model.norm_epsilon,
        "tie_word_embeddings": not model.untie_embeddings_and_output_weights,
        "rope_parameters": {"rope_type": "default", "rope_theta": float(model.rotary_base)},
        "attention_bias": model.add_bias_linear,
        "mlp_bias": model.add_bias_linear,
    }


def _multipliers(multipliers: Multipliers) -> dict[str, float]:
    return {
        "embedding_multiplier": multipliers.embedding,
        "attention_multiplier": multipliers.attention,
        "residual_multiplier": multipliers.residual,
        "logits_scaling": 1.0 / multipliers.logit,
    }
