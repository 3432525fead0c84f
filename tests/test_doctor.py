import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_mup import doctor
from megatron_mup.doctor import Component, Device, Extension, Facts

CPU_MACHINE = Facts(
    python="3.12.1",
    cpu_cores=2,
    components=(Component("torch", "2.11.0"), Component("transformer-engine", None)),
    torch_cuda="13.0",
    cudnn=91900,
    backends=("gloo", "nccl"),
)
HOPPER_MACHINE = dataclasses.replace(
    CPU_MACHINE,
    components=(Component("torch", "2.11.0"), Component("transformer-engine", "2.20.2")),
    devices=(Device("NVIDIA H100", (9, 0), 79.6),),
    extensions=(
        Extension("transformer_engine.pytorch", installed=True),
        Extension("fused_weight_gradient_mlp_cuda", installed=True),
        Extension("apex.optimizers", installed=True),
    ),
)


def off(facts: Facts) -> list[str]:
    return [kernel.name for kernel in doctor.diagnose(facts).kernels if not kernel.active]


def test_without_gpu_names_all_that_is_missing_for_fp8():
    report = doctor.diagnose(CPU_MACHINE)

    assert not report.fp8_ready
    assert [lack.what for lack in report.fp8_lacks] == [
        "a CUDA device (torch is built for CUDA 13.0)",
        "transformer_engine.pytorch is not installed",
        "compute capability 8.9 or higher for FP8",
    ]


def test_torch_built_without_cuda_is_named_as_such():
    report = doctor.diagnose(dataclasses.replace(CPU_MACHINE, torch_cuda=None))

    assert report.fp8_lacks[0].what == "torch with CUDA"
    assert "requirements.lock" in report.fp8_lacks[0].cure


def test_hopper_with_transformer_engine_and_apex_is_ready_for_fp8_and_uses_every_kernel():
    report = doctor.diagnose(HOPPER_MACHINE)

    assert report.fp8_ready
    assert report.fp8_lacks == ()
    assert off(HOPPER_MACHINE) == []
    assert "What to do" not in doctor.render(report)


@pytest.mark.parametrize(
    ("capability", "ready"), [((8, 0), False), ((8, 8), False), ((8, 9), True), ((10, 0), True)]
)
def test_fp8_needs_compute_capability_8_9(capability: tuple[int, int], ready: bool):
    facts = dataclasses.replace(HOPPER_MACHINE, devices=(Device("GPU", capability, 40.0),))

    assert doctor.diagnose(facts).fp8_ready is ready


def test_one_old_gpu_among_new_ones_is_named():
    devices = (Device("NVIDIA H100", (9, 0), 80.0), Device("NVIDIA A100", (8, 0), 40.0))
    facts = dataclasses.replace(HOPPER_MACHINE, devices=devices)

    assert [lack.what for lack in doctor.diagnose(facts).fp8_lacks] == [
        "compute capability 8.9 or higher for FP8; cuda:1 NVIDIA A100 has 8.0"
    ]


def test_gpu_below_8_0_has_no_fused_attention():
    facts = dataclasses.replace(HOPPER_MACHINE, devices=(Device("NVIDIA V100", (7, 0), 32.0),))

    assert off(facts) == [
        "fused attention (TransformerEngine, cuDNN)",
        "flash attention (PyTorch)",
    ]


def test_missing_cudnn_turns_off_only_its_attention():
    facts = dataclasses.replace(HOPPER_MACHINE, cudnn=None)

    assert off(facts) == ["fused attention (TransformerEngine, cuDNN)"]


def test_missing_apex_turns_off_the_fused_weight_gradient_and_gives_its_source_build():
    engine_only = dataclasses.replace(HOPPER_MACHINE, extensions=HOPPER_MACHINE.extensions[:1])
    report = doctor.diagnose(engine_only)

    assert off(engine_only) == ["fused weight gradient (apex, fused_weight_gradient_mlp_cuda)"]
    assert (
        "git clone https://github.com/NVIDIA/apex && cd apex && APEX_CPP_EXT=1 APEX_CUDA_EXT=1 "
        "python -m pip install -v --no-build-isolation ." in doctor.render(report)
    )


def test_apex_alone_gives_the_fused_adam_but_not_the_fused_layers():
    facts = dataclasses.replace(HOPPER_MACHINE, extensions=HOPPER_MACHINE.extensions[1:])

    assert off(facts) == [
        "fused layers (TransformerEngine)",
        "fused attention (TransformerEngine, cuDNN)",
    ]


def test_extension_that_fails_to_import_is_reported_with_its_error():
    broken = Extension(
        "transformer_engine.pytorch", installed=True, error="OSError: libcudnn.so.9 not found"
    )
    report = doctor.diagnose(dataclasses.replace(HOPPER_MACHINE, extensions=(broken,)))

    assert [lack.what for lack in report.fp8_lacks] == [
        "transformer_engine.pytorch fails to import: OSError: libcudnn.so.9 not found"
    ]


def test_read_facts_finds_the_error_of_a_broken_extension(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "fused_weight_gradient_mlp_cuda.py").write_text(
        "raise OSError('undefined symbol: _ZN3c10\\nsecond line')"
    )
    monkeypatch.syspath_prepend(tmp_path)

    extension = doctor.read_facts().extension("fused_weight_gradient_mlp_cuda")

    assert extension.installed
    assert not extension.loads
    assert extension.error == "OSError: undefined symbol: _ZN3c10"


def test_nccl_is_listed_only_with_a_cuda_device():
    assert doctor.diagnose(CPU_MACHINE).backends == ("gloo",)
    assert doctor.diagnose(HOPPER_MACHINE).backends == ("gloo", "nccl")


def test_render_shows_versions_devices_kernels_and_each_cure_once():
    hopper = doctor.render(doctor.diagnose(HOPPER_MACHINE))
    cpu = doctor.render(doctor.diagnose(CPU_MACHINE))

    assert "  transformer-engine   2.20.2\n" in hopper
    assert "  cuda:0 NVIDIA H100, compute capability 9.0, 80 GiB\n" in hopper
    assert "  on   fused layers (TransformerEngine)\n" in hopper
    assert hopper.endswith("FP8\n  ready")
    assert "  transformer-engine   not installed\n" in cpu
    assert "FP8\n  not ready\n       missing: a CUDA device" in cpu
    assert cpu.count("git clone") == 1
    assert cpu.count('".[gpu]"') == 1


def test_report_of_this_machine_serializes_to_json_with_its_torch_version():
    report = json.loads(json.dumps(dataclasses.asdict(doctor.collect())))

    assert {"name": "torch", "version": "2.11.0"} in report["components"]
    assert {"name": "megatron-core", "version": "0.19.2"} in report["components"]
    assert "gloo" in report["backends"]


def test_collecting_does_not_import_megatron():
    code = (
        "import sys; from megatron_mup import doctor; imported_torch = 'torch' in sys.modules; "
        "doctor.collect(); print(imported_torch, 'megatron' in sys.modules)"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120
    )

    assert result.stdout == "False False\n"


def test_a_machine_without_torch_still_gets_a_report(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(doctor, "_try_import", lambda module: Extension(module, installed=False))

    report = doctor.collect()

    assert report.torch_cuda is None
    assert report.backends == ()
    assert report.fp8_lacks[0].what == "torch with CUDA"
