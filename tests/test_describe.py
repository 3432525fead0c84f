"""What `describe` prints for people."""

from __future__ import annotations

from megatron_mup.describe import describe_run, describe_text
from tests.configurations import tiny


def lines(*overrides: str) -> list[str]:
    return [line.rstrip() for line in describe_text(tiny(*overrides).table).splitlines()]


def test_layers_with_equal_numbers_share_a_row_of_one_line() -> None:
    rows = [line.split() for line in lines("num_layers=3") if ".linear_fc1." in line]
    assert [row[0] for row in rows] == ["decoder.layers.0-2.mlp.linear_fc1.weight"]


def test_no_line_is_wider_than_a_wide_terminal() -> None:
    assert max(len(line) for line in lines() if not line.startswith("[")) <= 150


def test_a_column_with_one_value_is_told_below_and_others_keep_their_column() -> None:
    equal = lines("weight_decay=0")
    assert any(line.startswith("in every row: decay 0, decay_per_step 0") for line in equal)
    differing = lines("weight_decay=0.1", "weight_decay_mode=independent")
    head = next(line for line in differing if line.split()[:2] == ["name", "role"])
    assert "decay" in head.split()


def test_each_row_names_its_numbered_source() -> None:
    text = lines()
    (row,) = [line for line in text if line.strip().startswith("output_layer.weight")]
    source = next(line for line in text if line.startswith(row.split()[-1]))
    assert "arXiv:2404.05728" in source


def test_a_run_tells_what_horizon_and_warmup_change() -> None:
    horizon = ["horizon_rule=completed_p", "base_batch_tokens=16", "base_train_tokens=384"]
    # The batch is 4 x 16 = 64 positions, four times the base's; six of them are the base's 384.
    text = describe_run(tiny("lr=0.01", "weight_decay=0.1", "weight_decay_mode=coupled", *horizon))
    changed = "lr 0.01 -> 0.02, weight_decay 0.1 -> 0.2, eps 1e-08 -> 5e-09, betas (0.9, 0.95) -> "
    assert f"horizon_rule=completed_p: {changed}(0.6, 0.8)" in text
    warm = describe_run(tiny("extra_warmup=exponential", "extra_warmup_iters=3"))
    assert "extra_warmup=exponential on divided roles: LR times 0.5 at first" in warm
    assert "horizon" not in warm
    assert "extra_warmup" not in describe_run(tiny())
