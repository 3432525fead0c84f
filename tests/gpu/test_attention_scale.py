"""The attention scale observed in the kernel that runs, under 1/D and under 1/sqrt(D)."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from megatron_mup.model.gpt import build_model
from megatron_mup.training.processes import Launch, parallel_processes
from tests.configurations import tiny
from tests.gpu.attention import backends_called, observed_scale
from tests.gpu.comparison import batch_of, differentiate
from tests.gpu.conftest import Measured
from tests.gpu.test_transformer_engine import ENGINE, OPTIONS

pytestmark = pytest.mark.gpu

# Head dim 64; the measurement itself is good to 0.2%, see observed_scale.
SCALES = {"inverse": 1 / 64, "inverse_sqrt": 1 / 8}


@pytest.mark.parametrize("option", SCALES)
@pytest.mark.parametrize("precision", ["bf16", "FP8"])
def test_cudnns_fused_attention_scales_as_the_table_says(
    option: str, precision: str, measured: Measured
) -> None:
    fp8 = ("fp8_format=hybrid", "fp8_recipe=tensorwise") if precision == "FP8" else ()
    run = tiny(*OPTIONS, "bf16=true", ENGINE, f"attention_scale={option}", *fp8)
    scale = SCALES[option]
    with parallel_processes(run, Launch()):
        model = build_model(run, run.table)
        with backends_called(model) as in_model:
            differentiate(model, batch_of(run))
        with backends_called(model) as alone:
            found = [
                observed_scale(
                    layer.self_attention.core_attention,
                    run.model,
                    expected=scale,
                    like=torch.empty(0, dtype=torch.bfloat16, device="cuda"),
                )
                for layer in model.decoder.layers
            ]
    measured("observed over expected", ", ".join(f"{value / scale:.5f}" for value in found))
    measured("backends in the model", str(dict(in_model)))
    measured("cuDNN backend", _cudnn_backend())

    # Two forward passes of two layers; the backward pass calls no module.
    assert in_model == {"fused_attention": 4}
    assert alone == {"fused_attention": 2}
    assert found == pytest.approx([scale, scale], rel=0.01)


def _cudnn_backend() -> str:
    """What TransformerEngine chose last; its own record."""
    import transformer_engine.pytorch.attention.dot_product_attention as package

    module = package.dot_product_attention
    chosen = module._attention_backends["fused_attention_backend"]
    return (
        f"{chosen} of {Path(module.__file__).parent.name}, cuDNN {torch.backends.cudnn.version()}"
    )
