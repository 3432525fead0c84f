"""Sizes, FLOPs and demands of the models whose speed is measured on a GPU."""

from __future__ import annotations

import pytest

from megatron_mup.benchmark.gpu_models import (
    DEMANDS,
    Precision,
    SpeedModel,
    default_micro_batch,
    rate,
    speed_run,
    verdict,
)
from megatron_mup.errors import ConfigError

MODEL = SpeedModel(width=2048, depth=24, seq_length=2048, micro_batch_size=16)
LONG = SpeedModel(width=2048, depth=24, seq_length=4096, micro_batch_size=8)


@pytest.mark.parametrize(
    ("model", "tokens", "tflops"),
    [
        # 6 (12 L M^2 + V M) + 12 L S M with V = 32,000, by hand: 8.850e9 and 10.058e9.
        (MODEL, 50_800, 449.6),
        (MODEL, 61_000, 539.9),
        (LONG, 44_700, 449.6),
    ],
)
def test_rates_count_attention_in_full(model: SpeedModel, tokens: int, tflops: float) -> None:
    run = speed_run(model, Precision.BF16)
    batch = model.seq_length * model.micro_batch_size
    found = rate(run, batch / tokens)
    assert found.tokens_per_second == pytest.approx(tokens)
    assert found.tflops == pytest.approx(tflops, rel=1e-3)


def test_megatrons_count_has_half_of_the_attention() -> None:
    found = rate(speed_run(LONG, Precision.BF16), 1.0)
    # 12 L S M = 2.416e9 of 10.058e9 FLOPs per token.
    assert found.megatron_tflops / found.tflops == pytest.approx(1 - 1.208 / 10.058, rel=1e-3)


def test_runs_differ_in_what_they_are_compared_for_and_in_nothing_else() -> None:
    mup, sp = (speed_run(MODEL, Precision.BF16, sp=sp) for sp in (False, True))
    fp8 = speed_run(MODEL, Precision.FP8)
    assert (mup.model, mup.training) == (sp.model, sp.training) == (fp8.model, fp8.training)
    assert mup.precision == sp.precision
    assert fp8.precision.fp8_format == "hybrid"
    assert fp8.precision.fp8_recipe == "tensorwise"
    multipliers = mup.table.multipliers
    assert (multipliers.embedding, multipliers.residual) == (2.0, 0.5)
    assert (multipliers.logit, multipliers.attention) == (0.25, 1 / 128)
    multipliers = sp.table.multipliers
    assert (multipliers.embedding, multipliers.residual, multipliers.logit) == (1.0, 1.0, 1.0)


def test_a_step_has_at_least_32k_tokens() -> None:
    assert [default_micro_batch(length) for length in (2048, 4096, 65_536)] == [16, 8, 1]


@pytest.mark.parametrize(
    ("precision", "tflops", "over_bf16", "expected"),
    [
        (Precision.BF16, 449.9, None, "BELOW 450 TFLOP/s"),
        (Precision.BF16, 450.0, None, "accepted"),
        (Precision.BF16, 500.0, None, "good"),
        (Precision.BF16, 541.0, None, "excellent"),
        (Precision.FP8, 545.0, None, "accepted"),
        (Precision.FP8, 545.0, 1.19, "BELOW 1.2 x bf16"),
        (Precision.FP8, 500.0, 1.21, "accepted"),
        (Precision.FP8, 600.0, 1.1, "good"),
        (Precision.FP8, 660.0, 1.1, "excellent"),
    ],
)
def test_the_verdict_on_a_rate(
    precision: Precision, tflops: float, over_bf16: float | None, expected: str
) -> None:
    assert verdict(MODEL, precision, tflops, over_bf16=over_bf16) == expected


def test_the_wide_model_has_demands_and_others_have_none() -> None:
    wide = SpeedModel(width=4096, depth=16, seq_length=4096, micro_batch_size=4)
    assert verdict(wide, Precision.FP8, 649.0) == "BELOW 650 TFLOP/s"
    assert verdict(wide, Precision.FP8, 744.0) == "good"
    assert verdict(wide, Precision.BF16, 551.0) == "good"
    small = SpeedModel(width=1024, depth=16, seq_length=4096, micro_batch_size=4)
    assert verdict(small, Precision.BF16, 1.0) == "nothing asked"
    assert len(DEMANDS) == 5


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"width": 2000}, "--width is 2000; give a multiple of 4 and of the head dim 128"),
        ({"depth": 0}, "--depth 0, .* must be positive"),
    ],
)
def test_impossible_sizes_are_refused(sizes: dict[str, int], message: str) -> None:
    given = {"width": 2048, "depth": 24, "seq_length": 2048, "micro_batch_size": 1} | sizes
    with pytest.raises(ConfigError, match=message):
        SpeedModel(**given)
