"""The machine itself: what is installed and found, and that a first kernel of each kind runs."""

from __future__ import annotations

import pytest
import torch

from megatron_mup import doctor
from tests.gpu.conftest import Measured

pytestmark = pytest.mark.gpu


def test_every_kernel_but_apex_is_on_and_fp8_is_ready(measured: Measured) -> None:
    report = doctor.collect()
    for component in report.components:
        measured(component.name, component.version or "not installed")
    for device in report.devices:
        measured(device.name, f"{device.memory_gib:.1f} GiB, capability {device.capability}")
    off = [kernel.name for kernel in report.kernels if not kernel.active]
    measured("kernels that are off", ", ".join(off) or "none")

    assert report.fp8_ready, [lack.what for lack in report.fp8_lacks]
    assert all("apex" in name for name in off)


def test_an_fp8_product_of_transformer_engine_is_right_to_fp8s_precision(
    measured: Measured,
) -> None:
    import transformer_engine.pytorch as engine
    from transformer_engine.common.recipe import Float8CurrentScaling

    torch.manual_seed(0)
    layer = engine.Linear(256, 256, bias=False, params_dtype=torch.bfloat16, device="cuda")
    x = torch.randn(128, 256, dtype=torch.bfloat16, device="cuda")
    with engine.autocast(enabled=True, recipe=Float8CurrentScaling()):
        product = layer(x)
    exact = x.double() @ layer.weight.double().t()
    error = float((product.double() - exact).norm() / exact.norm())
    measured("relative error", error)

    # E4M3 keeps 4 bits of significand: a factor is off by at most 2^-4 and 0.026 on average (root
    # mean square of a uniform error, over the octave); two factors, independent: 0.036.
    assert 0.01 < error < 0.06


def test_the_products_rate_is_near_the_cards(measured: Measured) -> None:
    size, repeats = 8192, 20
    left, right = (torch.randn(size, size, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    for _ in range(3):
        left @ right
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(repeats):
        left @ right
    end.record()
    torch.cuda.synchronize()
    tflops = 2 * size**3 * repeats / (start.elapsed_time(end) * 1e-3) / 1e12
    measured("TFLOP/s of an 8192^3 product in bf16", tflops)

    # A card that is shared or throttled would make every other number meaningless.
    assert tflops > 600
