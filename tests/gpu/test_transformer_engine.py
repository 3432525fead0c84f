"""TransformerEngine's layer spec against the local one, on a GPU: logits and all gradients."""

from __future__ import annotations

import pytest

from tests.configurations import tiny
from tests.gpu.comparison import logits_and_gradients, relative_errors
from tests.gpu.conftest import Measured

pytestmark = pytest.mark.gpu

# Every multiplier differs from 1, and head dim 64 makes 1/D differ from 1/sqrt(D) by 8.
OPTIONS = (
    "hidden_size=256",
    "num_attention_heads=4",
    "num_query_groups=2",
    "base_kv_channels=64",
    "base_hidden_size=128",
    "base_ffn_hidden_size=512",
    "vocab_size=512",
    "seq_length=128",
    "residual_multiplier=0.5",
    "embedding_multiplier=2",
    "output_form=multiplier",
)
ENGINE = "transformer_impl=transformer_engine"

# bf16 rounds to 8 bits: 2^-9 at most, 2^-9 / sqrt(3) = 0.11% on average. A gradient of these two
# layers has passed about 50 tensors that were rounded: 0.8% if the errors are independent. Three
# times that is allowed, and not more than twice what the local spec's own rounding makes of it.
BF16_ERROR = 0.025
TIMES_LOCAL = 2.0
# TransformerEngine multiplies fp32 matrices in TF32: 11 bits instead of 8, an eighth of the error.
FP32_ERROR = BF16_ERROR / 8


@pytest.mark.parametrize("variant", [(), ("norm_gain=vector", "activation=swiglu")], ids=str)
def test_the_specs_differ_by_bf16s_rounding(variant: tuple[str, ...], measured: Measured) -> None:
    exact = logits_and_gradients(tiny(*OPTIONS, *variant))
    local = relative_errors(logits_and_gradients(tiny(*OPTIONS, *variant, "bf16=true")), exact)
    engine = relative_errors(
        logits_and_gradients(tiny(*OPTIONS, *variant, "bf16=true", ENGINE)), exact
    )
    for name in exact:
        measured(f"{name}: local, TransformerEngine", f"{local[name]:.4f}, {engine[name]:.4f}")

    assert {name: error for name, error in engine.items() if error > BF16_ERROR} == {}
    assert {name: engine[name] for name in exact if engine[name] > TIMES_LOCAL * local[name]} == {}


def test_the_specs_are_one_function_in_fp32(measured: Measured) -> None:
    errors = relative_errors(
        logits_and_gradients(tiny(*OPTIONS, ENGINE)), logits_and_gradients(tiny(*OPTIONS))
    )
    measured("largest error", max(errors.values()))

    assert {name: error for name, error in errors.items() if error > FP32_ERROR} == {}
