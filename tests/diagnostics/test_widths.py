"""A configuration at other widths: what follows the width and what stays."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_mup.config import DecayStyle
from megatron_mup.config_io import load_config
from megatron_mup.diagnostics.widths import Grow, at_width, runs_at_widths
from megatron_mup.errors import ConfigError
from megatron_mup.parameterization.roles import Role
from megatron_mup.run_source import RunSource
from tests.configurations import tiny


def test_heads_and_ffn_follow_the_width_and_the_head_dim_stays() -> None:
    model = at_width(tiny(), 256).model
    assert (model.hidden_size, model.num_attention_heads, model.head_dim) == (256, 16, 16)
    assert (model.ffn_width, model.query_groups) == (1024, 16)
    assert at_width(tiny("ffn_hidden_size=160"), 128).model.ffn_width == 320


def test_the_head_dim_follows_the_width_when_asked() -> None:
    model = at_width(tiny(), 256, grow=Grow.HEAD_DIM).model
    assert (model.num_attention_heads, model.head_dim, model.query_groups) == (4, 64, 4)


@pytest.mark.parametrize(("groups", "wide"), [(1, 1), (2, 8), (4, 16)])
def test_query_groups_keep_their_ratio_and_one_stays_one(groups: int, wide: int) -> None:
    run = at_width(tiny(f"num_query_groups={groups}"), 256)
    assert run.model.query_groups == wide


def test_the_base_stays_so_that_the_table_follows_the_width() -> None:
    rates = []
    for width in (32, 128):
        rows = at_width(tiny(), width).table.rows
        rates.append(next(row.lr for row in rows if row.tensor.role is Role.QUERY))
    assert rates == [0.015625, 0.00390625]


def test_sp_keeps_its_learning_rate() -> None:
    rows = at_width(tiny("parameterization.name=sp"), 512).table.rows
    assert {row.lr for row in rows} == {0.015625}


def test_the_learning_rate_is_constant_at_its_peak_and_the_extra_warmup_stays() -> None:
    options = ("lr_warmup_iters=5", "lr_decay_style=WSD", "lr_wsd_decay_iters=1")
    extra = ("extra_warmup=exponential", "extra_warmup_iters=9")
    schedule = at_width(tiny(*options, *extra), 128).schedule
    assert (schedule.lr_warmup_iters, schedule.lr_decay_style) == (0, DecayStyle.CONSTANT)
    assert schedule.extra_warmup_iters == 9


def test_a_preset_is_cut_down_and_overrides_win() -> None:
    source = RunSource(preset="combined", width=64, head_dim=16, base_width=64)
    runs = runs_at_widths(source, ["num_layers=3"], [64, 128])
    assert {width: run.model.hidden_size for width, run in runs.items()} == {64: 64, 128: 128}
    model = runs[128].model
    assert (model.num_layers, model.seq_length, model.vocab_size) == (3, 32, 128)
    assert runs[128].training.global_batch_size == 4


@pytest.mark.parametrize(
    ("widths", "overrides", "message"),
    [
        ([64], [], "--widths is 64; give at least 2"),
        ([128, 64], [], "--widths is 128,64"),
        ([64, 64], [], "each once"),
        ([0, 64], [], "--widths is 0,64"),
        ([64, 100], [], "num_attention_heads 4 of width 64 has no whole number at width 100"),
        ([64, 128], ["hidden_size=64"], "'hidden_size=64' is set by --widths"),
        ([64, 128], ["kv_channels=8"], "'kv_channels=8' is set by --widths"),
    ],
)
def test_widths_that_show_nothing_are_refused(
    widths: list[int], overrides: list[str], message: str
) -> None:
    source = RunSource(preset="baseline", width=64, head_dim=16, base_width=64)
    with pytest.raises(ConfigError) as refused:
        runs_at_widths(source, overrides, widths)
    assert message in str(refused.value)


def test_a_configuration_file_keeps_its_own_body() -> None:
    path = Path(__file__).parents[2] / "examples" / "first_run" / "config.yaml"
    start = load_config(path)
    width = 2 * start.model.hidden_size
    run = runs_at_widths(RunSource(config=path), [], [width // 2, width])[width]
    assert run.model.num_attention_heads == 2 * start.model.num_attention_heads
    assert run.training.global_batch_size == start.training.global_batch_size
    assert run.optimizer == start.optimizer
    assert run.parameterization == start.parameterization
