"""The same function under other multipliers."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from megatron_mup.config import Activation, ModelConfig
from megatron_mup.convert.rescaling import RescaledWeights, plain_multipliers
from megatron_mup.convert.weights import WeightSource
from megatron_mup.errors import CheckpointError
from megatron_mup.parameterization.evaluation import Multipliers
from megatron_mup.parameterization.roles import NormGain
from tests.convert.memory_weights import in_memory, random_weights, small_model
from tests.convert.plain_forward import PlainModel

TOKENS = torch.randint(0, 96, (2, 24), generator=torch.Generator().manual_seed(5))
OTHER = Multipliers(embedding=0.6, attention=0.05, residual=1.9, logit=2.3)

MODELS: dict[str, dict[str, Any]] = {
    "untied": {},
    "tied": {"untie_embeddings_and_output_weights": False},
    "biases": {"add_bias_linear": True, "unembedding_bias": True},
    "embedding norm": {"embedding_norm": True, "activation": Activation.RELU},
    "tied, embedding norm": {
        "embedding_norm": True,
        "untie_embeddings_and_output_weights": False,
        "norm_gain": NormGain.SCALAR,
    },
    "scalar gains": {"norm_gain": NormGain.SCALAR},
    "no gains": {"norm_gain": NormGain.NONE, "num_query_groups": 1},
}


def logprobs(source: WeightSource) -> torch.Tensor:
    return PlainModel(in_memory(source)).logprobs(TOKENS)


@pytest.mark.parametrize("options", MODELS.values(), ids=MODELS)
def test_the_function_stays_under_other_multipliers(options: dict[str, Any]) -> None:
    source = random_weights(small_model(**options))
    rescaled = RescaledWeights(source, source.model, OTHER)
    # Factors are rounded to fp32, so the functions differ by about 1e-7.
    torch.testing.assert_close(logprobs(rescaled), logprobs(source), rtol=0, atol=3e-6)


@pytest.mark.parametrize("options", MODELS.values(), ids=MODELS)
def test_the_function_is_the_same_to_fp64_rounding_under_powers_of_two(
    options: dict[str, Any],
) -> None:
    model = small_model(num_attention_heads=2, **{"num_query_groups": 1, **options})
    source = random_weights(
        model, Multipliers(embedding=8.0, attention=1 / 16, residual=0.5, logit=0.25)
    )
    # The plain multipliers of heads of 16: 1/4.
    rescaled = RescaledWeights(
        source, replace(model, norm_gain=NormGain.VECTOR), plain_multipliers(model)
    )
    assert rescaled.multipliers == Multipliers(
        embedding=1.0, attention=0.25, residual=1.0, logit=1.0
    )
    torch.testing.assert_close(logprobs(rescaled), logprobs(source), rtol=0, atol=1e-13)


def test_factors_are_the_ratios_of_the_multipliers() -> None:
    source = random_weights(
        small_model(), Multipliers(embedding=3.0, attention=0.5, residual=0.25, logit=6.0)
    )
    after = Multipliers(embedding=2.0, attention=0.125, residual=1.0, logit=0.5)
    rescaled = RescaledWeights(source, source.model, after)
    layer = "decoder.layers.0"
    assert {
        name: rescaled.factor(name)
        for name in (
            "embedding.word_embeddings.weight",
            f"{layer}.self_attention.linear_qkv.weight.query",
            f"{layer}.self_attention.linear_qkv.weight.key",
            f"{layer}.self_attention.linear_qkv.weight.value",
            f"{layer}.self_attention.linear_proj.weight",
            f"{layer}.mlp.linear_fc1.weight.gate",
            f"{layer}.mlp.linear_fc2.weight",
            f"{layer}.input_layernorm.weight",
            "decoder.final_layernorm.weight",
            "output_layer.weight",
        )
    } == {
        "embedding.word_embeddings.weight": 1.5,
        f"{layer}.self_attention.linear_qkv.weight.query": 4.0,
        f"{layer}.self_attention.linear_qkv.weight.key": 1.0,
        f"{layer}.self_attention.linear_qkv.weight.value": 1.0,
        f"{layer}.self_attention.linear_proj.weight": 0.25,
        f"{layer}.mlp.linear_fc1.weight.gate": 1.0,
        f"{layer}.mlp.linear_fc2.weight": 0.25,
        f"{layer}.input_layernorm.weight": 1.0,
        "decoder.final_layernorm.weight": 1.0,
        "output_layer.weight": 12.0,
    }


def test_a_tied_readout_puts_both_multipliers_into_the_final_gain() -> None:
    source = random_weights(
        small_model(untie_embeddings_and_output_weights=False),
        Multipliers(embedding=4.0, attention=0.5, residual=1.0, logit=2.0),
    )
    after = Multipliers(embedding=1.0, attention=0.5, residual=1.0, logit=1.0)
    rescaled = RescaledWeights(source, source.model, after)
    assert rescaled.factor("embedding.word_embeddings.weight") == 4.0
    assert rescaled.factor("decoder.final_layernorm.weight") == 0.5


def test_the_last_bit_of_a_multiplier_changes_no_weight() -> None:
    # 1 / (1 / 49) is not 49 in fp64; Granite keeps the logit multiplier so.
    source = random_weights(
        small_model(norm_gain=NormGain.NONE, untie_embeddings_and_output_weights=False),
        Multipliers(embedding=1.0, attention=0.5, residual=1.0, logit=49.0),
    )
    after = replace(source.multipliers, logit=1 / (1 / 49.0))
    assert after.logit != 49.0
    rescaled = RescaledWeights(source, source.model, after)
    for name, values in source.tensors.items():
        assert torch.equal(rescaled.read(name), values)


def test_weights_in_half_precision_are_multiplied_in_fp32() -> None:
    source = random_weights(small_model())
    for name in source.tensors:
        source.tensors[name] = source.tensors[name].bfloat16()
    rescaled = RescaledWeights(source, source.model, OTHER)
    name = "output_layer.weight"
    factor = source.multipliers.logit / 2.3
    assert torch.equal(rescaled.read(name), source.tensors[name].float() * factor)
    # What no factor touches stays as it is stored.
    untouched = "decoder.layers.0.mlp.linear_fc1.weight.gate"
    assert rescaled.read(untouched).dtype is torch.bfloat16


def test_a_factor_that_leads_beyond_fp32_is_refused() -> None:
    source = random_weights(small_model())
    name = "decoder.layers.0.mlp.linear_fc2.weight"
    source.tensors[name][0, 0] = 3e38
    small = replace(source.multipliers, residual=source.multipliers.residual / 4)
    with pytest.raises(CheckpointError, match=rf"{name} times 4, .* beyond fp32; choose"):
        RescaledWeights(source, source.model, small).read(name)


def test_the_source_keeps_its_weights() -> None:
    source = random_weights(small_model())
    before = {name: values.clone() for name, values in source.tensors.items()}
    in_memory(RescaledWeights(source, source.model, OTHER))
    assert all(torch.equal(before[name], values) for name, values in source.tensors.items())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"untie_embeddings_and_output_weights": False}, "are tied.*model.norm_gain=vector"),
        ({"embedding_norm": True}, "embedding is normalized.*model.norm_gain=vector"),
    ],
)
def test_a_multiplier_without_a_gain_to_take_it_is_refused(
    options: dict[str, Any], message: str
) -> None:
    source = random_weights(small_model(norm_gain=NormGain.NONE, **options))
    with pytest.raises(CheckpointError, match=message):
        RescaledWeights(source, source.model, OTHER)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_layers": 3}, "num_layers is 2 in the source and 3 in the target"),
        ({"num_query_groups": 4}, "num_query_groups is 2 .* 4"),
        ({"rotary_base": 10_000}, "model.rotary_base is 500 .* 10000"),
        ({"rotary_percent": 0.5}, "model.rotary_percent is 1.0 .* 0.5"),
        ({"norm_epsilon": 1e-6}, "model.norm_epsilon is 1e-05 .* 1e-06"),
        ({"make_vocab_size_divisible_by": 128}, "padded vocabulary is 96 .* 128"),
        ({"untie_embeddings_and_output_weights": False}, "tied_embeddings is False .* True"),
        ({"norm_gain": NormGain.SCALAR}, "cannot hold the learned gains"),
    ],
)
def test_a_target_of_another_function_is_refused_with_what_differs(
    change: dict[str, Any], message: str
) -> None:
    source = random_weights(small_model())
    with pytest.raises(CheckpointError, match=message):
        RescaledWeights(source, replace(source.model, **change), source.multipliers)


def test_another_activation_of_the_same_shape_is_refused() -> None:
    source = random_weights(small_model(activation=Activation.RELU))
    target = replace(source.model, activation=Activation.SQUARED_RELU)
    with pytest.raises(CheckpointError, match=r"model.activation is relu .* squared_relu"):
        RescaledWeights(source, target, source.multipliers)


@pytest.mark.parametrize(
    "change",
    [
        {"seq_length": 2048},
        {"kv_channels": 8},
        {"ffn_hidden_size": None, "ffn_multiplier": 1.5},
        {"vocab_size": 96, "make_vocab_size_divisible_by": 16},
    ],
)
def test_the_same_model_said_in_other_words_is_accepted(change: dict[str, Any]) -> None:
    source = random_weights(small_model())
    target: ModelConfig = replace(source.model, **change)
    rescaled = RescaledWeights(source, target, source.multipliers)
    assert torch.equal(rescaled.read("output_layer.weight"), source.tensors["output_layer.weight"])
