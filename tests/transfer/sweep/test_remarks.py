"""What is told before a sweep runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from megatron_mup.cli import app
from megatron_mup.transfer.sweep.remarks import remarks
from tests.transfer.sweep.sweeps import SWEEP, cells_of, sweep_of, write_sweep

_TRAINING = SWEEP["base"]["training"]


def remarks_of(**changes: Any) -> list[str]:
    return remarks(sweep_of(**changes), cells_of(**changes))


def fixed(tokens: int) -> dict[str, Any]:
    return {"rule": "fixed_tokens", "tokens": tokens}


def test_runs_of_a_few_steps_are_warned_of() -> None:
    # Batches of 4 sequences of 16: 577 tokens make ten of them, 576 nine.
    assert remarks_of(tokens=fixed(577)) == []
    assert remarks_of(tokens=fixed(576)) == [
        "warning: runs of width 32, 64 make fewer than 10 steps (the shortest 9, of 64 tokens "
        "each), too few to tell learning rates apart; raise tokens"
    ]
    assert "(the shortest 1, of 64 tokens" in remarks_of(tokens=fixed(30))[0]


@pytest.mark.parametrize(
    ("changes", "sizes", "option"),
    [
        (
            {"scale": {"axis": "tokens", "values": [128, 320, 6400]}, "tokens": None},
            "tokens 128, 320 make",
            "scale.values",
        ),
        (
            {"base": SWEEP["base"] | {"training": _TRAINING | {"train_iters": 3}}, "tokens": None},
            "width 32, 64 make",
            "base.training.train_iters",
        ),
    ],
)
def test_the_option_that_makes_runs_longer_is_named(
    changes: dict[str, Any], sizes: str, option: str
) -> None:
    (line,) = remarks_of(**changes)
    assert f"runs of {sizes} fewer than 10 steps" in line
    assert line.endswith(f"; raise {option}")


def test_what_is_left_out_of_the_base_is_said() -> None:
    base = SWEEP["base"] | {
        "checkpoint": {"save": "a", "save_interval": None},
        "logging": {"log_interval": 5},
        "data": SWEEP["base"]["data"] | {"data_cache_path": "b"},
        "optimizer": {"lr": 0.5, "weight_decay": 0.1},
        "schedule": {"lr_warmup_iters": 3},
    }
    assert remarks_of(base=base, run=None) == [
        "base: optimizer.lr is left out: in each run it is set by learning_rate",
        "base: schedule.lr_warmup_iters is left out: in each run it is set by warmup_fraction",
        "base: left out: checkpoint.save, logging.log_interval, data.data_cache_path; the sweep "
        "places checkpoints, logs and caches itself",
    ]


@pytest.mark.parametrize("verb", ["plan", "prepare", "run"])
def test_every_command_that_plans_or_runs_says_it(
    verb: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "megatron_mup.transfer.sweep.pool._WORKER", "tests.transfer.sweep.fake_worker"
    )
    monkeypatch.setenv("FAKE_WORKER_CALM", "1")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    config = write_sweep(tmp_path, tokens=fixed(100), seeds=[1])
    out = ["--out", str(tmp_path / "out")]
    done = CliRunner().invoke(app, ["sweep", verb, str(config), *out])
    assert done.exit_code == 0, done.output
    assert done.output.startswith("warning: runs of width 32, 64 make fewer than 10 steps")
