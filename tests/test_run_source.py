"""Where a configuration comes from: a file, a preset, or a file over a preset."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from megatron_mup import cli
from megatron_mup.config_io import config_from_dict
from megatron_mup.errors import ConfigError, MupError, ParameterizationError
from megatron_mup.parameterization.presets import preset_settings
from megatron_mup.run_source import RunSource

_DATA = "data:\n  train_data_path: [shards/a]\ntraining:\n  eval_iters: 0\n"


@pytest.fixture
def data_file(tmp_path: Path) -> Path:
    path = tmp_path / "data.yaml"
    path.write_text(_DATA)
    return path


def test_a_preset_alone_is_its_settings() -> None:
    run = RunSource(preset="sqrelu", width=256).load()
    assert run == config_from_dict(preset_settings("sqrelu", width=256))
    assert (run.model.activation, run.model.num_attention_heads) == ("squared_relu", 2)


def test_sizes_of_the_command_line_reach_the_preset() -> None:
    run = RunSource(preset="baseline", width=64, head_dim=16, base_width=32).load()
    assert (run.model.head_dim, run.model.num_attention_heads) == (16, 4)
    assert run.parameterization.base_hidden_size == 32
    assert run.parameterization.base_ffn_hidden_size == 128
    # Unset: one head is the base.
    assert RunSource(preset="baseline", width=64, head_dim=16).load().parameterization == (
        config_from_dict(preset_settings("baseline", width=64, head_dim=16)).parameterization
    )


def test_a_file_goes_over_the_preset_and_overrides_over_both(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(_DATA + "  train_iters: 300\nschedule: {lr_warmup_iters: 20}\n")
    source = RunSource(config=path, preset="baseline", width=128)
    run = source.load(["schedule.lr_warmup_iters=30", "lr=0.25"])
    assert run.data.train_data_path == ["shards/a"]
    # From the preset, the file, and the command line.
    assert run.data.sample_layout == "document"
    assert run.training.global_batch_size == 1024
    assert run.training.train_iters == 300
    assert run.schedule.lr_warmup_iters == 30
    assert run.optimizer.lr == 0.25


def test_a_file_alone_needs_no_preset(tmp_path: Path) -> None:
    path = tmp_path / "whole.yaml"
    path.write_text(json.dumps(preset_settings("cosine", width=128)))
    assert RunSource(config=path).load() == RunSource(preset="cosine", width=128).load()


@pytest.mark.parametrize("given", ["lr=0.5", "optimizer.lr=0.5", "file"])
def test_a_peak_that_is_not_published_can_be_given_anywhere(given: str, tmp_path: Path) -> None:
    path = tmp_path / "lr.yaml"
    path.write_text("optimizer: {lr: 0.5}\n" if given == "file" else "{}\n")
    overrides = [] if given == "file" else [given]
    run = RunSource(config=path, preset="lion", width=128).load(overrides)
    assert run.optimizer.lr == 0.5


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ({}, "--config FILE or --preset NAME --width M is missing"),
        ({"preset": "baseline"}, "--preset baseline needs --width M"),
        ({"preset": "baselin", "width": 128}, "did you mean 'baseline'"),
        ({"preset": "baseline", "width": 100}, "not a positive multiple of the head dim 128"),
        ({"preset": "lion", "width": 128}, "no peak learning rate of preset lion is published"),
        ({"width": 128}, "--width 128 belongs to --preset"),
        ({"head_dim": 16}, "--head-dim 16 belongs to --preset"),
        ({"base_width": 16}, "--base-width 16 belongs to --preset"),
    ],
)
def test_an_incomplete_source_says_what_is_missing(source: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        RunSource(**source).load()
    assert message in str(error.value)


@pytest.mark.parametrize("option", ["width", "head_dim", "base_width"])
def test_sizes_of_a_preset_are_refused_beside_a_whole_file(option: str, data_file: Path) -> None:
    with pytest.raises(ConfigError, match="belongs to --preset"):
        RunSource(config=data_file, **{option: 128}).load()


@pytest.mark.parametrize(
    ("text", "overrides", "kind", "message"),
    [
        ("model: {hiden_size: 5}", [], ConfigError, "did you mean"),
        ("model: 5", [], ConfigError, "must be a mapping"),
        # Names that go together are found together.
        ("model: {ffn_hidden_size: 512}", [], ConfigError, "both set the FFN width"),
        ("{}", ["train_iters=50"], ConfigError, "shorten the warmup"),
        ("{}", ["global_batch_size=4"], ConfigError, "micro_batch_size 8"),
        ("{}", ["name=abs_mup"], ParameterizationError, "ffn_out_lr_ratio unset"),
        ("{}", ["lr"], ConfigError, "write key=value"),
    ],
)
def test_what_does_not_fit_the_preset_is_refused_with_the_cure(
    text: str, overrides: list[str], kind: type[MupError], message: str, tmp_path: Path
) -> None:
    path = tmp_path / "over.yaml"
    path.write_text(text + "\n")
    with pytest.raises(kind, match=message):
        RunSource(config=path, preset="baseline", width=128).load(overrides)


def test_describe_takes_a_preset(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = "--preset wd_indep_n4 --width 64 --head-dim 16 num_layers=1 --json"
    monkeypatch.setattr(sys, "argv", ["megatron-mup", "describe", *flags.split()])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert not stopped.value.code
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)}
    # m = 4: 2^-6 / 4, and 1e-4 of every weight a step.
    assert rows["output_layer.weight"]["lr"] == 0.00390625
    assert {round(row["decay_per_step"], 12) for row in rows.values()} == {1e-4}
