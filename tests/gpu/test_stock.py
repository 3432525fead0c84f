"""At width multiplier 1 this package is stock Megatron-Core with TransformerEngine, bit for bit."""

from __future__ import annotations

import pytest

from tests.configurations import tiny
from tests.gpu.conftest import Measured
from tests.gpu.stock import AT_BASE, different, ours_and_stock
from tests.gpu.test_transformer_engine import ENGINE

pytestmark = pytest.mark.gpu

# Attention's backward pass adds in any order unless it is told not to.
COMMON = (*AT_BASE, ENGINE, "bf16=true", "deterministic_mode=true")
PRECISIONS = {
    "bf16": (),
    "delayed": ("fp8_format=hybrid", "fp8_recipe=delayed", "fp8_amax_history_len=16"),
    "tensorwise": ("fp8_format=hybrid", "fp8_recipe=tensorwise"),
    "blockwise": ("fp8_format=hybrid", "fp8_recipe=blockwise"),
}


@pytest.mark.parametrize("precision", PRECISIONS)
def test_logits_and_gradients_are_those_of_stock_megatron_core(
    precision: str, measured: Measured
) -> None:
    ours, stock = ours_and_stock(tiny(*COMMON, *PRECISIONS[precision]))
    measured("tensors compared", len(ours))

    assert different(ours, stock) == []


def test_fp8_gives_other_gradients_than_bf16() -> None:
    fp8, _ = ours_and_stock(tiny(*COMMON, *PRECISIONS["tensorwise"]))
    bf16, _ = ours_and_stock(tiny(*COMMON))

    # The readout is not in FP8, but what comes into it is.
    assert len(different(fp8, bf16)) == len(bf16)
