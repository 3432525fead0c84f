"""Learning rate, eps and decay that the built optimizer holds for each parameter.

Base: M = 32, F = 128, head dim 16; wide: M = 128, F = 512. alpha = 2^-6, eps 1e-8. Literals from
arXiv:2404.05728, Table 2.
"""

from __future__ import annotations

from typing import Any

import pytest

from megatron_mup.errors import ParameterizationError
from megatron_mup.model.gpt import build_model
from megatron_mup.optimizer.build import apply_schedule
from megatron_mup.optimizer.groups import parameter_groups
from megatron_mup.parameterization.table import ParameterTable
from megatron_mup.training.processes import Launch, parallel_processes
from tests.configurations import tiny
from tests.optimizer.built_runs import built, group_of

_WIDE = ("hidden_size=128", "num_attention_heads=8", "lr=0.015625")
_EMBEDDING, _UNEMBEDDING = "embedding.word_embeddings.weight", "output_layer.weight"
_QKV, _PROJ = "self_attention.linear_qkv.weight", "self_attention.linear_proj.weight"
_FC1, _FC2 = "mlp.linear_fc1.weight", "mlp.linear_fc2.weight"
_ALPHA, _QUARTER = 0.015625, 0.00390625


def held(key: str, *overrides: str) -> dict[str, Any]:
    """What the groups hold at peak, layer 1 standing for both layers."""
    with built(tiny(*_WIDE, *overrides)) as state:
        apply_schedule(state.optimizer, 1.0, weight_decay=state.run.optimizer.weight_decay)
        groups = group_of(state)
        values = {name: group[key] for name, group in groups.items()}
    for name, value in values.items():
        assert value == values[name.replace("layers.0.", "layers.1.")], name
    prefix = "decoder.layers.1."
    return {
        name.removeprefix(prefix): value
        for name, value in values.items()
        if not name.startswith("decoder.layers.0.")
    }


def matrices(
    hidden: float, *, ffn_out: float, embedding: float, unembedding: float
) -> dict[str, float]:
    return {
        _EMBEDDING: embedding,
        _QKV: hidden,
        _PROJ: hidden,
        _FC1: hidden,
        _FC2: ffn_out,
        _UNEMBEDDING: unembedding,
    }


_RELATIVE = matrices(_QUARTER, ffn_out=_QUARTER, embedding=_ALPHA, unembedding=_QUARTER)
RATES = {
    "relative": ((), _RELATIVE),
    "lion": (("optimizer.optimizer=lion",), _RELATIVE),
    "multiplier": (
        ("output_form=multiplier",),
        matrices(_QUARTER, ffn_out=_QUARTER, embedding=_ALPHA, unembedding=_ALPHA),
    ),
    "standard": (
        ("name=sp",),
        matrices(_ALPHA, ffn_out=_ALPHA, embedding=_ALPHA, unembedding=_ALPHA),
    ),
    "absolute": (
        ("name=abs_mup", "lr=1.0"),
        matrices(0.0078125, ffn_out=0.001953125, embedding=1.0, unembedding=0.0078125),
    ),
    # F = 341 over 85: 0.015625 * 85 / 341.
    "swiglu": (
        ("activation=swiglu", "ffn_multiplier=2.67", "base_ffn_hidden_size=85"),
        matrices(_QUARTER, ffn_out=0.0038947947214076247, embedding=_ALPHA, unembedding=_QUARTER),
    ),
    "one_key_head": (
        ("num_query_groups=1", "ffn_multiplier=5", "base_ffn_hidden_size=160"),
        _RELATIVE,
    ),
}


@pytest.mark.parametrize("case", list(RATES))
def test_the_optimizer_holds_the_papers_learning_rates(case: str) -> None:
    overrides, expected = RATES[case]
    assert held("lr", *overrides) == pytest.approx(expected, rel=1e-12)


