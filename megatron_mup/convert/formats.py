"""The formats of Hugging Face that a model can be written in: which models fit, and tensor names.

A Llama and a Granite are what transformers 5.23.0 calls so; the third is the remote code of this
package (``remote_code``). Knows neither weights nor files; config.json is ``huggingface_config``'s.
Both worlds rotate half of a head against the other half, so no rows move.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import StrEnum

from megatron_mup.config import Activation, ModelConfig
from megatron_mup.convert.rescaling import plain_multipliers
from megatron_mup.errors import CheckpointError
from megatron_mup.parameterization.evaluation import Multipliers
from megatron_mup.parameterization.roles import LogicalTensor, NormGain, Part, logical_tensors


class HfFormat(StrEnum):
    """A model class of transformers.

    ``llama``: no multipliers, they are folded into the weights. ``granite``: multipliers of its
    own, weights as trained. ``megatron_mup``: the same, for any architecture of this package, with
    modeling code beside the weights (``trust_remote_code=True``).
    """

    LLAMA = "llama"
    GRANITE = "granite"
    MEGATRON_MUP = "megatron_mup"


ARCHITECTURES = {
    HfFormat.LLAMA: "LlamaForCausalLM",
    HfFormat.GRANITE: "GraniteForCausalLM",
    HfFormat.MEGATRON_MUP: "MegatronMupForCausalLM",
}
"""Class names that config.json gives."""

REMOTE_CODE = ("configuration_megatron_mup.py", "modeling_megatron_mup.py")
"""Files of the ``remote_code`` folder that lie beside weights of that format."""

AUTO_MAP = {
    "AutoConfig": "configuration_megatron_mup.MegatronMupConfig",
    "AutoModelForCausalLM": "modeling_megatron_mup.MegatronMupForCausalLM",
}

HIDDEN_ACT = {
    Activation.RELU: "relu",
    Activation.SQUARED_RELU: "relu2",
    # Both are the exact one, by erf.
    Activation.GELU: "gelu",
    Activation.SWIGLU: "silu",
}
"""Names of the nonlinearities in transformers (``ACT2FN``)."""

_OUTSIDE_LAYERS = {
    "embedding.word_embeddings": "model.embed_tokens",
    "embedding.norm": "model.embed_norm",
    "decoder.final_layernorm": "model.norm",
    "output_layer": "lm_head",
}
_IN_LAYERS = {
    ("input_layernorm", Part.WHOLE): "input_layernorm",
    ("self_attention.linear_qkv", Part.QUERY): "self_attn.q_proj",
    ("self_attention.linear_qkv", Part.KEY): "self_attn.k_proj",
    ("self_attention.linear_qkv", Part.VALUE): "self_attn.v_proj",
    ("self_attention.linear_proj", Part.WHOLE): "self_attn.o_proj",
    ("pre_mlp_layernorm", Part.WHOLE): "post_attention_layernorm",
    ("mlp.linear_fc1", Part.GATE): "mlp.gate_proj",
    ("mlp.linear_fc1", Part.UP): "mlp.up_proj",
    ("mlp.linear_fc1", Part.WHOLE): "mlp.up_proj",
    ("mlp.linear_fc2", Part.WHOLE): "mlp.down_proj",
}


@dataclass(frozen=True, kw_only=True)
class HfTensor:
    """One tensor of a Hugging Face checkpoint.

    Attributes:
        name: its name there.
        logical: the logical tensor of ``stored_model`` that it holds. The source itself may not
            have it (a gain that was not learned): ``huggingface_target.as_stored`` does.
        shape: [fan_out, fan_in] for matrices, as in Megatron.
    """

    name: str
    logical: str
    shape: tuple[int, ...]


def problems(hf_format: HfFormat, model: ModelConfig) -> list[str]:
    """Why a format cannot hold a model; empty if it can.

    Multipliers are never a reason: a format has them, or they are folded into the weights.
    """
    if hf_format is HfFormat.MEGATRON_MUP:
        return []
    found = []
    if model.activation is not Activation.SWIGLU:
        found.append(f"model.activation={model.activation} (it has gated SiLU only)")
    if model.embedding_norm:
        found.append("model.embedding_norm (it has no norm on the embedding)")
    if model.unembedding_bias:
        found.append("model.unembedding_bias (its readout has no bias)")
    if model.rotary_percent != 1.0:
        found.append(f"model.rotary_percent={model.rotary_percent} (it rotates whole heads)")
    if hf_format is HfFormat.LLAMA and model.hidden_size % model.num_attention_heads:
        found.append(
            f"model.hidden_size={model.hidden_size} that is no multiple of num_attention_heads="
            f"{model.num_attention_heads} (LlamaConfig refuses it)"
        )
    return found


def refuse(hf_format: HfFormat, model: ModelConfig) -> None:
    """Refuse a model that a format cannot hold.

    Raises:
        CheckpointError: names what does not fit and the formats that can hold it.
    """
    found = problems(hf_format, model)
    if not found:
        return
    able = [other.value for other in HfFormat if not problems(other, model)]
    raise CheckpointError(
        f"the format {hf_format} cannot hold {'; '.join(found)}; use --format {' or '.join(able)}"
    )


def stored_model(hf_format: HfFormat, model: ModelConfig) -> ModelConfig:
    """The model as a format stores it: Llama and Granite want every gain as a vector."""
    if hf_format is HfFormat.MEGATRON_MUP:
        return model
    return replace(model, norm_gain=NormGain.VECTOR)


def stored_multipliers(
    hf_format: HfFormat, model: ModelConfig, multipliers: Multipliers
) -> Multipliers:
    """The multipliers under which a format stores the weights: none in Llama, else the model's."""
    return plain_multipliers(model) if hf_format is HfFormat.LLAMA else multipliers


def hf_name(tensor: LogicalTensor) -> str:
    """The name of a logical tensor in every format of ``HfFormat``."""
    module, kind = tensor.parameter.rsplit(".", 1)
    if not module.startswith("decoder.layers."):
        return f"{_OUTSIDE_LAYERS[module]}.{kind}"
    index, inside = module.removeprefix("decoder.layers.").split(".", 1)
    return f"model.layers.{index}.{_IN_LAYERS[inside, tensor.part]}.{kind}"


def hf_tensors(hf_format: HfFormat, model: ModelConfig) -> tuple[HfTensor, ...]:
    """The tensors of a model in a format, in the order of the forward pass.

    Args:
        hf_format: a format that can hold the model.
        model: the source's architecture. A tied model has no ``lm_head.weight``.
    """
    return tuple(
        HfTensor(name=hf_name(tensor), logical=tensor.name, shape=tensor.shape)
        for tensor in logical_tensors(stored_model(hf_format, model).shape)
    )
