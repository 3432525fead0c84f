"""Muon's rows: hidden matrices at alpha whatever the size, everything else as under AdamW.

Base: M = 32; wide: M = 128, m = 4. alpha = 2^-6. A semi-orthogonal update times
sqrt(fan_out / fan_in) has the spectral norm that arXiv:2310.17813, Condition 1, asks of an update.
"""

from __future__ import annotations

import pytest

from megatron_mup.config import RunConfig
from megatron_mup.errors import ConfigError, ParameterizationError
from tests.configurations import tiny
from tests.parameterization.table_rows import narrow, rates, rows_by_role, wide

_MUON = "optimizer.optimizer=muon"
_ALPHA, _QUARTER = 0.015625, 0.00390625
_HIDDEN = ("query", "key", "value", "attention_out", "ffn_in", "ffn_out")


def hidden_at(rate: float, **others: float) -> dict[str, float]:
    return {**dict.fromkeys(_HIDDEN, rate), **others}


@pytest.mark.parametrize(
    ("run", "expected"),
    [
        (narrow(_MUON), hidden_at(_ALPHA, embedding=_ALPHA, unembedding=_ALPHA)),
        (wide(_MUON), hidden_at(_ALPHA, embedding=_ALPHA, unembedding=_QUARTER)),
        (
            wide(_MUON, "output_form=multiplier"),
            hidden_at(_ALPHA, embedding=_ALPHA, unembedding=_ALPHA),
        ),
        # F = 128 at both widths, 1 key head, half the attention width: no ratio enters.
        (
            wide(_MUON, "ffn_hidden_size=128", "num_query_groups=1"),
            hidden_at(_ALPHA, embedding=_ALPHA, unembedding=_QUARTER),
        ),
        # alpha = 1; only the readout divides by M = 128.
        (
            wide(_MUON, "name=abs_mup", "lr=1.0"),
            hidden_at(1.0, embedding=1.0, unembedding=0.0078125),
        ),
        (wide(_MUON, "name=sp"), hidden_at(_ALPHA, embedding=_ALPHA, unembedding=_ALPHA)),
    ],
)
def test_muons_hidden_learning_rate_does_not_depend_on_any_size(
    run: RunConfig, expected: dict[str, float]
) -> None:
    assert rates(run) == pytest.approx(expected, rel=1e-12)


def test_vectors_keep_adams_rule() -> None:
    rows = rows_by_role(wide(_MUON, "add_bias_linear=true", "norm_gain=vector"))
    assert {rows[role].lr for role in ("gain", "bias")} == {_ALPHA}
    assert {rows[role].eps for role in ("gain", "bias")} == {1e-8}


def test_only_adams_rows_have_an_eps() -> None:
    rows = rows_by_role(wide(_MUON, "output_form=multiplier"))
    assert {rows[role].eps for role in _HIDDEN} == {None}
    assert rows["embedding"].eps == 1e-8
    assert rows["unembedding"].eps == pytest.approx(2.5e-9, rel=1e-12)


@pytest.mark.parametrize(
    ("mode", "hidden", "unembedding"),
    # lambda 0.1; as it is; times alpha/lr; over lr.
    [("coupled", 0.1, 0.1), ("constant_product", 0.1, 0.4), ("independent", 6.4, 25.6)],
)
def test_decay_follows_muons_learning_rate(mode: str, hidden: float, unembedding: float) -> None:
    rows = rows_by_role(wide(_MUON, "weight_decay=0.1", f"weight_decay_mode={mode}"))
    decays = {role: rows[role].weight_decay for role in _HIDDEN}
    assert decays == pytest.approx(dict.fromkeys(_HIDDEN, hidden), rel=1e-12)
    assert rows["unembedding"].weight_decay == pytest.approx(unembedding, rel=1e-12)


def test_the_source_of_a_hidden_row_is_the_spectral_condition() -> None:
    rows = rows_by_role(wide(_MUON))
    spectral = "LR alpha (ratio none, arXiv:2310.17813 Condition 1, orthogonalized update)"
    assert rows["query"].source == f"{spectral}; init var 1/fan_in (arXiv:2404.05728 Table 2)"
    assert rows["ffn_out"].source.startswith(spectral)
    assert rows["unembedding"].source.startswith("LR alpha P/M (ratio width, arXiv:2404.05728")


def test_the_initial_stds_and_multipliers_are_those_of_adam() -> None:
    plain, muon = wide().table, wide(_MUON).table
    assert muon.multipliers == plain.multipliers
    assert [row.init_std for row in muon.rows] == [row.init_std for row in plain.rows]


def test_a_ratio_for_ffn_out_is_refused() -> None:
    with pytest.raises(ParameterizationError, match="no effect with optimizer=muon"):
        wide(_MUON, "ffn_out_lr_ratio=width")


def test_a_mode_that_depends_on_the_layout_is_refused() -> None:
    with pytest.raises(ConfigError, match="blockwise orthogonalizes each tensor-parallel shard"):
        tiny(_MUON, "muon_tp_mode=blockwise")
