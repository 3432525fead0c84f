"""config.json <-> ``ModelConfig`` and ``Multipliers``, as transformers 5.23.0 reads it.

Owns every key of that file, in both directions. What this package cannot hold exactly is refused by
its key, never approximated. Reads and writes plain data, not files.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from megatron_mup.config import Activation, ModelConfig
from megatron_mup.convert.formats import ARCHITECTURES, AUTO_MAP, HIDDEN_ACT, HfFormat
from megatron_mup.convert.rescaling import plain_multipliers
from megatron_mup.errors import CheckpointError, ConfigError
from megatron_mup.parameterization.evaluation import Multipliers
from megatron_mup.parameterization.roles import NormGain

_PADDING = 128
"""``make_vocab_size_divisible_by`` of a vocabulary that allows it, Megatron's default."""

_ROPE_KEYS = {"rope_type", "type", "rope_theta", "partial_rotary_factor"}

_UNSUPPORTED = {
    "quantization_config": "the weights are quantized; save them dequantized first",
    "sliding_window": "attention to a window of positions does not exist here",
    "rope_interleaved": "rotary embeddings of interleaved pairs do not exist here",
}
"""Keys that must be absent, null or false."""


def config_dict(
    hf_format: HfFormat,
    model: ModelConfig,
    multipliers: Multipliers,
    dtype: str,
    token_ids: Mapping[str, int | None] | None = None,
) -> dict[str, Any]:
    """The contents of config.json.

    Args:
        hf_format: a format that can hold the model.
        model: the source's architecture.
        multipliers: those under which the weights are stored (``stored_multipliers``).
        dtype: ``float32``, ``bfloat16`` or ``float16``, the weights'.
        token_ids: ``bos_token_id``, ``eos_token_id``, ``pad_token_id``; what is missing is null,
            because the classes' own defaults mean another tokenizer.

    Returns:
        Plain data; every number that has a default in transformers is written out.
    """
    ids: dict[str, int | None] = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    config = {
        "architectures": [ARCHITECTURES[hf_format]],
        "model_type": hf_format.value,
        "dtype": dtype,
        "use_cache": True,
        **_size_fields(model),
        **ids,
        **(token_ids or {}),
    }
    if hf_format is HfFormat.MEGATRON_MUP:
        return config | _own_fields(model, multipliers)
    config |= {
        "rope_parameters": {"rope_type": "default", "rope_theta": float(model.rotary_base)},
        "attention_bias": model.add_bias_linear,
        "mlp_bias": model.add_bias_linear,
        "attention_dropout": 0.0,
    }
    return config | _granite_fields(multipliers) if hf_format is HfFormat.GRANITE else config


def _size_fields(model: ModelConfig) -> dict[str, Any]:
    return {
        # Padding rows are part of the softmax: without them the model is another one.
        "vocab_size": model.padded_vocab_size,
        "hidden_size": model.hidden_size,
        "intermediate_size": model.ffn_width,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_attention_heads,
        "num_key_value_heads": model.query_groups,
        "head_dim": model.head_dim,
        "hidden_act": HIDDEN_ACT[model.activation],
        "max_position_embeddings": model.seq_length,
        "rms_norm_eps": model.norm_epsilon,
        "tie_word_embeddings": not model.untie_embeddings_and_output_weights,
        # transformers 4, vLLM and others read this one and not rope_parameters.
        "rope_theta": float(model.rotary_base),
    }


def _granite_fields(multipliers: Multipliers) -> dict[str, Any]:
    return {
        "embedding_multiplier": multipliers.embedding,
        # Granite's default is 1, not 1/sqrt(D).
        "attention_multiplier": multipliers.attention,
        "residual_multiplier": multipliers.residual,
        # Granite divides.
        "logits_scaling": 1.0 / multipliers.logit,
    }


def _own_fields(model: ModelConfig, multipliers: Multipliers) -> dict[str, Any]:
    return {
        "auto_map": dict(AUTO_MAP),
        "partial_rotary_factor": model.rotary_percent,
        "gated": model.activation is Activation.SWIGLU,
        "norm_gain": model.norm_gain.value,
        "use_bias": model.add_bias_linear,
        "unembedding_bias": model.unembedding_bias,
        "embedding_norm": model.embedding_norm,
        "embedding_multiplier": multipliers.embedding,
        "attention_multiplier": multipliers.attention,
        "residual_multiplier": multipliers.residual,
        "logit_multiplier": multipliers.logit,
    }


def read_config(config: Mapping[str, Any], where: str) -> tuple[HfFormat, ModelConfig, Multipliers]:
    """Understand a config.json.

    Args:
        config: its contents.
        where: its path, for messages.

    Returns:
        Format, architecture and multipliers. The vocabulary needs no padding: its rows are those of
        the weights, so that the softmax is the same.

    Raises:
        CheckpointError: a key is missing, of a wrong type, or says something that this package
            cannot hold exactly.
    """
    fields = _Fields(config, where)
    hf_format = _format(fields)
    for key, reason in _UNSUPPORTED.items():
        if config.get(key):
            raise fields.refusal(key, reason)
    own = hf_format is HfFormat.MEGATRON_MUP
    options = _own_options(fields) if own else _llama_options(fields)
    try:
        model = ModelConfig(**_sizes(fields), **_rotary(fields, partial=own), **options)
    except ConfigError as error:
        raise CheckpointError(f"{where}: {error}") from error
    return hf_format, model, _multipliers(fields, hf_format, model)


