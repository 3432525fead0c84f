"""Defaults have an order and a source; a calibration replaces them or is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_mup.errors import ConfigError
from megatron_mup.planning.assumptions import DEFAULTS, assumptions_for, ends
from megatron_mup.planning.gpus import GpuName, gpu_called


def calibrated(folder: Path, text: str, gpu: GpuName = GpuName.H100) -> dict[str, object]:
    path = folder / "calibration.yaml"
    path.write_text(text)
    return dict(assumptions_for(gpu, path))


def test_every_default_names_unit_and_source() -> None:
    assert all(assumption.unit and assumption.source for assumption in DEFAULTS.values())


def test_the_slow_end_costs_more_and_reaches_less() -> None:
    slow, fast = ends(DEFAULTS)
    for name, assumption in DEFAULTS.items():
        if assumption.known and assumption.slow != assumption.fast:
            costs = name in ("launch_seconds", "collective_seconds")
            assert (getattr(slow, name) > getattr(fast, name)) is costs, name


def test_measured_numbers_take_the_place_of_assumptions(tmp_path: Path) -> None:
    text = """
source: 2 nodes, one afternoon
gpu: H100
matrix_efficiency_bf16: 0.7
overlap: [0.9, 0.6]
collective_seconds: [1.0e-5, 4.0e-5]
compute_tflops_fp8: 800
"""
    path = tmp_path / "calibration.yaml"
    path.write_text(text)
    found = assumptions_for(GpuName.H100, path)
    slow, fast = ends(found)
    assert (slow.matrix_efficiency_bf16, fast.matrix_efficiency_bf16) == (0.7, 0.7)
    assert (slow.overlap, fast.overlap) == (0.6, 0.9)
    assert (slow.collective_seconds, fast.collective_seconds) == (4e-5, 1e-5)
    assert (slow.compute_tflops_fp8, fast.compute_tflops_fp8) == (800, 800)
    assert found["overlap"].source == f"{path}: 2 nodes, one afternoon"
    assert found["nvlink_efficiency"] == DEFAULTS["nvlink_efficiency"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("overlap: 0.5", "'source' is missing"),
        ("source: x\noverlop: 0.5", "unknown name 'overlop'; did you mean 'overlap'"),
        ("source: x\nzzz: 0.5", "unknown name 'zzz'; use one of matrix_efficiency_bf16"),
        ("source: x\noverlap: 1.5", "overlap is 1.5; it must be between 0 and 1"),
        ("source: x\nmatrix_efficiency_fp8: 0", "fp8 is 0; it must be above 0 and at most 1"),
        ("source: x\nreserve: [0.1, 0.2]", r"reserve is \[0.1, 0.2\]; it takes a number"),
        ("source: x\noverlap: yes", "overlap is True; it takes a number or a list of two"),
        ("source: x\noverlap: []", "it takes a number or a list of two"),
        ("source: x\ngpus_per_node: 2.5", "gpus_per_node is 2.5; it must be a whole number"),
        ("source: x\ncompute_tflops_bf16: .nan", "compute_tflops_bf16 is nan; it must be above 0"),
        ("source: x\nlaunch_seconds: -1", "launch_seconds is -1; it must be 0 or more"),
        ("source: x\ngpu: h200", "was measured on h200, but the plan is for --gpu h100"),
        ("- 1", "must be a mapping"),
        ("a: [", "is not valid YAML"),
    ],
)
def test_a_wrong_calibration_is_refused(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        calibrated(tmp_path, text)


def test_an_absent_calibration_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot read --calibration"):
        assumptions_for(GpuName.H100, tmp_path / "none.yaml")


def test_gpus_are_those_of_the_data_sheets() -> None:
    known = {name: gpu_called(name) for name in ("h100", "H200", "b200")}
    assert [gpu.memory_gb for gpu in known.values()] == [80, 141, 180]
    assert [gpu.memory_terabytes_per_second for gpu in known.values()] == [3.35, 4.8, 8.0]
    assert [gpu.nvlink_gigabytes_per_second for gpu in known.values()] == [450, 450, 900]
    assert [gpu.peak_flops(fp8=True) for gpu in known.values()] == [1978.9e12, 1978.9e12, 4500e12]
    assert [gpu.peak_flops(fp8=False) for gpu in known.values()] == [989.4e12, 989.4e12, 2250e12]
    with pytest.raises(ConfigError, match="--gpu 'a100' is not known; use one of h100, h200, b200"):
        gpu_called("a100")
