"""Which models a format holds, and what its tensors and its config.json are called."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import GraniteConfig, GraniteForCausalLM, LlamaConfig, LlamaForCausalLM

from megatron_mup.config import Activation, ModelConfig
from megatron_mup.convert.formats import HfFormat, hf_tensors, problems, refuse
from megatron_mup.convert.huggingface_config import config_dict, read_config
from megatron_mup.errors import CheckpointError
from megatron_mup.parameterization.evaluation import Multipliers
from megatron_mup.parameterization.roles import NormGain
from tests.convert.memory_weights import small_model

MULTIPLIERS = Multipliers(embedding=3.0, attention=0.125, residual=0.5, logit=0.25)


def changed(config: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """A config.json with other values; None removes a key."""
    return {key: value for key, value in {**config, **changes}.items() if value is not None}


def granite(model: ModelConfig | None = None) -> dict[str, Any]:
    return config_dict(HfFormat.GRANITE, model or small_model(), MULTIPLIERS, "float32")


def llama(model: ModelConfig | None = None) -> dict[str, Any]:
    return config_dict(HfFormat.LLAMA, model or small_model(), MULTIPLIERS, "float32")


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"activation": Activation.RELU}, "model.activation=relu"),
        ({"activation": Activation.SQUARED_RELU}, "model.activation=squared_relu"),
        ({"activation": Activation.GELU}, "model.activation=gelu"),
        ({"embedding_norm": True}, "model.embedding_norm"),
        ({"unembedding_bias": True}, "model.unembedding_bias"),
        ({"rotary_percent": 0.5}, "model.rotary_percent=0.5"),
    ],
)
def test_what_llama_and_granite_cannot_hold_is_refused_with_the_format_that_can(
    options: dict[str, Any], named: str
) -> None:
    model = small_model(**options)
    for hf_format in (HfFormat.LLAMA, HfFormat.GRANITE):
        with pytest.raises(CheckpointError) as caught:
            refuse(hf_format, model)
        assert named in str(caught.value)
        assert str(caught.value).endswith("use --format megatron_mup")
    assert problems(HfFormat.MEGATRON_MUP, model) == []


def test_a_width_that_heads_do_not_divide_is_refused_by_llama_alone() -> None:
    model = small_model(num_attention_heads=3, num_query_groups=1, kv_channels=8)
    with pytest.raises(CheckpointError, match="use --format granite or megatron_mup"):
        refuse(HfFormat.LLAMA, model)
    refuse(HfFormat.GRANITE, model)


def test_all_problems_are_named_at_once() -> None:
    model = small_model(activation=Activation.RELU, embedding_norm=True, unembedding_bias=True)
    assert len(problems(HfFormat.GRANITE, model)) == 3


@pytest.mark.parametrize("options", [{}, {"add_bias_linear": True}, {"num_query_groups": 1}])
@pytest.mark.parametrize("tied", [True, False])
def test_names_and_shapes_are_those_of_transformers(options: dict[str, Any], *, tied: bool) -> None:
    model = small_model(**options, untie_embeddings_and_output_weights=not tied)
    for hf_format, build in (
        (HfFormat.LLAMA, lambda c: LlamaForCausalLM(LlamaConfig(**c))),
        (HfFormat.GRANITE, lambda c: GraniteForCausalLM(GraniteConfig(**c))),
    ):
        with torch.device("meta"):
            built = build(config_dict(hf_format, model, MULTIPLIERS, "float32"))
        # Parameters once each: a tied readout is its embedding.
        expected = {name: tuple(p.shape) for name, p in built.named_parameters()}
        assert {t.name: t.shape for t in hf_tensors(hf_format, model)} == expected


def test_an_ungated_model_has_names_of_the_same_kind() -> None:
    model = small_model(
        activation=Activation.RELU,
        num_layers=1,
        norm_gain=NormGain.NONE,
        embedding_norm=True,
        unembedding_bias=True,
    )
    assert [(t.name, t.shape) for t in hf_tensors(HfFormat.MEGATRON_MUP, model)] == [
        ("model.embed_tokens.weight", (96, 32)),
        ("model.layers.0.self_attn.q_proj.weight", (32, 32)),
        ("model.layers.0.self_attn.k_proj.weight", (16, 32)),
        ("model.layers.0.self_attn.v_proj.weight", (16, 32)),
        ("model.layers.0.self_attn.o_proj.weight", (32, 32)),
        ("model.layers.0.mlp.up_proj.weight", (48, 32)),
        ("model.layers.0.mlp.down_proj.weight", (32, 48)),
        ("lm_head.weight", (96, 32)),
        ("lm_head.bias", (96,)),
    ]


def test_granite_stores_every_multiplier_and_divides_the_logits() -> None:
    config = granite()
    assert config["embedding_multiplier"] == 3.0
    assert config["attention_multiplier"] == 0.125
    assert config["residual_multiplier"] == 0.5
    assert config["logits_scaling"] == 4.0


def test_numbers_that_have_other_defaults_in_transformers_are_written_out() -> None:
    model = small_model(norm_epsilon=1e-7, seq_length=77)
    for config in (llama(model), granite(model)):
        loaded = (LlamaConfig if config["model_type"] == "llama" else GraniteConfig)(**config)
        assert loaded.rope_parameters == {"rope_type": "default", "rope_theta": 500.0}
        assert loaded.rms_norm_eps == 1e-7
        assert loaded.max_position_embeddings == 77
        assert loaded.head_dim == 8
        assert loaded.num_key_value_heads == 2
        assert loaded.vocab_size == 96
        assert (loaded.bos_token_id, loaded.eos_token_id) == (None, None)
        # What transformers 5 writes, and what transformers 4 reads.
        assert config["rope_parameters"] == {"rope_type": "default", "rope_theta": 500.0}
        assert config["rope_theta"] == 500.0


@pytest.mark.parametrize("hf_format", list(HfFormat))
def test_a_config_that_was_written_is_read_back(hf_format: HfFormat) -> None:
    model = small_model(add_bias_linear=True, untie_embeddings_and_output_weights=False)
    config = config_dict(hf_format, model, MULTIPLIERS, "float32")
    found_format, found, multipliers = read_config(config, "config.json")
    assert found_format is hf_format
    assert found.shape == model.shape
    assert (found.padded_vocab_size, found.vocab_size) == (96, 96)
    assert (found.rotary_base, found.norm_epsilon, found.seq_length) == (500, 1e-5, 24)
    plain = Multipliers(embedding=1.0, attention=8**-0.5, residual=1.0, logit=1.0)
    assert multipliers == (plain if hf_format is HfFormat.LLAMA else MULTIPLIERS)


def test_the_own_format_keeps_every_architecture() -> None:
    model = small_model(
        activation=Activation.SQUARED_RELU,
        norm_gain=NormGain.SCALAR,
        embedding_norm=True,
        unembedding_bias=True,
        rotary_percent=0.5,
    )
    config = config_dict(HfFormat.MEGATRON_MUP, model, MULTIPLIERS, "float32")
    _, found, multipliers = read_config(config, "config.json")
    assert (found.shape, found.activation, found.rotary_percent) == (
        model.shape,
        Activation.SQUARED_RELU,
        0.5,
    )
    assert multipliers == MULTIPLIERS


@pytest.mark.parametrize(
    ("rows", "multiple"), [(32000, 128), (49152, 128), (50257, 1), (128256, 128), (151_666, 2)]
)
def test_a_vocabulary_of_any_size_gets_no_padding(rows: int, multiple: int) -> None:
    _, model, _ = read_config(changed(llama(), vocab_size=rows), "config.json")
    assert model.padded_vocab_size == model.vocab_size == rows
    assert model.make_vocab_size_divisible_by == multiple


def test_keys_that_are_left_out_mean_what_transformers_means() -> None:
    _, model, multipliers = read_config(
        {
            "model_type": "granite",
            "vocab_size": 90,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
        },
        "config.json",
    )
    meant = GraniteConfig()
    assert multipliers == Multipliers(embedding=1.0, attention=1.0, residual=1.0, logit=1.0)
    assert model.norm_epsilon == meant.rms_norm_eps == 1e-6
    assert model.rotary_base == 10_000
    assert model.seq_length == meant.max_position_embeddings == 2048
    assert model.untie_embeddings_and_output_weights is not meant.tie_word_embeddings
    assert (model.query_groups, model.head_dim, model.add_bias_linear) == (4, 8, False)


def test_the_base_of_the_rotation_is_found_where_either_version_keeps_it() -> None:
    old = changed(llama(), rope_parameters=None, rope_theta=700.0)
    new = changed(
        llama(), rope_theta=None, rope_parameters={"rope_type": "default", "rope_theta": 800}
    )
    assert read_config(old, "c")[1].rotary_base == 700
    assert read_config(new, "c")[1].rotary_base == 800
    both = changed(new, rope_scaling={"rope_type": "default", "rope_theta": 900.0})
    assert LlamaConfig(**both).rope_parameters["rope_theta"] == 900.0
    assert read_config(both, "c")[1].rotary_base == 900


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "mistral"}, "model_type is 'mistral'; supported: llama, granite"),
        ({"model_type": None}, "has no model_type"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "architectures is"),
        ({"auto_map": {"AutoModelForCausalLM": "m.M"}}, "auto_map is .* remote code"),
        ({"quantization_config": {"bits": 4}}, "quantization_config is .* quantized"),
        ({"sliding_window": 512}, "sliding_window is 512"),
        ({"rope_interleaved": True}, "rope_interleaved is True"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling is"),
        (
            {"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0}},
            "rope_parameters is .*default type",
        ),
        ({"rope_parameters": {"rope_theta": 500.5}}, "rope_theta is 500.5; it must be an integer"),
        ({"rope_parameters": [1]}, "rope_parameters is .* object"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'; supported: silu"),
        ({"mlp_bias": True}, "mlp_bias is True; but attention_bias is False"),
        ({"hidden_size": "32"}, "hidden_size is '32'; it must be a positive integer"),
        ({"num_hidden_layers": 0}, "num_hidden_layers is 0"),
        ({"num_hidden_layers": True}, "num_hidden_layers is True"),
        ({"vocab_size": None}, "config.json has no vocab_size"),
        ({"rms_norm_eps": "1e-5"}, "rms_norm_eps is '1e-5'; it must be a number"),
        ({"tie_word_embeddings": 1}, "tie_word_embeddings is 1; it must be true or false"),
        ({"num_key_value_heads": 3}, "config.json: model.num_attention_heads 4 is not divisible"),
    ],
)
def test_what_cannot_be_held_exactly_is_refused_by_its_key(
    changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(CheckpointError, match=message):
        read_config(changed(llama(), **changes), "config.json")


@pytest.mark.parametrize("value", [0, -1.0, float("inf"), float("nan"), True])
def test_a_multiplier_that_is_no_positive_number_is_refused(value: Any) -> None:
    with pytest.raises(CheckpointError, match="logits_scaling is"):
        read_config(changed(granite(), logits_scaling=value), "config.json")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"gated": True}, "gated is True"),
        ({"norm_gain": "layer"}, "norm_gain is 'layer'; supported: none, scalar, vector"),
        ({"logit_multiplier": None}, "has no logit_multiplier"),
    ],
)
def test_a_config_of_the_own_format_must_be_whole(changes: dict[str, Any], message: str) -> None:
    model = small_model(activation=Activation.RELU)
    config = config_dict(HfFormat.MEGATRON_MUP, model, MULTIPLIERS, "float32")
    with pytest.raises(CheckpointError, match=message):
        read_config(changed(config, **changes), "config.json")