class _Fields:
    """Typed access to a config.json; errors name the file and the key."""

    def __init__(self, config: Mapping[str, Any], where: str) -> None:
        self.config, self.where = config, where

    def refusal(self, key: str, reason: str) -> CheckpointError:
        return CheckpointError(f"{self.where}: {key} is {self.config.get(key)!r}; {reason}")

    def value(self, key: str, default: Any) -> Any:
        """A key's value; null means the default, as in transformers; no default, no mercy."""
        found = self.config.get(key)
        if found is None and default is None:
            raise CheckpointError(f"{self.where} has no {key}; it is damaged or incomplete")
        return default if found is None else found

    def size(self, key: str, default: int | None = None) -> int:
        found = self.value(key, default)
        if not isinstance(found, int) or isinstance(found, bool) or found < 1:
            raise self.refusal(key, "it must be a positive integer")
        return found

    def number(self, key: str, default: float | None = None) -> float:
        found = self.value(key, default)
        if isinstance(found, bool) or not isinstance(found, int | float):
            raise self.refusal(key, "it must be a number")
        if not 0 < found < math.inf:
            raise self.refusal(key, "it must be positive and finite")
        return float(found)

    def flag(self, key: str, default: bool | None = None) -> bool:
        found = self.value(key, default)
        if not isinstance(found, bool):
            raise self.refusal(key, "it must be true or false")
        return found

    def choice(self, key: str, choices: Mapping[str, Any], default: str | None = None) -> Any:
        found = self.value(key, default)
        if not isinstance(found, str) or found not in choices:
            raise self.refusal(key, f"supported: {', '.join(choices)}")
        return choices[found]


def _format(fields: _Fields) -> HfFormat:
    hf_format: HfFormat = fields.choice("model_type", {kind.value: kind for kind in HfFormat})
    architectures = fields.config.get("architectures")
    if architectures and list(architectures) != [ARCHITECTURES[hf_format]]:
        raise fields.refusal("architectures", f"supported: {ARCHITECTURES[hf_format]}")
    # With code of its own a model called llama may compute anything.
    if hf_format is not HfFormat.MEGATRON_MUP and fields.config.get("auto_map"):
        raise fields.refusal("auto_map", "models with remote code of others are not supported")
    return hf_format


def _sizes(fields: _Fields) -> dict[str, Any]:
    vocabulary, hidden = fields.size("vocab_size"), fields.size("hidden_size")
    heads = fields.size("num_attention_heads")
    return {
        "num_layers": fields.size("num_hidden_layers"),
        "hidden_size": hidden,
        "num_attention_heads": heads,
        "num_query_groups": fields.size("num_key_value_heads", heads),
        "kv_channels": fields.size("head_dim", hidden // heads),
        "ffn_hidden_size": fields.size("intermediate_size"),
        "vocab_size": vocabulary,
        "make_vocab_size_divisible_by": math.gcd(vocabulary, _PADDING),
        "seq_length": fields.size("max_position_embeddings", 2048),
        "norm_epsilon": fields.number("rms_norm_eps", 1e-6),
        "untie_embeddings_and_output_weights": not fields.flag("tie_word_embeddings", False),
    }


def _rotary(fields: _Fields, *, partial: bool) -> dict[str, Any]:
    """Base and fraction, from where transformers 5 (a dict) or 4 (keys of their own) keeps them."""
    config = fields.config
    # In this order of precedence in transformers.
    for key in ("rope_scaling", "rope_parameters"):
        inner = config.get(key) or {}
        if not isinstance(inner, dict):
            raise fields.refusal(key, "it must be an object")
        kind = inner.get("rope_type", inner.get("type", "default"))
        if kind != "default" or inner.keys() - _ROPE_KEYS:
            raise fields.refusal(key, "only rotary embeddings of the default type are supported")
        if inner:
            break
    merged = _Fields({**config, **inner}, fields.where)
    base = merged.number("rope_theta", 10000.0)
    if base != int(base):
        raise merged.refusal("rope_theta", "it must be an integer")
    fraction = merged.number("partial_rotary_factor", 1.0)
    if fraction != 1.0 and not partial:
        raise merged.refusal("partial_rotary_factor", "this model type rotates whole heads")
    return {"rotary_base": int(base), "rotary_percent": fraction}


def _llama_options(fields: _Fields) -> dict[str, Any]:
    fields.choice("hidden_act", {"silu": None, "swish": None}, "silu")
    biases = fields.flag("attention_bias", False)
    if fields.flag("mlp_bias", False) != biases:
        raise fields.refusal(
            "mlp_bias", f"but attention_bias is {biases}: biases are in all linear layers or none"
        )
    return {
        "activation": Activation.SWIGLU,
        "norm_gain": NormGain.VECTOR,
        "add_bias_linear": biases,
    }


def _own_options(fields: _Fields) -> dict[str, Any]:
    activation = fields.choice("hidden_act", {name: kind for kind, name in HIDDEN_ACT.items()})
    if fields.flag("gated") != (activation is Activation.SWIGLU):
        raise fields.refusal("gated", "silu is gated here, and nothing else is")
    return {
        "activation": activation,
        "norm_gain": fields.choice("norm_gain", {gain.value: gain for gain in NormGain}),
        "add_bias_linear": fields.flag("use_bias"),
        "unembedding_bias": fields.flag("unembedding_bias"),
        "embedding_norm": fields.flag("embedding_norm"),
    }


def _multipliers(fields: _Fields, hf_format: HfFormat, model: ModelConfig) -> Multipliers:
    if hf_format is HfFormat.LLAMA:
        return plain_multipliers(model)
    granite = hf_format is HfFormat.GRANITE
    default = 1.0 if granite else None
    return Multipliers(
        embedding=fields.number("embedding_multiplier", default),
        attention=fields.number("attention_multiplier", default),
        residual=fields.number("residual_multiplier", default),
        logit=(
            1.0 / fields.number("logits_scaling", 1.0)
            if granite
            else fields.number("logit_multiplier")
        ),
    )
