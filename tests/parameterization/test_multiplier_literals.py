"""Forward multipliers against written-down numbers."""

from __future__ import annotations

import pytest

from tests.parameterization.table_rows import narrow, rows_by_role, wide

_TIED = ("untie_embeddings_and_output_weights=false", "output_form=multiplier")


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        # 1/D under muP, 1/sqrt(D) under SP; D = 16.
        ((), 0.0625),
        (("name=abs_mup",), 0.0625),
        (("name=sp",), 0.25),
        (("attention_scale=inverse_sqrt",), 0.25),
        (("name=sp", "attention_scale=inverse"), 0.0625),
        # sqrt(base D)/D: 4/16 with base D 16, 2/16 with base D 4.
        (("attention_scale=base_head_dim",), 0.25),
        (("attention_scale=base_head_dim", "base_kv_channels=4"), 0.125),
    ],
)
def test_attention_scale(overrides: tuple[str, ...], expected: float) -> None:
    run = wide(*overrides)
    assert run.table.multipliers.attention == expected
    assert rows_by_role(run)["query"].forward_mult == expected


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ((), 1.0),
        (("output_form=multiplier",), 0.25),
        (("output_form=multiplier", "logit_multiplier=0.5"), 0.125),
        (("logit_multiplier=3.0",), 3.0),
        (("name=sp",), 1.0),
        # Tied (ours): std of the folded readout over std of the embedding, 1/128 over 1.
        (_TIED, 0.0078125),
        # 0.005 over 0.02.
        ((*_TIED, "init=sigma"), 0.25),
        ((*_TIED, "init=sigma", "embedding_init_method_std=0.04"), 0.125),
        ((*_TIED, "name=abs_mup"), 0.0078125),
        # Standard tying: nothing is scaled, whatever the embedding's std.
        ((_TIED[0], "name=sp"), 1.0),
        ((_TIED[0], "name=sp", "u_init=sp"), 1.0),
        ((_TIED[0], "name=sp", "init=sigma"), 1.0),
        ((_TIED[0], "name=sp", "init=sigma", "embedding_init_method_std=0.04"), 1.0),
        ((_TIED[0], "name=sp", "logit_multiplier=0.5"), 0.5),
    ],
)
def test_logit_multiplier(overrides: tuple[str, ...], expected: float) -> None:
    assert wide(*overrides).table.multipliers.logit == pytest.approx(expected, rel=1e-12)


def test_the_base_model_of_either_form_has_no_logit_multiplier() -> None:
    assert narrow().table.multipliers.logit == 1.0
    assert narrow("output_form=multiplier").table.multipliers.logit == 1.0
    assert narrow(*_TIED, "init=sigma").table.multipliers.logit == 1.0


@pytest.mark.parametrize(
    ("layers", "exponent", "multiplier", "expected"),
    [
        (8, 1.0, 1.0, 0.25),
        (8, 0.5, 1.0, 0.5),
        (8, 0.0, 1.0, 1.0),
        (2, 1.0, 1.0, 1.0),
        (8, 1.0, 0.4, 0.1),
        (1, 1.0, 1.0, 2.0),
    ],
)
def test_residual_multiplier_with_depth_over_a_base_of_two_layers(
    layers: int, exponent: float, multiplier: float, expected: float
) -> None:
    run = wide(
        f"num_layers={layers}",
        f"residual_depth_exponent={exponent}",
        f"residual_multiplier={multiplier}",
    )
    rows = rows_by_role(run)
    assert run.table.multipliers.residual == pytest.approx(expected, rel=1e-12)
    assert rows["attention_out"].forward_mult == rows["ffn_out"].forward_mult
    assert rows["ffn_out"].forward_mult == pytest.approx(expected, rel=1e-12)
    assert rows["ffn_in"].forward_mult == rows["key"].forward_mult == 1.0


def test_embedding_multiplier_is_the_users_at_every_width() -> None:
    for run in (narrow("embedding_multiplier=12.0"), wide("embedding_multiplier=12.0")):
        assert run.table.multipliers.embedding == 12.0
        assert rows_by_role(run)["embedding"].forward_mult == 12.0
    assert wide().table.multipliers.embedding == 1.0
