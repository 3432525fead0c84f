"""Which configuration an import is put under: the user's words over the weights', each refused."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_mup.config import Activation, ModelConfig, RunConfig
from megatron_mup.convert.rescaling import RescaledWeights
from megatron_mup.convert.target_run import target_run
from megatron_mup.errors import CheckpointError, ConfigError
from megatron_mup.parameterization.evaluation import Multipliers
from megatron_mup.parameterization.options import Parameterization
from megatron_mup.parameterization.roles import NormGain
from megatron_mup.run_source import RunSource
from tests.convert.memory_weights import in_memory, random_weights, small_model
from tests.convert.plain_forward import PlainModel

WEIGHTS = Multipliers(embedding=3.0, attention=1 / 8, residual=0.5, logit=0.25)
"""Of heads of 8: the attention scale is 1/D."""

BASELINE = RunSource(preset="baseline", width=32, head_dim=16)


def baseline_model(**options: Any) -> ModelConfig:
    """The architecture of the preset at width 32: 24 layers, F = 128, two heads of 16."""
    values = {
        "num_layers": 24,
        "num_attention_heads": 2,
        "num_query_groups": None,
        "kv_channels": 16,
        "ffn_hidden_size": 128,
        "vocab_size": 32100,
        "seq_length": 256,
        "make_vocab_size_divisible_by": 128,
        "activation": Activation.RELU,
        "norm_gain": NormGain.NONE,
        "norm_epsilon": 1e-5,
        "rotary_base": 10_000,
    }
    return small_model(**{**values, **options})


def test_without_words_of_the_user_the_weights_own_multipliers_stay() -> None:
    model = small_model()
    run = target_run(model, WEIGHTS, None)
    assert run.parameterization.name is Parameterization.SP
    assert run.table.multipliers == WEIGHTS
    assert run.model == dataclasses.replace(model, kv_channels=run.model.kv_channels)
    assert (run.optimizer.lr, run.training.train_iters) == (1e-3, 1)


def test_an_attention_scale_that_no_option_says_becomes_the_plain_one() -> None:
    run = target_run(small_model(), dataclasses.replace(WEIGHTS, attention=0.1375), None)
    assert run.table.multipliers == dataclasses.replace(WEIGHTS, attention=1 / math.sqrt(8))


def test_a_preset_brings_its_parameterization_and_its_training() -> None:
    run = target_run(baseline_model(), WEIGHTS, BASELINE)
    assert run.parameterization.name is Parameterization.MUP
    # arXiv:2404.05728: nothing on the embedding, 1/D on the scores; P = 16 of M = 32.
    assert run.table.multipliers.embedding == 1.0
    assert run.table.multipliers.attention == 1 / 16
    assert run.parameterization.base_hidden_size == 16
    assert (run.optimizer.lr, run.training.train_iters) == (2**-6, 125_000)
    assert run.model.rotary_base == 10_000


def test_the_weights_keep_their_function_under_a_preset() -> None:
    model = baseline_model(num_layers=2, vocab_size=90, seq_length=24)
    source = random_weights(model, WEIGHTS)
    overrides = ("num_layers=2", "vocab_size=90", "seq_length=24", "base_num_layers=2")
    run = target_run(model, source.multipliers, BASELINE, overrides)
    assert run.table.multipliers != WEIGHTS
    rescaled = in_memory(RescaledWeights(source, run.model, run.table.multipliers))
    tokens = torch.arange(48).view(2, 24) % 90
    torch.testing.assert_close(
        PlainModel(rescaled).logprobs(tokens),
        PlainModel(source).logprobs(tokens),
        rtol=0,
        atol=3e-6,
    )


@pytest.mark.parametrize(
    ("changed", "message"),
    [({"num_layers": 2}, "num_layers"), ({"activation": Activation.SWIGLU}, "activation")],
)
def test_weights_of_another_architecture_than_the_presets_are_refused_by_option(
    changed: dict[str, Any], message: str
) -> None:
    source = random_weights(baseline_model(**{"vocab_size": 90, **changed}), WEIGHTS)
    run = target_run(source.model, source.multipliers, BASELINE, ("vocab_size=90",))
    with pytest.raises(CheckpointError, match=message):
        RescaledWeights(source, run.model, run.table.multipliers)


def test_the_users_words_go_before_the_weights_and_the_presets() -> None:
    model = baseline_model()
    run: RunConfig = target_run(
        model, WEIGHTS, BASELINE, ("optimizer.lr=0.5", "model.ffn_multiplier=3", "seq_length=128")
    )
    assert run.optimizer.lr == 0.5
    assert (run.model.ffn_width, run.model.seq_length) == (96, 128)


def test_a_file_that_says_only_a_parameterization_gets_the_rest_from_the_weights(
    tmp_path: Path,
) -> None:
    file = tmp_path / "target.yaml"
    file.write_text("parameterization: {name: sp, embedding_multiplier: 7}\n")
    run = target_run(small_model(), WEIGHTS, RunSource(config=file))
    # Nothing but the file's own and the defaults: no multiplier of the weights.
    assert run.table.multipliers == Multipliers(
        embedding=7.0, attention=1 / math.sqrt(8), residual=1.0, logit=1.0
    )
    assert (run.model.num_layers, run.model.ffn_width, run.optimizer.lr) == (2, 48, 1e-3)


@pytest.mark.parametrize(
    ("source", "overrides", "message"),
    [
        (RunSource(preset="baseline"), (), "--preset baseline needs --width M"),
        (RunSource(width=64), (), "--width 64 belongs to --preset"),
        (RunSource(preset="nonsense", width=128), (), "nonsense"),
        (None, ("no_such_option=1",), "no_such_option"),
        (None, ("parameterization.name=umup",), "umup"),
    ],
)
def test_wrong_words_are_told(
    source: RunSource | None, overrides: tuple[str, ...], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        target_run(small_model(), WEIGHTS, source, overrides)
