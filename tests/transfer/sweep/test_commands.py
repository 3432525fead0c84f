"""The commands: what they pass on, print, and end with."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from megatron_mup.cli import app
from megatron_mup.errors import ConfigError
from megatron_mup.transfer.sweep import session
from megatron_mup.transfer.sweep.folder import SweepFolder
from megatron_mup.transfer.sweep.pool import Share
from megatron_mup.transfer.sweep.session import RunRequest
from megatron_mup.transfer.sweep.spec import load_sweep
from tests.transfer.sweep.sweeps import cells_of, write_sweep


def test_run_passes_its_options_on_and_ends_with_the_sweeps_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    requests: list[RunRequest] = []

    def fake(request: RunRequest, _echo: object) -> int:
        requests.append(request)
        return 75

    monkeypatch.setattr(session, "run_sweep", fake)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,3")
    options = "--workers 3 --threads 2 --gpu-share 2 --only mup --only sp/64 --max-cells 5 --text t"
    arguments = ["sweep", "run", "s.yaml", "--out", str(tmp_path), *options.split()]
    assert CliRunner().invoke(app, arguments).exit_code == 75
    assert requests == [
        RunRequest(
            config=Path("s.yaml"),
            out=tmp_path,
            text=(Path("t"),),
            share=Share(workers=3, threads=2, gpus=("2", "3"), gpu_share=2),
            only=("mup", "sp/64"),
            max_cells=5,
        )
    ]


def test_plan_writes_nothing(tmp_path: Path) -> None:
    config = write_sweep(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    done = CliRunner().invoke(app, ["sweep", "plan", str(config), "--out", str(tmp_path / "out")])
    assert done.exit_code == 0
    assert "| 64 | base | 61,440 | 49,152 | 10 | 640 | 2.35e+08 | 2 to 4 |" in done.output
    assert sorted(tmp_path.rglob("*")) == before


def test_status_and_config_read_a_folder(tmp_path: Path) -> None:
    SweepFolder(tmp_path).write_sweep(load_sweep(write_sweep(tmp_path)))
    text = CliRunner().invoke(app, ["sweep", "status", str(tmp_path)])
    assert "sweep tiny: 0 of 4 to 8 runs ended (none yet)" in text.output
    status = json.loads(
        CliRunner().invoke(app, ["sweep", "status", str(tmp_path), "--json"]).output
    )
    assert (status["sweep"], status["total"]) == ("tiny", 4)
    printed = CliRunner().invoke(app, ["sweep", "config", str(tmp_path), cells_of()[0].id])
    sections = yaml.safe_load(printed.output)
    assert sections["optimizer"]["lr"] == 0.0078125
    assert sections["data"]["train_data_path"] == [f"{tmp_path}/shards/train"]
    assert "checkpoint" not in sections


def test_a_wrong_yaml_is_a_users_error(tmp_path: Path) -> None:
    config = write_sweep(tmp_path, arms={"a": {"typo": 1}})
    done = CliRunner().invoke(app, ["sweep", "plan", str(config)])
    assert isinstance(done.exception, ConfigError)
    assert "arms.a: unknown option 'typo'" in str(done.exception)
