"""Weight decay of every role against written-down numbers: lambda 0.1, alpha 2^-6, m = 4.

A group's weight decay is what its learning rate multiplies, so the decay per step is their product.
"""

from __future__ import annotations

import pytest

from tests.parameterization.table_rows import rows_by_role, wide

_ALL = ("weight_decay=0.1", "weight_decay_mask=all", "add_bias_linear=true", "norm_gain=vector")


@pytest.mark.parametrize(
    ("mode", "form", "hidden", "embedding", "unembedding"),
    [
        ("coupled", "folded", 0.1, 0.1, 0.1),
        # alpha/lr: 4 for the hidden matrices.
        ("constant_product", "folded", 0.4, 0.1, 0.4),
        # 0.1/lr: lr is 2^-8 or 2^-6.
        ("independent", "folded", 25.6, 6.4, 25.6),
        # The readout's LR is alpha instead of alpha/4, so that its product stays the same.
        ("coupled", "multiplier", 0.1, 0.1, 0.025),
        ("constant_product", "multiplier", 0.4, 0.1, 0.1),
        ("independent", "multiplier", 25.6, 6.4, 6.4),
    ],
)
def test_group_weight_decay_of_each_mode(
    mode: str, form: str, hidden: float, embedding: float, unembedding: float
) -> None:
    rows = rows_by_role(wide(*_ALL, f"weight_decay_mode={mode}", f"output_form={form}"))
    decays = {role: row.weight_decay for role, row in rows.items()}
    expected = dict.fromkeys(
        ("query", "key", "value", "attention_out", "ffn_in", "ffn_out"), hidden
    )
    expected |= dict.fromkeys(("embedding", "gain", "bias"), embedding)
    expected["unembedding"] = unembedding
    assert decays == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(
    ("mode", "hidden", "embedding"),
    [
        ("coupled", 0.000390625, 0.0015625),
        ("constant_product", 0.0015625, 0.0015625),
        ("independent", 0.1, 0.1),
    ],
)
@pytest.mark.parametrize("form", ["folded", "multiplier"])
def test_decay_per_step_does_not_depend_on_the_output_form(
    mode: str, hidden: float, embedding: float, form: str
) -> None:
    rows = rows_by_role(wide(*_ALL, f"weight_decay_mode={mode}", f"output_form={form}"))
    per_step = {role: row.decay_per_step for role, row in rows.items()}
    assert per_step["query"] == pytest.approx(hidden, rel=1e-12)
    assert per_step["unembedding"] == pytest.approx(hidden, rel=1e-12)
    assert per_step["embedding"] == per_step["gain"] == pytest.approx(embedding, rel=1e-12)


@pytest.mark.parametrize("lr", ["0.015625", "0.125"])
def test_independent_decay_does_not_depend_on_the_learning_rate(lr: str) -> None:
    rows = rows_by_role(wide(*_ALL, "weight_decay_mode=independent", f"lr={lr}"))
    per_step = [row.decay_per_step for row in rows.values()]
    assert per_step == pytest.approx([0.1] * len(rows), rel=1e-12)


@pytest.mark.parametrize("mode", ["coupled", "constant_product", "independent"])
def test_the_matrices_mask_spares_gains_and_biases_only(mode: str) -> None:
    rows = rows_by_role(wide(*_ALL, "weight_decay_mask=matrices", f"weight_decay_mode={mode}"))
    assert {role for role, row in rows.items() if row.weight_decay == 0.0} == {"gain", "bias"}


def test_the_absolute_rule_at_learning_rate_one_decays_by_lambda_over_fan_in_when_coupled() -> None:
    rows = rows_by_role(wide(*_ALL, "weight_decay_mode=coupled", "name=abs_mup", "lr=1.0"))
    assert rows["query"].decay_per_step == pytest.approx(0.1 / 128, rel=1e-12)
    assert rows["ffn_out"].decay_per_step == pytest.approx(0.1 / 512, rel=1e-12)
