"""The command reads its arguments, prints the plan, writes JSON, and refuses with a message."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner, Result

from megatron_mup.cli import app
from megatron_mup.errors import ConfigError
from megatron_mup.planning.report import interval
from tests.configurations import TINY

RUN: dict[str, dict[str, Any]] = {
    **TINY,
    "model": {**TINY["model"], "transformer_impl": "transformer_engine"},
    "precision": {"bf16": True},
}


def plan(folder: Path, *arguments: str, sections: dict[str, Any] = RUN) -> Result:
    config = folder / "config.yaml"
    config.write_text(yaml.safe_dump(sections))
    given = ["plan", "--config", str(config), "--gpu", "h100", "--gpus", "2", *arguments]
    return CliRunner().invoke(app, given)


def test_the_plan_ends_with_the_best_layouts_options(tmp_path: Path) -> None:
    file = tmp_path / "plan.json"
    shown = plan(tmp_path, "--top", "2", "--json", str(file), "seq_length=32")
    assert shown.exit_code == 0, shown.output
    data = json.loads(file.read_text())
    assert len(data["layouts"]) == 2
    options = data["layouts"][0]["options"]
    assert yaml.safe_load(shown.stdout.split("and as YAML:\n")[1]) == options
    line = shown.stdout.split("best layout, as arguments:\n")[1].splitlines()[0].split()
    assert line == [
        f"{key}={json.dumps(value).strip(chr(34))}"
        for section in options.values()
        for key, value in section.items()
    ]
    # 2 x 12 x 64 x 64 and 2 x 96 x 64.
    assert "110,592" in shown.stdout
    for assumption in ("matrix_efficiency_fp8", "overlap", "reserve", "NVIDIA H100 data sheet"):
        assert assumption in shown.stdout


def test_the_configurations_own_layout_is_shown_wherever_it_ranks(tmp_path: Path) -> None:
    own = (
        *("tensor_model_parallel_size=2", "sequence_parallel=true", "micro_batch_size=1"),
        *("recompute_granularity=full", "recompute_method=uniform", "recompute_num_layers=1"),
    )
    shown = plan(tmp_path, "--top", "1", *own)
    rows = [line.split("│")[1:-1] for line in shown.stdout.splitlines() if line.startswith("│")]
    ranked = [[cell.strip() for cell in row] for row in rows if len(row) == 16]
    first, own_row = ranked
    assert first[0] == "1"
    assert (own_row[1], own_row[5], own_row[7]) == ("2", "1", "full")


def test_a_learning_rate_is_not_needed(tmp_path: Path) -> None:
    without = {**RUN, "optimizer": {}}
    assert plan(tmp_path, sections=without).exit_code == 0
    assert plan(tmp_path, "lr=0.5", sections=without).exit_code == 0


def test_a_calibration_is_read_and_named(tmp_path: Path) -> None:
    file = tmp_path / "measured.yaml"
    file.write_text("source: one H100, step of 6 May\ncompute_tflops_bf16: 321\n")
    shown = plan(tmp_path, "--calibration", str(file))
    assert "321" in shown.stdout
    assert "step of 6 May" in shown.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--gpu", "tpu"), "--gpu 'tpu' is not known"),
        (("--gpus", "0"), "--gpus is 0"),
        (("--top", "0"), "--top is 0"),
        (("--calibration", "none.yaml"), "cannot read --calibration 'none.yaml'"),
        (("--json", "none/plan.json"), "cannot write --json 'none/plan.json'"),
        (("hidden=3",), "unknown key 'hidden'|did you mean"),
    ],
)
def test_wrong_arguments_are_refused(
    tmp_path: Path, arguments: tuple[str, ...], message: str
) -> None:
    refused = plan(tmp_path, *arguments)
    assert isinstance(refused.exception, ConfigError)
    with pytest.raises(ConfigError, match=message):
        raise refused.exception


@pytest.mark.parametrize(
    ("low", "high", "text"),
    [
        (3123.0, 6789.0, "3,100-6,800"),
        (1.94, 4.2, "1.9-4.2"),
        (0.0721, 0.16, "0.072-0.16"),
        (2.0, 2.0, "2"),
        (1234.5, 1234.5, "1,230"),
        (24.4, 51.2, "24-51"),
    ],
)
def test_intervals_have_two_digits_and_single_numbers_three(
    low: float, high: float, text: str
) -> None:
    assert interval(low, high) == text
