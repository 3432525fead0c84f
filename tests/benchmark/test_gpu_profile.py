"""A profile adds up busy time, gaps, launches and kernels."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch.autograd import DeviceType

from megatron_mup.benchmark.gpu_profile import profile, render, summarize


def event(name: str, start: float, end: float, *, gpu: bool, mark: bool = False) -> SimpleNamespace:
    return SimpleNamespace(
        name=name,
        time_range=SimpleNamespace(start=start, end=end),
        device_type=DeviceType.CUDA if gpu else DeviceType.CPU,
        is_user_annotation=mark,
    )


EVENTS = [
    event("gemm", 0, 400, gpu=True),
    # Another stream's, half of it beside the first.
    event("copy", 300, 500, gpu=True),
    event("gemm", 600, 900, gpu=True),
    event("ProfilerStep#1", 0, 2000, gpu=True, mark=True),
    event("cudaLaunchKernel", 0, 10, gpu=False),
    event("cudaLaunchKernelExC", 20, 50, gpu=False),
    event("aten::mm", 0, 100, gpu=False),
]


def test_busy_time_is_the_union_of_the_kernels() -> None:
    found = summarize(EVENTS, seconds=2e-3, steps=2, top=1)
    # 500 + 300 of 2000 microseconds, in two steps.
    assert found.busy == pytest.approx(0.4)
    assert found.gaps == pytest.approx(0.6)
    assert found.step_milliseconds == pytest.approx(1.0)
    assert (found.launches, found.launch_milliseconds) == (1.0, pytest.approx(0.02))
    (kernel,) = found.kernels
    assert (kernel.name, kernel.calls) == ("gemm", 1.0)
    assert kernel.milliseconds == pytest.approx(0.35)
    assert kernel.share == pytest.approx(700 / 900)


def test_the_table_names_kernels_and_gaps() -> None:
    lines = render(summarize(EVENTS, seconds=2e-3, steps=2, top=5)).splitlines()
    assert lines[0] == (
        "step 1.0 ms under the profiler; GPU busy 40.0%, gaps 60.0%; 1 launches take the CPU 0.0 ms"
    )
    assert lines[2].split() == ["77.8%", "0.35", "1", "gemm"]


def test_a_step_without_a_gpu_has_a_profile_without_kernels() -> None:
    def step(batch: dict[str, torch.Tensor]) -> float:
        return float((batch["tokens"] * 2).sum())

    found = profile(step, [{"tokens": torch.ones(4)}], steps=2)
    assert found.kernels == ()
    assert (found.busy, found.launches) == (0.0, 0.0)
    assert found.step_milliseconds > 0
