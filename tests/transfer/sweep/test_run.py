"""``sweep run`` with real workers: rows, refusals of one cell, kills, Ctrl-C, going on."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from megatron_mup.config_io import load_config
from megatron_mup.training.loop import train
from megatron_mup.training.metrics import read_metrics
from megatron_mup.training.outcome import TrainResult
from megatron_mup.training.processes import Launch
from megatron_mup.transfer.runs import Row, read_rows
from megatron_mup.transfer.sweep.cell_yaml import cell_yaml
from megatron_mup.transfer.sweep.cells import make_cells
from megatron_mup.transfer.sweep.folder import SweepFolder
from megatron_mup.transfer.sweep.pool import Share
from megatron_mup.transfer.sweep.session import RunRequest, run_sweep
from megatron_mup.transfer.sweep.spec import load_sweep
from tests.transfer.sweep.sweeps import write_sweep

ONE_WIDTH = {"axis": "width", "values": [32]}
_LONG = {"rule": "fixed_tokens", "tokens": 200 * 4 * 16}


def run(config: Path, out: Path) -> tuple[int, list[str]]:
    """Exit code and lines of the command, with one worker of one thread."""
    lines: list[str] = []
    share = Share(workers=1, threads=1)
    request = RunRequest(config=config, out=out, text=(), share=share)
    return run_sweep(request, lines.append), lines


def trained_alone(out: Path, cell: str) -> TrainResult:
    """Train what ``sweep config`` prints, in this process."""
    path = out / "printed.yaml"
    path.write_text(cell_yaml(SweepFolder(out), cell))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        cache = f"data_cache_path={out}/own_cache"
        return train(
            load_config(path, [cache, "log_interval=1"]), launch=Launch(), echo=lambda _line: None
        )
    finally:
        torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def swept(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, int, list[str]]:
    """Rates that train, diverge, and cannot save: folder, exit code, lines."""
    folder = tmp_path_factory.mktemp("swept")
    config = write_sweep(
        folder,
        scale=ONE_WIDTH,
        learning_rate={"log2": [-7, -6, 80]},
        seeds_within_octaves=0,
        run={"eval_tokens": 100, "checkpoint_fraction": 0.5},
    )
    out = folder / "out"
    blocked = make_cells(load_sweep(config), out / "data")[1]
    (out / "cells").mkdir(parents=True)
    (out / "cells" / blocked.id).write_text("in the way")
    return out, *run(config, out)


def outcomes(rows: list[Row]) -> list[tuple[float, int, str]]:
    return [(row.log2_lr, row.seed, row.status.value) for row in rows]


def test_cells_that_fail_or_diverge_do_not_end_the_others(
    swept: tuple[Path, int, list[str]],
) -> None:
    out, code, lines = swept
    rows = read_rows(out / "runs.csv")
    assert outcomes(rows) == [
        (-7.0, 1, "finished"),
        (-6.0, 1, "failed"),
        (80.0, 1, "diverged"),
        (-7.0, 2, "finished"),
    ]
    assert code == 1
    assert any("failed (" in line and "in the way" not in line for line in lines)
    assert lines[-1].startswith("failed runs are tried again by the same command")
    assert [math.isnan(row.validation_loss) for row in rows] == [False, True, True, False]
    assert rows[2].steps < 10
    assert read_rows(out / "runs.parquet")[0] == rows[0]
    # Nothing is left of cells that are through.
    assert [path.name for path in (out / "cells").iterdir()] == [rows[1].cell]
    assert not (out / "cache").exists()


def test_the_printed_configuration_gives_the_losses_of_the_row(
    swept: tuple[Path, int, list[str]],
) -> None:
    out = swept[0]
    row = read_rows(out / "runs.csv")[0]
    result = trained_alone(out, row.cell[:6])
    assert result.validation_loss == row.validation_loss
    assert 4.0 < row.validation_loss < 5.0
    losses = [step["lm loss"] for step in result.history if "lm loss" in step]
    # A tenth of 10 steps is the last one.
    assert row.train_loss == losses[9]
    assert len(losses) == 10


def test_the_same_command_goes_on_with_what_is_missing(
    swept: tuple[Path, int, list[str]],
) -> None:
    out = swept[0]
    before = read_rows(out / "runs.csv")
    failed = before[1].cell
    (out / "cells" / failed).unlink()
    code, lines = run(out.parent / "sweep.yaml", out)
    rows = {row.cell: row for row in read_rows(out / "runs.csv")}
    assert code == 0
    assert rows[failed].status.value == "finished"
    for row in (before[0], before[3]):
        assert rows[row.cell] == row
    told = [line for line in lines if " done, " in line]
    assert all("lr 2^-6" in line for line in told)
    assert lines[0] == "4 of up to 6 runs are on record"


def long_sweep(folder: Path) -> Path:
    """One cell of 200 steps that saves every 20."""
    return write_sweep(
        folder,
        scale=ONE_WIDTH,
        learning_rate={"log2": [-6]},
        seeds=[1],
        tokens=_LONG,
        run={"eval_tokens": 100, "checkpoint_fraction": 0.1, "keep_checkpoints": True},
    )


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> tuple[float, float]:
    """Validation and final training loss of the long cell, trained at a stretch."""
    folder = tmp_path_factory.mktemp("alone")
    config = long_sweep(folder)
    out = SweepFolder(folder / "out")
    (cell,) = make_cells(load_sweep(config), out.data)
    with out.locked():
        out.write_sweep(load_sweep(config))
    result = trained_alone(out.path, cell.id)
    assert result.validation_loss is not None
    losses = [step["lm loss"] for step in result.history if "lm loss" in step]
    assert len(losses) == 200
    return result.validation_loss, sum(losses[180:]) / 20


def wait_for(what: Callable[[], object]) -> None:
    """Poll until it is true; fails after two minutes."""
    deadline = time.monotonic() + 120
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def has_saved(out: Path) -> bool:
    return any(not path.name.endswith(".tmp") for path in out.glob("cells/*/checkpoints/iter_*"))


def check_resumed(out: Path, uninterrupted: tuple[float, float]) -> None:
    """The one row is what the uninterrupted run gives, and the run did not begin anew."""
    (row,) = read_rows(out / "runs.csv")
    assert (row.steps, row.status.value) == (200, "finished")
    assert row.validation_loss == uninterrupted[0]
    assert row.train_loss == pytest.approx(uninterrupted[1], rel=1e-12)
    metrics = out / "cells" / row.cell / "metrics.jsonl"
    starts = [json.loads(line) for line in metrics.read_text().splitlines() if "resumed" in line]
    assert [start["iteration"] >= 20 for start in starts] == [True]
    assert len([step for step in read_metrics(metrics) if "lm loss" in step]) == 200


def test_a_killed_worker_is_replaced_and_its_cell_gives_the_same_loss(
    tmp_path: Path, uninterrupted: tuple[float, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[subprocess.Popen[bytes]] = []
    popen = subprocess.Popen

    def start(*arguments: object, **options: object) -> subprocess.Popen[bytes]:
        process = popen(*arguments, **options)  # type: ignore[call-overload]
        if "megatron_mup.transfer.sweep.worker" in arguments[0]:  # type: ignore[operator]
            started.append(process)
        return process  # type: ignore[no-any-return]

    monkeypatch.setattr(subprocess, "Popen", start)
    out = tmp_path / "out"

    def kill() -> None:
        wait_for(lambda: has_saved(out))
        started[0].kill()

    killer = threading.Thread(target=kill)
    killer.start()
    code, lines = run(long_sweep(tmp_path), out)
    killer.join()
    assert code == 0
    assert any("its worker died (signal 9" in line for line in lines)
    assert len(started) == 2
    check_resumed(out, uninterrupted)


def test_ctrl_c_saves_running_cells_and_the_same_command_goes_on(
    tmp_path: Path, uninterrupted: tuple[float, float]
) -> None:
    config, out = long_sweep(tmp_path), tmp_path / "out"
    command = [sys.executable, "-m", "megatron_mup", "sweep", "run", str(config)]
    process = subprocess.Popen(
        # Children of a process that ignores Ctrl-C would ignore it as well.
        ["/usr/bin/env", "--default-signal=INT", *command, "--out", str(out), "--threads", "1"],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
    )
    wait_for(lambda: has_saved(out))
    process.send_signal(signal.SIGINT)
    told, _ = process.communicate(timeout=120)
    assert process.returncode == 75, told
    assert "stopped at iteration" in told
    assert "the same command goes on from here" in told
    assert read_rows(out / "runs.csv") == []
    assert run(config, out)[0] == 0
    check_resumed(out, uninterrupted)
