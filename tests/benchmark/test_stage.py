"""Stages of a model alone: what they hold, what they compute, and the plan beside them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from megatron.core.transformer.module import MegatronModule

from megatron_mup.benchmark import stage, stage_measure
from megatron_mup.benchmark.gpu_models import Precision
from megatron_mup.benchmark.stage import chosen, stage_run
from megatron_mup.benchmark.stage_measure import (
    ALONE,
    StageMeasurement,
    StageParts,
    measure_stage,
    predict,
    stage_contents,
    stage_flops,
)
from megatron_mup.benchmark.stage_report import StageReport
from megatron_mup.config import RunConfig
from megatron_mup.errors import ConfigError
from megatron_mup.planning.assumptions import assumptions_for, ends
from megatron_mup.planning.gpus import GpuName, gpu_called
from tests.configurations import TINY, tiny

TEN_BILLION = Path("launch/configs/mup_10b.yaml")
LAYERS = StageParts(layers=2)


def test_a_stage_of_the_ten_billion_model_has_its_real_layers_and_microbatch() -> None:
    run = stage_run(TEN_BILLION, LAYERS, Precision.FP8, ())
    contents = stage_contents(run, LAYERS)
    # 12 M^2 of a layer; the final norm has no gain.
    assert contents.matrix_elements == 2 * 12 * 8192**2
    assert contents.other_elements == 0
    assert run.training.micro_batch_size == run.training.global_batch_size == 32
    assert run.precision.fp8_format == "hybrid"
    assert stage_run(TEN_BILLION, LAYERS, Precision.BF16, ()).precision.fp8_format is None


def test_ends_are_counted_where_they_are() -> None:
    run = stage_run(TEN_BILLION, LAYERS, Precision.BF16, ())
    matrix = 32_128 * 8192
    for parts, elements in (
        (StageParts(layers=2, embedding=True), matrix),
        (StageParts(layers=2, readout=True), matrix),
        (StageParts(layers=2, embedding=True, readout=True), 2 * matrix),
    ):
        assert stage_contents(run, parts).other_elements == elements
        assert stage_contents(run, parts).readout is parts.readout


def test_flops_are_those_of_the_parts() -> None:
    run = stage_run(TEN_BILLION, LAYERS, Precision.BF16, ())
    tokens = 32 * 256
    layers = 6 * 12 * 2 * 8192**2 + 12 * 2 * 256 * 8192
    assert stage_flops(run, LAYERS) == tokens * layers
    readout = StageParts(layers=2, readout=True)
    assert stage_flops(run, readout) == tokens * (layers + 6 * 8192 * 32_128)


def test_tied_matrices_are_refused() -> None:
    options = ("untie_embeddings_and_output_weights=false", "output_form=multiplier", "name=mup")
    run = stage_run(TEN_BILLION, LAYERS, Precision.BF16, options)
    with pytest.raises(ConfigError, match="untie_embeddings_and_output_weights=true"):
        stage_contents(run, LAYERS)


def measurement(compute: float, *, peak: int = 0) -> StageMeasurement:
    return StageMeasurement(
        forward=compute / 3, backward=2 * compute / 3, update=0.01, peak_bytes=peak, context_bytes=0
    )


def test_calibration_takes_the_measured_rate_and_other_stages_show_its_error() -> None:
    report = StageReport(gpu_called("h200"))
    three = StageParts(layers=3)
    for parts, seconds in ((LAYERS, 0.200), (three, 0.330)):
        run = stage_run(TEN_BILLION, parts, Precision.BF16, ())
        report.add(Precision.BF16, parts, run, measurement(seconds))
    # 8192 tokens x 9.714e9 FLOPs of two layers in 0.2 s.
    assert report.calibration()["compute_tflops_bf16"] == pytest.approx(397.9, abs=0.1)
    two_layers, three_layers = report.plain()["stages"]
    assert two_layers["calibrates"]
    assert two_layers["error_after"] == pytest.approx(0, abs=1e-3)
    # Three layers at that rate take 0.3 s, a tenth less than what was measured.
    assert three_layers["after_ms"] == pytest.approx(300, rel=1e-3)
    assert three_layers["error_after"] == pytest.approx(0.300 / 0.330 - 1, abs=1e-3)
    assert two_layers["memory_error"] is None


def test_the_calibration_is_what_a_plan_reads(tmp_path: Path) -> None:
    report = StageReport(gpu_called("h200"))
    run = stage_run(TEN_BILLION, LAYERS, Precision.BF16, ())
    report.add(Precision.BF16, LAYERS, run, measurement(0.2))
    path = tmp_path / "calibration.yaml"
    path.write_text(yaml.safe_dump(report.calibration()))
    assumptions = assumptions_for(GpuName.H200, path)
    seconds = [
        predict(run, LAYERS, gpu=gpu_called("h200"), rates=rates).compute
        for rates in ends(assumptions)
    ]
    assert seconds == pytest.approx([0.2, 0.2], rel=1e-3)


def test_memory_is_compared_with_the_plans() -> None:
    report = StageReport(gpu_called("h200"))
    run = stage_run(TEN_BILLION, LAYERS, Precision.BF16, ())
    planned = predict(
        run, LAYERS, gpu=gpu_called("h200"), rates=ends(assumptions_for(GpuName.H200, None))[0]
    )
    report.add(Precision.BF16, LAYERS, run, measurement(0.2, peak=int(planned.peak_bytes / 1.1)))
    (row,) = report.plain()["stages"]
    assert row["memory_error"] == pytest.approx(0.1, abs=1e-6)
    # bf16 weights 2, fp32 gradients 4, main weights 4, Lion's moment 4, of 1.61e9 elements.
    assert row["planned_gib"] > 14 * 2 * 12 * 8192**2 / 2**30


def test_the_command_measures_every_stage_on_this_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "tiny.yaml"
    config.write_text(yaml.safe_dump(TINY))
    output, calibration = tmp_path / "stage.json", tmp_path / "calibration.yaml"
    monkeypatch.setattr(stage_measure, "WARMUP_STEPS", 1)
    arguments = (
        "--config", str(config), "--layers", "1,2", "--ends", "none,embedding,readout,both",
        "--precision", "bf16", "--steps", "2",
        "--output", str(output), "--calibration", str(calibration),
    )  # fmt: skip
    monkeypatch.setattr("sys.argv", ["stage", *arguments])
    with pytest.raises(SystemExit) as ended:
        stage.main()
    assert not ended.value.code
    rows = json.loads(output.read_text())["stages"]
    assert [row["stage"] for row in rows] == [
        "1 layers",
        "2 layers",
        "1 layers + embedding",
        "1 layers + readout",
        "1 layers + embedding + readout",
    ]
    assert all(min(row["forward_ms"], row["backward_ms"], row["update_ms"]) > 0 for row in rows)
    assert yaml.safe_load(calibration.read_text())["compute_tflops_bf16"] > 0
    assert "1 layers + embedding" in capsys.readouterr().out


def test_every_step_quantizes_its_weights_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    steps = []
    monkeypatch.setattr(MegatronModule, "set_is_first_microbatch", lambda _self: steps.append(1))
    monkeypatch.setattr(stage_measure, "WARMUP_STEPS", 1)
    measure_stage(tiny("global_batch_size=2", *ALONE), LAYERS, steps=3)
    assert len(steps) == 1 + 3


def test_a_stage_that_fails_leaves_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def measured(run: RunConfig, parts: StageParts, *, steps: int) -> StageMeasurement:
        if parts.layers == 1:
            raise RuntimeError("CUDA out of memory")
        return measurement(0.2)

    monkeypatch.setattr(stage, "measure_stage", measured)
    config = tmp_path / "tiny.yaml"
    config.write_text(yaml.safe_dump(TINY))
    output = tmp_path / "stage.json"
    arguments = (
        "--config", str(config), "--layers", "1,2", "--ends", "none",
        "--precision", "bf16", "--output", str(output),
    )  # fmt: skip
    monkeypatch.setattr("sys.argv", ["stage", *arguments])
    with pytest.raises(SystemExit) as ended:
        stage.main()
    assert ended.value.code == 1
    report = json.loads(output.read_text())
    assert [row["stage"] for row in report["stages"]] == ["2 layers"]
    assert report["failed"] == {"1 layers, bf16": "RuntimeError: CUDA out of memory"}
    printed = capsys.readouterr()
    assert "1 layers, bf16: RuntimeError: CUDA out of memory" in printed.err
    assert "2 layers" in printed.out


@pytest.mark.parametrize(
    ("layers", "stage_ends", "precision", "message"),
    [
        ("2,x", "none", "bf16", "--layers is '2,x'"),
        ("0", "none", "bf16", "--layers is '0'"),
        ("2", "head", "bf16", "--ends has 'head'; use some of none,embedding,readout,both"),
        ("2", "none", "fp4", "--precision has 'fp4'; use some of bf16,fp8"),
    ],
)
def test_unknown_stages_are_refused(
    layers: str, stage_ends: str, precision: str, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        chosen(layers, stage_ends, precision)


def test_fp8_of_a_configuration_without_it_is_refused(tmp_path: Path) -> None:
    config = tmp_path / "tiny.yaml"
    config.write_text(yaml.safe_dump(TINY))
    with pytest.raises(ConfigError, match=r"sets no FP8; add precision\.fp8_format=hybrid"):
        stage_run(config, StageParts(layers=1), Precision.FP8, ())
