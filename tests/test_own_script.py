"""The example script's bare Megatron-Core loop gives the package's own losses."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from megatron_mup.config import RunConfig
from megatron_mup.training.processes import Launch, parallel_processes
from megatron_mup.training.state import build_state
from megatron_mup.training.step import train_step
from tests.configurations import tiny
from tests.distributed.spawn import ROOT
from tests.loaded_script import load_script

_SCRIPT = ROOT / "examples" / "own_script" / "train.py"
_TOLERANCE = 1e-6


@cache
def script() -> Any:
    """The example as a module."""
    return load_script(_SCRIPT)


def the_same_run(name: str) -> RunConfig:
    """The script's model, optimizer and schedule as a configuration of the package."""
    return tiny(
        f"name={name}",
        "vocab_size=128",
        "seq_length=32",
        "attention_backend=local",
        "train_iters=10",
        "lr=0.015625",
        "weight_decay=1e-4",
        "lr_warmup_iters=3",
        "lr_decay_style=cosine",
        "min_lr_ratio=0.0625",
    )


def package_losses(name: str) -> list[float]:
    """Losses of the package's own step on the script's batches."""
    run = the_same_run(name)
    losses = []
    with parallel_processes(run, Launch()):
        state = build_state(run)
        batches = script().batches()
        for _ in range(10):
            total, tokens = train_step(state, batches, 2).loss_sum_and_tokens.tolist()
            losses.append(total / tokens)
    return losses


def test_the_script_is_short() -> None:
    assert len(_SCRIPT.read_text(encoding="utf-8").splitlines()) < 150


@pytest.mark.parametrize("name", ["mup", "sp"])
def test_script_gives_the_losses_of_the_package(name: str) -> None:
    with parallel_processes(the_same_run(name), Launch()):
        own = script().train(name)
    expected = package_losses(name)
    # Training moves the loss by far more than the tolerance.
    assert expected[0] - expected[-1] > 0.1
    assert own == pytest.approx(expected, rel=0, abs=_TOLERANCE)


def test_rule_sets_differ_from_the_first_losses_on() -> None:
    with parallel_processes(the_same_run("sp"), Launch()):
        assert abs(script().train("sp")[1] - script().train("mup")[1]) > 1e-3


def run_script(*launcher: str) -> list[float]:
    """Losses that the script prints when it is started as its README says."""
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
        "GLOO_SOCKET_IFNAME": "lo",
    }
    shown = subprocess.run(
        [sys.executable, *launcher, str(_SCRIPT)],
        capture_output=True,
        text=True,
        env=environment,
        timeout=240,
        cwd=ROOT,
        check=False,
    )
    assert shown.returncode == 0, shown.stderr[-2000:]
    losses: list[float] = json.loads(shown.stdout.splitlines()[-1])
    return losses


@pytest.mark.dist
def test_script_in_two_processes_gives_the_same_losses(tmp_path: Path) -> None:
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    split = run_script(*launcher, "--log-dir", str(tmp_path))
    assert split == pytest.approx(package_losses("mup"), rel=0, abs=_TOLERANCE)
    assert all(map(math.isfinite, split))
