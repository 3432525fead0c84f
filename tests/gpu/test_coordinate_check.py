"""The coordinate check with TransformerEngine, in bf16 and FP8: muP passes, SP fails."""

from __future__ import annotations

import pytest

from tests.gpu.conftest import Measured
from tests.gpu.coordinates import failing

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(420)]

WIDTHS = (256, 512, 1024, 2048)
COMMON = (
    "transformer_impl=transformer_engine",
    "bf16=true",
    "model.vocab_size=512",
    "model.seq_length=64",
)
PRECISIONS = {
    "bf16": (),
    "FP8 delayed": ("fp8_format=hybrid", "fp8_recipe=delayed", "fp8_amax_history_len=4"),
    "FP8 tensorwise": ("fp8_format=hybrid", "fp8_recipe=tensorwise"),
    "FP8 blockwise": ("fp8_format=hybrid", "fp8_recipe=blockwise"),
}


@pytest.mark.parametrize("precision", PRECISIONS)
def test_mup_keeps_its_coordinates(precision: str, measured: Measured) -> None:
    wrong = failing("baseline", WIDTHS, (*COMMON, *PRECISIONS[precision]))
    measured("modules that fail", str(wrong) if wrong else "none")

    assert wrong == {}


@pytest.mark.parametrize("precision", ["bf16", "FP8 tensorwise"])
def test_sp_grows(precision: str, measured: Measured) -> None:
    wrong = failing("sp_simple", WIDTHS, (*COMMON, *PRECISIONS[precision]))
    measured("modules that fail", str(wrong))

    assert wrong["layer 2 residual"].startswith("grows")
    assert wrong["logits"].startswith("grows")
