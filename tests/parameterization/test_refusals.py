"""Combinations without a rule are refused, with the option that mends them."""

from __future__ import annotations

import dataclasses

import pytest

from megatron_mup.config_io import config_from_dict
from megatron_mup.errors import ParameterizationError
from megatron_mup.parameterization.evaluation import group_weight_decay
from megatron_mup.parameterization.options import DecayMask, DecayMode, OptimizerNumbers
from megatron_mup.parameterization.roles import Part, by_parameter, logical_tensors
from tests.configurations import TINY
from tests.parameterization.table_rows import rows_by_role, wide

_TIED = "untie_embeddings_and_output_weights=false"


@pytest.mark.parametrize(
    ("overrides", "cure"),
    [
        ((_TIED,), "output_form=multiplier"),
        ((_TIED, "name=abs_mup"), "output_form=multiplier"),
        ((_TIED, "output_form=multiplier", "u_init=zero"), "untie_embeddings_and_output_weights"),
        ((_TIED, "output_form=multiplier", "u_init=sp"), "untie_embeddings_and_output_weights"),
        (
            (_TIED, "output_form=multiplier", "u_init=sp", "name=abs_mup", "init=sigma"),
            "change would grow as sqrt",
        ),
        ((_TIED, "name=sp", "u_init=zero"), "untie_embeddings_and_output_weights"),
        ((_TIED, "name=sp", "u_init=mup"), "leave parameterization.u_init unset"),
        (("name=sp", "output_form=multiplier"), "output_form at folded"),
        (("name=sp", "init=sigma", "u_init=mup"), "u_init=sp"),
        (("num_attention_heads=4", "kv_channels=16"), "base_num_attention_heads"),
        (("lr=0.0", "weight_decay=0.1", "weight_decay_mode=independent"), "optimizer.lr"),
        (("lr=0.0", "weight_decay=0.1", "weight_decay_mode=constant_product"), "optimizer.lr"),
        (("name=abs_mup", "ffn_out_lr_ratio=width"), "ffn_out_lr_ratio unset or use name=mup"),
        (("name=abs_mup", "ffn_out_lr_ratio=fan_in"), "ffn_out_lr_ratio unset or use name=mup"),
        (("name=sp", "ffn_out_lr_ratio=width"), "ffn_out_lr_ratio unset or use name=mup"),
        (
            ("name=abs_mup", "init=sigma", "num_attention_heads=4", "kv_channels=16"),
            "base_num_attention_heads",
        ),
        (("ffn_out_lr_ratio=none",), "'width' or 'fan_in'"),
        (("base_hidden_size=0",), "at least 1"),
        (("residual_multiplier=0.0",), "positive"),
        (("logit_multiplier=-1.0",), "positive"),
        (("init_method_std=0.0",), "positive"),
    ],
)
def test_a_combination_without_a_rule_names_the_cure(overrides: tuple[str, ...], cure: str) -> None:
    with pytest.raises(ParameterizationError, match=cure):
        wide(*overrides)


@pytest.mark.parametrize(
    "missing",
    ["base_hidden_size", "base_ffn_hidden_size", "base_kv_channels", "base_num_layers"],
)
def test_the_relative_rule_asks_for_the_missing_base_size_by_name(missing: str) -> None:
    data = {name: dict(section) for name, section in TINY.items()}
    del data["parameterization"][missing]
    with pytest.raises(ParameterizationError, match=f"parameterization.{missing}"):
        config_from_dict(data)


@pytest.mark.parametrize("overrides", [("init=sigma",), ("output_form=multiplier",)])
def test_the_absolute_rule_needs_a_base_only_where_it_is_used(overrides: tuple[str, ...]) -> None:
    data = {name: dict(section) for name, section in TINY.items()}
    data["parameterization"] = {"name": "abs_mup"}
    assert config_from_dict(data).table.multipliers.logit == 1.0
    with pytest.raises(ParameterizationError, match="base_hidden_size"):
        config_from_dict(data, overrides)


def test_sp_needs_no_base_shape() -> None:
    data = {name: dict(section) for name, section in TINY.items()}
    data["parameterization"] = {"name": "sp"}
    assert {row.lr for row in config_from_dict(data).table.rows} == {0.015625}


def test_depth_scaling_asks_for_the_base_depth() -> None:
    data = {name: dict(section) for name, section in TINY.items()}
    data["parameterization"] = {"name": "sp", "residual_depth_exponent": 1.0}
    with pytest.raises(ParameterizationError, match="base_num_layers"):
        config_from_dict(data)


