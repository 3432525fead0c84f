"""``megatron-mup launch`` as the scripts call it: what is on stdout, and which exit codes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from megatron_mup import cli
from megatron_mup.errors import ConfigError
from megatron_mup.launching.preflight_report import PreflightReport, Stage, write_report
from tests.launching.run_folders import event_list, write_config


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """A run whose first attempt had one good node and none of the other."""
    folder = event_list(tmp_path / "run", {"event": "begin", "attempt": 1, "iteration": None})
    write_report(
        folder.preflight(1),
        PreflightReport(rank=0, local_rank=0, node="n1", stage=Stage.DONE),
    )
    return folder.root


def launch(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "megatron_mup", "launch", *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_begin_prints_variables_alone_and_its_messages_elsewhere(tmp_path: Path) -> None:
    config = write_config(tmp_path, training={"train_iters": 60})
    done = launch("begin", "--run-dir", str(tmp_path / "a run"), "--config", str(config),
                  "--world-size", "1", "--lr", "0.5", "--attempt-of", "77:0",
                  "--max-restarts", "3", "seed=3")  # fmt: skip
    assert done.returncode == 0, done.stderr
    names = [line.partition("=")[0] for line in done.stdout.splitlines()]
    assert names[:2] == ["MEGATRON_MUP_ATTEMPT", "MEGATRON_MUP_OUTCOMES"]
    assert all(name.replace("_", "").isalnum() and name.isupper() for name in names)
    assert "warning: training repeats its data" in done.stderr


def test_begin_refuses_with_one_line_and_code_2(tmp_path: Path) -> None:
    config = write_config(tmp_path)
    done = launch("begin", "--run-dir", str(tmp_path / "run"), "--config", str(config),
                  "--world-size", "1")  # fmt: skip
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: no peak learning rate")
    assert len(done.stderr.splitlines()) == 1


def test_begin_refuses_fewer_than_no_restarts(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--max-restarts is -1; .*MAX_RESTARTS"):
        CliRunner().invoke(
            cli.app, ["launch", "begin", "--run-dir", str(tmp_path), "--config", "x",
                      "--world-size", "1", "--max-restarts", "-1"], catch_exceptions=False,
        )  # fmt: skip


def test_judge_names_the_node_and_ends_with_79(run_dir: Path) -> None:
    options = ["launch", "judge", "--run-dir", str(run_dir), "--tasks-per-node", "1"]
    found = CliRunner().invoke(cli.app, [*options, "--nodes", "n1,n2"])
    assert found.exit_code == 79
    assert found.stdout.startswith("n2: never reported")
    found = CliRunner().invoke(cli.app, [*options, "--nodes", "n1"])
    assert (found.exit_code, found.stdout) == (0, "preflight: all nodes passed\n")
    with pytest.raises(ConfigError, match="give names and a number"):
        CliRunner().invoke(cli.app, [*options, "--nodes", ","], catch_exceptions=False)


def test_decide_prints_one_line(run_dir: Path) -> None:
    options = ["launch", "decide", "--run-dir", str(run_dir), "--max-restarts", "1"]
    found = CliRunner().invoke(cli.app, [*options, "--exit-code", "75", "--signalled"])
    assert (found.exit_code, found.stdout) == (
        0, "requeue exit 75: stopped in time, without saving, after a signal\n",
    )  # fmt: skip
    found = CliRunner().invoke(cli.app, [*options, "--exit-code", "0"])
    assert (found.exit_code, found.stdout) == (0, "finished\n")
    for wrong in (["--max-restarts", "-1"], ["--exclude-after", "0"]):
        with pytest.raises(ConfigError, match="MAX_RESTARTS"):
            CliRunner().invoke(
                cli.app, [*options, "--exit-code", "1", *wrong], catch_exceptions=False
            )


def test_a_folder_where_nothing_began_is_refused(tmp_path: Path) -> None:
    for verb in (["preflight"], ["judge", "--nodes", "n1", "--tasks-per-node", "1"],
                 ["decide", "--exit-code", "1", "--max-restarts", "3"]):  # fmt: skip
        with pytest.raises(ConfigError, match="comes first"):
            CliRunner().invoke(
                cli.app, ["launch", *verb, "--run-dir", str(tmp_path)], catch_exceptions=False
            )


def test_judging_and_deciding_load_neither_torch_nor_megatron() -> None:
    code = (
        "import sys, megatron_mup.launching.commands, megatron_mup.launching.judgement, "
        "megatron_mup.launching.decision, megatron_mup.launching.beginning\n"
        "print('torch' in sys.modules, 'megatron' in sys.modules)"
    )
    shown = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    assert shown.stdout.split() == ["False", "False"]


def test_what_begin_checks_loads_no_megatron() -> None:
    # Its import takes longer than all the checks together.
    code = (
        "import sys, megatron_mup.checkpoint.resume, megatron_mup.data.checks, "
        "megatron_mup.training.outputs, megatron_mup.training.ranks, "
        "megatron_mup.training.sample_counts\n"
        "print('megatron' in sys.modules)"
    )
    shown = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    assert shown.stdout.split() == ["False"]
