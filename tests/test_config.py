"""Derived values of the configuration, YAML in and out, and the generated reference."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from typing import Any, get_type_hints

import pytest
import yaml

from megatron_mup import config_reference
from megatron_mup.config import (
    Activation,
    ModelConfig,
    ParallelConfig,
    RunConfig,
    TrainingConfig,
    WsdDecayStyle,
)
from megatron_mup.config_io import (
    config_from_dict,
    config_to_dict,
    load_config,
    option_names,
)
from megatron_mup.errors import ConfigError
from megatron_mup.parameterization.options import DecayMode, UnembeddingInit
from tests.configurations import TINY, tiny

ROOT = Path(__file__).parents[1]


def model(**options: Any) -> ModelConfig:
    sizes = {"num_layers": 2, "hidden_size": 64, "num_attention_heads": 4, "seq_length": 16}
    return ModelConfig(**{**sizes, "vocab_size": 96, **options})


@pytest.mark.parametrize(
    ("options", "width"),
    [
        ({}, 256),
        ({"ffn_hidden_size": 100}, 100),
        ({"ffn_multiplier": 3.0}, 192),
        # 2.67 * 64 = 170.88: cut, not rounded.
        ({"ffn_multiplier": 2.67}, 170),
    ],
)
def test_ffn_width(options: dict[str, Any], width: int) -> None:
    assert model(**options).ffn_width == width


@pytest.mark.parametrize(
    ("vocab_size", "multiple", "padded"),
    [(96, 128, 128), (128, 128, 128), (129, 128, 256), (50257, 128, 50304), (97, 1, 97)],
)
def test_vocabulary_is_padded_to_the_next_multiple(
    vocab_size: int, multiple: int, padded: int
) -> None:
    sizes = model(vocab_size=vocab_size, make_vocab_size_divisible_by=multiple)

    assert sizes.padded_vocab_size == padded


def test_head_dim_and_groups_follow_from_the_heads_unless_given() -> None:
    assert (model().head_dim, model().query_groups) == (16, 4)
    given = model(kv_channels=32, num_query_groups=1)
    assert (given.head_dim, given.query_groups) == (32, 1)


def test_shape_hands_the_rule_table_global_sizes() -> None:
    shape = model(
        activation=Activation.SWIGLU, num_query_groups=2, untie_embeddings_and_output_weights=False
    ).shape

    assert (shape.hidden_size, shape.ffn_hidden_size, shape.num_layers) == (64, 256, 2)
    assert (shape.num_attention_heads, shape.num_query_groups, shape.kv_channels) == (4, 2, 16)
    assert shape.vocab_size == 128
    assert shape.gated_linear_unit
    assert shape.tied_embeddings


def test_lion_has_no_eps_and_adam_has() -> None:
    assert tiny("optimizer.optimizer=lion").optimizer.numbers.eps is None
    assert tiny("adam_eps=1e-6").optimizer.numbers.eps == 1e-6


def test_schedule_ends_with_the_run_unless_told() -> None:
    assert tiny().decay_iters == 6
    assert tiny("lr_decay_iters=4").decay_iters == 4


def test_configurations_cannot_be_changed() -> None:
    run = tiny()

    with pytest.raises(dataclasses.FrozenInstanceError):
        run.optimizer.lr = 1.0  # type: ignore[misc]


@pytest.mark.parametrize(
    ("section", "options", "words"),
    [
        (ParallelConfig, {"tensor_model_parallel_size": 0}, "tensor_model_parallel_size is 0"),
        (ParallelConfig, {"pipeline_model_parallel_size": -1}, "pipeline_model_parallel_size is"),
        (
            TrainingConfig,
            {
                "train_iters": 1,
                "global_batch_size": 1,
                "micro_batch_size": 1,
                "profile": True,
                "profile_dir": "p",
                "profile_step_start": 5,
                "profile_step_end": 5,
            },
            "profile_step_start 5 is not before profile_step_end 5",
        ),
        (
            TrainingConfig,
            {"train_iters": 1, "global_batch_size": 1, "micro_batch_size": 1, "eval_iters": -1},
            "eval_iters is -1",
        ),
    ],
)
def test_sections_check_their_own_values(
    section: type, options: dict[str, Any], words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        section(**options)


def test_overrides_need_no_section_and_may_name_it() -> None:
    assert tiny("lr=0.5").optimizer.lr == 0.5
    assert tiny("optimizer.lr=0.25").optimizer.lr == 0.25


def test_later_overrides_win_over_earlier_ones_and_over_the_file(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(TINY))

    assert load_config(path).training.train_iters == 6
    assert load_config(path, ["train_iters=8", "train_iters=9"]).training.train_iters == 9


def test_enums_are_written_by_value_and_none_by_null() -> None:
    run = tiny(
        "activation=squared_relu",
        "lr_decay_style=WSD",
        "lr_wsd_decay_iters=2",
        "lr_wsd_decay_style=minus_sqrt",
        "weight_decay_mode=coupled",
        "u_init=zero",
        "base_num_attention_heads=null",
    )

    assert run.model.activation is Activation.SQUARED_RELU
    assert run.schedule.lr_wsd_decay_style is WsdDecayStyle.MINUS_SQRT
    assert run.optimizer.weight_decay_mode is DecayMode.COUPLED
    assert run.parameterization.u_init is UnembeddingInit.ZERO
    assert run.parameterization.base_num_attention_heads is None


def test_lists_come_from_yaml_and_from_overrides() -> None:
    run = tiny("train_data_path=[0.5,a,0.5,b]", "rampup_batch_size=[2,2,8]")

    assert run.data.train_data_path == ["0.5", "a", "0.5", "b"]
    assert run.training.rampup_batch_size == [2, 2, 8]


def test_numbers_in_scientific_notation_are_numbers(tmp_path: Path) -> None:
    data = copy.deepcopy(TINY)
    del data["optimizer"]
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(data) + "optimizer: {lr: 3e-4, adam_eps: 1e-10}\n")

    run = load_config(path)

    assert (run.optimizer.lr, run.optimizer.adam_eps) == (0.0003, 1e-10)


def test_plain_data_holds_values_and_not_enums() -> None:
    data = config_to_dict(tiny())

    assert data["model"]["activation"] == "gelu"
    assert type(data["model"]["activation"]) is str
    assert data["parameterization"]["base_hidden_size"] == 32
    assert data["schedule"]["lr_decay_iters"] is None
    assert list(data) == [field.name for field in dataclasses.fields(RunConfig)]


@pytest.mark.parametrize(
    "overrides",
    [
        (),
        ("lr=1e-7", "adam_eps=1e-12", "rampup_batch_size=[2,2,8]"),
        ("name=abs_mup", "q_init=zero", "u_init=sp", "scale_residual_init=true"),
        ("lr_decay_style=WSD", "lr_wsd_decay_iters=2", "weight_decay_mode=constant_product"),
        ("train_data_path=[0.5,a,0.5,b]", "save=some folder", "activation=swiglu"),
    ],
)
def test_plain_data_reads_back_as_the_same_configuration(
    overrides: tuple[str, ...], tmp_path: Path
) -> None:
    run = tiny(*overrides)
    path = tmp_path / "saved.yaml"
    # safe_dump refuses everything but strings, numbers, lists and mappings.
    path.write_text(yaml.safe_dump(config_to_dict(run)))

    assert load_config(path) == run
    assert config_from_dict(config_to_dict(run)) == run


def test_option_names_are_unique_over_the_sections() -> None:
    # An override without its section could not be understood otherwise.
    names = [name for section in option_names().values() for name in section]

    assert len(names) == len(set(names)) > 80


def test_every_option_has_a_docstring() -> None:
    for section, cls in get_type_hints(RunConfig).items():
        documented = config_reference.field_docstrings(cls)
        for field in dataclasses.fields(cls):
            assert documented.get(field.name), f"{section}.{field.name}"


def test_docs_configuration_is_the_rendered_reference() -> None:
    text = (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8")

    assert text == config_reference.render(), (
        "run: python -m megatron_mup.config_reference > docs/configuration.md"
    )


@pytest.mark.parametrize(
    "row",
    [
        "| `num_layers` | integer | required | Transformer layers. |",
        "| `bf16` | true or false | `false` | Compute in bfloat16 with fp32 master weights; "
        "otherwise fp32. |",
        "| `adam_beta2` | number | `0.95` | Adam's decay of the squared gradient's running mean; "
        "Megatron's default is 0.999. |",
        "| `u_init` | `mup` or `sp` or `zero`, or unset | unset | Initial variance of the "
        "unembedding; unset means the parameterization's own. |",
        "| `valid_data_path` | list of texts | `[]` | Prefixes of the held-out shards; may be "
        "empty when training.eval_iters is 0. |",
    ],
)
def test_reference_shows_type_default_and_docstring(row: str) -> None:
    assert row in config_reference.render().splitlines()


def test_reference_refuses_an_option_without_docstring(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(config_reference, "field_docstrings", lambda _cls: {})

    with pytest.raises(ValueError, match=r"model\.num_layers has no docstring"):
        config_reference.render()