def test_two_roles_cannot_claim_one_part_of_a_parameter() -> None:
    tensors = logical_tensors(wide().model.shape)
    with pytest.raises(ParameterizationError, match="two roles claim"):
        by_parameter((*tensors, tensors[0]))
    table = wide().table
    doubled = dataclasses.replace(table, rows=(*table.rows, table.rows[1]))
    with pytest.raises(ParameterizationError, match="two roles claim part 'query'"):
        doubled.by_parameter()


@pytest.mark.parametrize(
    "overrides",
    [
        ("name=sp",),
        ("name=sp", "init=sigma"),
        ("name=abs_mup",),
        ("name=abs_mup", "output_form=multiplier"),
    ],
)
def test_base_heads_are_asked_for_only_where_the_base_attention_width_is_used(
    overrides: tuple[str, ...],
) -> None:
    # H D = 64 in a model of width 128.
    rows = rows_by_role(wide("num_attention_heads=4", "kv_channels=16", *overrides))
    assert (rows["attention_out"].tensor.fan_in, rows["attention_out"].base_fan_in) == (64, 64)


def test_rows_without_a_base_print_their_own_fan_in() -> None:
    assert {r.base_fan_in for r in wide("name=sp").table.rows} == {96, 128, 512}
    absolute = rows_by_role(wide("name=abs_mup"))
    assert (absolute["query"].base_fan_in, absolute["unembedding"].base_fan_in) == (128, 128)
    unfolded = rows_by_role(wide("name=abs_mup", "output_form=multiplier"))
    assert (unfolded["query"].base_fan_in, unfolded["unembedding"].base_fan_in) == (128, 32)
    sigma = rows_by_role(wide("name=abs_mup", "init=sigma"))
    assert (sigma["query"].base_fan_in, sigma["ffn_out"].base_fan_in) == (32, 128)


@pytest.mark.parametrize("mode", ["independent", "constant_product"])
def test_a_learning_rate_of_zero_without_decay_is_allowed(mode: str) -> None:
    rows = wide("lr=0.0", "weight_decay=0.0", f"weight_decay_mode={mode}").table.rows
    assert {(row.lr, row.weight_decay) for row in rows} == {(0.0, 0.0)}


def test_no_decay_is_divided_by_a_learning_rate_it_does_not_need() -> None:
    numbers = OptimizerNumbers(
        lr=0.0,
        weight_decay=0.1,
        weight_decay_mode=DecayMode.COUPLED,
        weight_decay_mask=DecayMask.MATRICES,
        eps=None,
    )
    assert group_weight_decay(numbers, lr=0.0, is_matrix=True) == 0.1


@pytest.mark.parametrize(
    ("overrides", "parameters"),
    [
        ((), 10),
        (("norm_gain=vector",), 15),
        (("add_bias_linear=true",), 18),
        ((_TIED, "output_form=multiplier"), 9),
    ],
)
def test_every_megatron_parameter_of_two_layers_has_a_role(
    overrides: tuple[str, ...], parameters: int
) -> None:
    grouped = by_parameter(logical_tensors(wide(*overrides).model.shape))
    assert len(grouped) == parameters


def test_fused_parameters_are_split_into_logical_tensors_with_global_shapes() -> None:
    run = wide("num_query_groups=2", "activation=swiglu", "ffn_multiplier=2.67")
    grouped = by_parameter(logical_tensors(run.model.shape))
    qkv = grouped["decoder.layers.1.self_attention.linear_qkv.weight"]
    assert [(t.part, t.shape, t.fan_in) for t in qkv] == [
        (Part.QUERY, (128, 128), 128),
        (Part.KEY, (32, 128), 128),
        (Part.VALUE, (32, 128), 128),
    ]
    fc1 = grouped["decoder.layers.1.mlp.linear_fc1.weight"]
    assert [(t.part, t.shape) for t in fc1] == [(Part.GATE, (341, 128)), (Part.UP, (341, 128))]
    (fc2,) = grouped["decoder.layers.1.mlp.linear_fc2.weight"]
    assert (fc2.shape, fc2.fan_in, fc2.partition_axis) == ((128, 341), 341, 1)
    (embedding,) = grouped["embedding.word_embeddings.weight"]
    assert (embedding.shape, embedding.fan_in) == ((96, 128), 96)
