"""The whole speed benchmark on a CPU at a tiny size, with the local spec in the engine's place."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_mup.benchmark import gpu_contest, gpu_speed
from megatron_mup.benchmark.contestants import TrainStep
from megatron_mup.benchmark.gpu_contest import MUP, PLAIN, SP, STOCK, chosen, pairings
from megatron_mup.benchmark.gpu_models import Precision
from megatron_mup.benchmark.gpu_report import comparison_table, missed, speed_table
from megatron_mup.config import RunConfig
from megatron_mup.errors import ConfigError

BF16, FP8 = Precision.BF16, Precision.FP8
SIZES = ("--width", "32", "--depth", "1", "--seq-length", "16", "--micro-batch-size", "2")
ON_CPU = ("transformer_impl=local", "bf16=false", "vocab_size=96")


def run_command(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr("sys.argv", ["gpu_speed", *SIZES, *arguments])
    with pytest.raises(SystemExit) as ended:
        gpu_speed.main()
    return ended.value.code if isinstance(ended.value.code, int) else 0


def test_every_contestant_is_compared_in_every_precision_that_it_has() -> None:
    assert pairings([SP, STOCK, PLAIN], [BF16, FP8]) == [
        [(MUP, BF16), (SP, BF16)],
        [(MUP, BF16), (STOCK, BF16)],
        [(MUP, BF16), (PLAIN, BF16)],
        [(MUP, FP8), (SP, FP8)],
        [(MUP, FP8), (STOCK, FP8)],
        [(MUP, FP8), (MUP, BF16)],
    ]
    assert pairings([], [FP8]) == []


def test_all_contestants_run_and_everything_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("megatron_mup.benchmark.gpu_report.STOCK_LIMIT", 1000.0)
    output = tmp_path / "speed.json"
    code = run_command(
        monkeypatch, "--precision", "bf16", "--pairs", "2", "--output", str(output),
        "--no-compiled", *ON_CPU,
    )  # fmt: skip
    report = json.loads(output.read_text())
    assert code == 0
    assert [row["name"] for row in report["speeds"]] == [MUP, SP, STOCK, PLAIN]
    # muP stands in each of three comparisons of two steps.
    assert [row["steps"] for row in report["speeds"]] == [6, 2, 2, 2]
    assert [(row["second"], row["met"]) for row in report["comparisons"]] == [
        ("SP bf16", True),
        ("stock Megatron-Core bf16", True),
        ("plain PyTorch bf16", None),
    ]
    assert report["options"] == list(ON_CPU)
    assert report["failed"] == {}
    printed = capsys.readouterr().out
    assert speed_table(report["speeds"]) in printed
    assert comparison_table(report["comparisons"]) in printed


def test_one_at_a_time_and_a_limit_that_is_missed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("megatron_mup.benchmark.gpu_report.STOCK_LIMIT", 0.001)
    output = tmp_path / "speed.json"
    code = run_command(
        monkeypatch, "--precision", "bf16", "--against", "stock", "--pairs", "2", "--alone",
        "--output", str(output), *ON_CPU,
    )  # fmt: skip
    report = json.loads(output.read_text())
    assert code == 1
    assert [row["paired"] for row in report["comparisons"]] == [False]
    assert [row["steps"] for row in report["speeds"]] == [2, 2]
    assert (
        "muP bf16 against stock Megatron-Core bf16: the interval ends at" in capsys.readouterr().err
    )


def test_a_contestant_that_fails_leaves_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def without_memory(run: RunConfig) -> TrainStep:
        raise RuntimeError("CUDA out of memory")

    monkeypatch.setattr(gpu_contest, "stock_contestant", without_memory)
    monkeypatch.setattr("megatron_mup.benchmark.gpu_report.STOCK_LIMIT", 1000.0)
    output = tmp_path / "speed.json"
    code = run_command(
        monkeypatch, "--precision", "bf16", "--against", "stock,sp", "--pairs", "2",
        "--output", str(output), *ON_CPU,
    )  # fmt: skip
    report = json.loads(output.read_text())
    assert code == 1
    assert report["failed"] == {
        "muP bf16 against stock Megatron-Core bf16": "RuntimeError: CUDA out of memory"
    }
    assert [row["name"] for row in report["speeds"]] == [MUP, SP]


def test_mup_alone_is_measured_or_profiled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = tmp_path / "speed.json"
    common = ("--precision", "bf16", "--against", "", "--output", str(output), *ON_CPU)
    assert run_command(monkeypatch, "--pairs", "3", *common) == 0
    (row,) = json.loads(output.read_text())["speeds"]
    assert (row["name"], row["steps"], row["verdict"]) == (MUP, 3, "nothing asked")
    assert row["mfu"] is None

    assert run_command(monkeypatch, "--profile", *common) == 0
    report = json.loads(output.read_text())
    assert list(report["profiles"]) == ["muP bf16"]
    assert report["speeds"] == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--against", "sp,torch"), "--against is 'sp,torch'; use some of sp,stock,plain"),
        (("--precision", "fp4"), "--precision is 'fp4'; use some of bf16,fp8"),
        (("--pairs", "1"), "--pairs is 1; an interval needs at least 2"),
        (("recompute_granularity=all", *ON_CPU), "recompute_granularity"),
        (
            ("activation=swiglu", *ON_CPU),
            "the plain PyTorch GPT of the benchmark has no activation",
        ),
        (("--precision", "bf16"), "needs TransformerEngine"),
    ],
)
def test_wrong_options_are_refused_before_anything_runs(
    arguments: tuple[str, ...],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def never(run: RunConfig) -> TrainStep:
        raise AssertionError

    monkeypatch.setattr(gpu_contest, "mup_contestant", never)
    assert run_command(monkeypatch, *arguments) == 2
    assert message in capsys.readouterr().err


def test_a_demand_that_is_not_met_is_named() -> None:
    report: dict[str, Any] = {
        "speeds": [
            {"name": MUP, "precision": "bf16", "verdict": "BELOW 450 TFLOP/s"},
            {"name": SP, "precision": "bf16", "verdict": ""},
        ],
        "comparisons": [],
        "failed": {"profile of muP fp8": "RuntimeError: no kernel image"},
    }
    assert missed(report) == [
        "muP bf16: BELOW 450 TFLOP/s",
        "profile of muP fp8: RuntimeError: no kernel image",
    ]


def test_a_precision_named_twice_is_refused() -> None:
    with pytest.raises(ConfigError, match="--precision is 'bf16,bf16'"):
        chosen("sp", "bf16,bf16")