def test_gains_and_biases_keep_the_base_learning_rate_and_do_not_decay() -> None:
    options = ("norm_gain=vector", "add_bias_linear=true", "weight_decay=0.1")
    coupled = (*options, "weight_decay_mode=coupled")
    rates, decays = held("lr", *coupled), held("weight_decay", *coupled)
    vectors = {name for name in rates if name.endswith(".bias") or "norm" in name}
    assert len(vectors) == 7
    assert {rates[name] for name in vectors} == {_ALPHA}
    assert {decays[name] for name in vectors} == {0.0}
    assert {decays[name] for name in decays if name not in vectors} == {0.1}


def test_gains_that_are_not_learned_are_absent_from_the_optimizer() -> None:
    assert set(held("lr")) == set(_RELATIVE)


def test_eps_of_the_multiplier_form_is_converted_in_the_optimizer() -> None:
    eps = held("eps", "output_form=multiplier")
    assert eps == pytest.approx(
        matrices(1e-8, ffn_out=1e-8, embedding=1e-8, unembedding=2.5e-9), rel=1e-12
    )


def test_scaled_eps_reaches_the_optimizer() -> None:
    eps = held("eps", "eps_scaling=true", "adam_eps=0.001")
    expected = matrices(2.5e-4, ffn_out=2.5e-4, embedding=1e-3, unembedding=2.5e-4)
    assert eps == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(("optimizer", "betas"), [("adam", (0.9, 0.95)), ("lion", (0.95, 0.98))])
def test_every_parameter_is_trained_by_the_chosen_optimizer_with_its_own_betas(
    optimizer: str, betas: tuple[float, float]
) -> None:
    held_betas = held("betas", f"optimizer.optimizer={optimizer}", "norm_gain=vector")
    assert len(held_betas) == 9
    assert set(held_betas.values()) == {betas}


def test_a_tied_model_has_one_matrix_at_the_base_learning_rate() -> None:
    tied = ("untie_embeddings_and_output_weights=false", "output_form=multiplier")
    rates = held("lr", *tied)
    assert rates[_EMBEDDING] == _ALPHA
    assert _UNEMBEDDING not in rates


def test_groups_that_differ_only_in_eps_stay_apart() -> None:
    # Multiplier form, independent decay: embedding and readout agree in LR and decay.
    options = ("output_form=multiplier", "weight_decay=0.01", "weight_decay_mode=independent")
    with built(tiny(*_WIDE, *options)) as state:
        apply_schedule(state.optimizer, 1.0, weight_decay=0.01)
        groups = group_of(state)
        embedding, readout = groups[_EMBEDDING], groups[_UNEMBEDDING]
        assert embedding is not readout
        assert (embedding["lr"], embedding["wd_mult"]) == (readout["lr"], readout["wd_mult"])
        assert (embedding["eps"], readout["eps"]) == (1e-8, 2.5e-9)
        assert len(state.optimizer.param_groups) == 3


def test_eps_is_part_of_a_groups_identity_in_checkpoints() -> None:
    from megatron.core.optimizer import distrib_optimizer, optimizer

    with built(tiny()):
        assert optimizer.param_group_identifier_keys.count("eps") == 1
        assert distrib_optimizer.param_group_identifier_keys.count("eps") == 1


def test_a_parameter_without_a_role_is_refused_by_name() -> None:
    run = tiny()
    rows = tuple(row for row in run.table.rows if "linear_fc2" not in row.tensor.name)
    table = ParameterTable(rows=rows, multipliers=run.table.multipliers)
    with parallel_processes(run, Launch()):
        model = build_model(run, run.table)
        with pytest.raises(ParameterizationError, match=r"linear_fc2.weight' .*has no role"):
            parameter_groups(model, table)


def test_a_fused_parameter_with_two_rules_is_refused() -> None:
    run = tiny()
    # The same model over another base, so that only the key's learning rate differs.
    other = tiny("lr=0.5").table.rows
    mixed = tuple(
        theirs if own.tensor.role.value == "key" else own
        for own, theirs in zip(run.table.rows, other, strict=True)
    )
    table = ParameterTable(rows=mixed, multipliers=run.table.multipliers)
    with parallel_processes(run, Launch()):
        model = build_model(run, run.table)
        with pytest.raises(ParameterizationError, match="cannot treat parts"):
            parameter_groups(model, table)
