"""The runner with workers that train nothing: order, limits, deaths, refusals, requests to stop."""

from __future__ import annotations

import math
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_mup.errors import InstallationError
from megatron_mup.transfer.runs import Row, read_rows
from megatron_mup.transfer.sweep.cells import Cell
from megatron_mup.transfer.sweep.folder import SweepFolder
from megatron_mup.transfer.sweep.order import SeedsNearMinimum
from megatron_mup.transfer.sweep.pool import Share
from megatron_mup.transfer.sweep.results import Origin
from megatron_mup.transfer.sweep.runner import Ending, Limits, run_cells
from tests.transfer.sweep.sweeps import cells_of, sweep_of

ORIGIN = Origin(sweep="tiny", data_sha256="d", commit="c", torch="2", megatron_core="0")

Runs = Callable[..., Ending]


@pytest.fixture
def lines() -> list[str]:
    """What the runner told."""
    return []


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lines: list[str]) -> Runs:
    """Run the tiny sweep with some changes, in one folder for all calls of a test."""
    monkeypatch.setattr("megatron_mup.transfer.sweep.pool._WORKER", f"{__package__}.fake_worker")
    folder = SweepFolder(tmp_path)

    def run_tiny(
        rates: list[float], *, limits: Limits | None = None, workers: int = 1, **changes: Any
    ) -> Ending:
        cells = cells_of(learning_rate={"log2": rates}, **changes)
        folder.write_sweep(sweep_of())
        return run_cells(
            SeedsNearMinimum(cells, 0.0),
            {row.cell: row for row in read_rows(folder.table)},
            folder=folder,
            origin=ORIGIN,
            share=Share(workers=workers, threads=1),
            limits=limits or Limits(),
            echo=lines.append,
        )

    return run_tiny


def places(rows: list[Row]) -> list[tuple[float, float, int, str]]:
    return [(row.size, row.log2_lr, row.seed, row.status.value) for row in rows]


def test_runs_end_in_the_order_of_their_cost_and_become_rows(
    run: Runs, tmp_path: Path, lines: list[str]
) -> None:
    ending = run([-8, -7])
    rows = read_rows(tmp_path / "runs.csv")
    assert places(rows) == [
        (64.0, -8.0, 1, "finished"),
        (64.0, -7.0, 1, "finished"),
        (32.0, -8.0, 1, "finished"),
        (32.0, -7.0, 1, "finished"),
        (64.0, -7.0, 2, "finished"),
        (32.0, -7.0, 2, "finished"),
    ]
    assert list(ending.rows.values()) == rows
    first = rows[0]
    assert (first.validation_loss, first.train_loss, first.loss_spikes) == (1.0, 2.0, 3)
    # 12 x 64^2 in the layer, 96 x 64 in each of embedding and unembedding.
    assert (first.parameters, first.non_embedding_parameters) == (61_440, 49_152)
    assert (first.steps, first.planned_steps, first.tokens) == (10, 10, 640)
    assert (first.validation_tokens, first.machine, first.commit) == (128, "fake", "c")
    assert "[1 done, 1 running, of 4 to 8] base width 64 lr 2^-8 seed 1: loss 1.0000" in lines[0]
    assert "[6 done, 0 running, of 6]" in lines[-1]


def test_what_is_on_record_does_not_run_again(run: Runs, tmp_path: Path) -> None:
    assert len(run([-8, -7]).made) == 6
    before = (tmp_path / "runs.csv").read_bytes()
    assert run([-8, -7]).made == []
    assert (tmp_path / "runs.csv").read_bytes() == before
    assert len(run([-8, -7, -6.5], scale={"axis": "width", "values": [32]}).made) == 1


def test_limits_choose_cells(run: Runs, tmp_path: Path) -> None:
    cells = cells_of(learning_rate={"log2": [-8, -7]})
    small = frozenset(cell.id for cell in cells if cell.size == 32)
    ending = run([-8, -7], limits=Limits(only=small, max_cells=1))
    assert places(list(ending.rows.values())) == [(32.0, -8.0, 1, "finished")]
    run([-8, -7], limits=Limits(only=small))
    assert {row.size for row in read_rows(tmp_path / "runs.csv")} == {32.0}


def test_a_diverged_run_is_a_row_without_losses(run: Runs) -> None:
    ending = run([-7, -4], seeds=[1], scale={"axis": "width", "values": [32]})
    diverged = list(ending.rows.values())[1]
    assert diverged.status.value == "diverged"
    assert math.isnan(diverged.validation_loss)
    assert math.isnan(diverged.train_loss)


def test_a_cell_whose_worker_dies_three_times_fails_and_the_others_run(
    run: Runs, tmp_path: Path, lines: list[str]
) -> None:
    ending = run([-7, -1], seeds=[1], scale={"axis": "width", "values": [32]})
    assert places(list(ending.rows.values())) == [
        (32.0, -7.0, 1, "finished"),
        (32.0, -1.0, 1, "failed"),
    ]
    died = [line for line in lines if "its worker died (signal 9; log: " in line]
    assert len(died) == 3
    assert sum("it is started again" in line for line in died) == 2
    assert read_rows(tmp_path / "runs.csv")[1].steps == 0
    # Another command tries it anew.
    assert len(run([-7, -1], seeds=[1], scale={"axis": "width", "values": [32]}).made) == 1


def test_an_error_of_the_user_is_not_tried_again_and_another_one_is(
    run: Runs, lines: list[str]
) -> None:
    ending = run([-7, -3, -2], seeds=[1], scale={"axis": "width", "values": [32]})
    assert [row.status.value for row in ending.rows.values()] == ["finished", "failed", "failed"]
    told = "\n".join(lines)
    assert told.count("RuntimeError: out of memory; it is started again") == 2
    assert "failed (RuntimeError: out of memory)" in told
    assert told.count("no such kernel") == 1


def test_a_worker_that_cannot_start_ends_the_sweep_with_its_words(
    run: Runs, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("FAKE_WORKER_CANNOT_START", "1")
    with pytest.raises(InstallationError, match=r"cannot start: no library; its log is .*worker-0"):
        run([-7])
    assert read_rows(tmp_path / "runs.csv") == []


def test_a_request_to_stop_ends_running_cells_and_keeps_rows(
    run: Runs, tmp_path: Path, lines: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    _stop_at_progress(monkeypatch, signal.SIGTERM)
    before = signal.getsignal(signal.SIGTERM)
    ending = run([-7, -5], seeds=[1], scale={"axis": "width", "values": [32]})
    assert ending.interrupted
    assert places(read_rows(tmp_path / "runs.csv")) == [(32.0, -7.0, 1, "finished")]
    assert "stopping: 1 running cells end after their step" in lines
    assert "stopped at iteration 4 of 10: base width 32 lr 2^-5 seed 1" in lines
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_run_that_ends_early_as_the_request_comes_is_through(
    run: Runs, monkeypatch: pytest.MonkeyPatch
) -> None:
    only = {"seeds": [1], "scale": {"axis": "width", "values": [32]}}
    _stop_at_progress(monkeypatch, signal.SIGTERM)
    ending = run([-5.5], **only)
    assert ending.interrupted
    (row,) = ending.rows.values()
    assert (row.status.value, row.steps, row.train_loss) == ("stopped_early", 4, 5.0)
    assert math.isnan(row.validation_loss)
    assert run([-5.5], **only).made == []


def test_time_of_interrupted_attempts_counts(
    run: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    only = {"seeds": [1], "scale": {"axis": "width", "values": [32]}}
    _stop_at_progress(monkeypatch, signal.SIGINT)
    (cell,) = cells_of(learning_rate={"log2": [-5]}, **only)
    run([-5], **only)
    folder = SweepFolder(tmp_path)
    assert 0 < folder.earlier_seconds(cell.id) < 60
    folder.add_seconds(cell.id, 1000.0)
    monkeypatch.setenv("FAKE_WORKER_CALM", "1")
    assert 1000 < run([-5], **only).rows[cell.id].seconds < 1060
    # What a cell that is through has left is deleted.
    assert not folder.cell(cell.id).exists()


def _stop_at_progress(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """Signal this process when a cell reports that it has begun."""
    from megatron_mup.transfer.sweep.runner import _Runner

    heard = _Runner._heard

    def hear(runner: Any, pool: Any, worker: Any, message: dict[str, Any]) -> None:
        heard(runner, pool, worker, message)
        if "iteration" in message:
            os.kill(os.getpid(), number)

    monkeypatch.setattr(_Runner, "_heard", hear)


def test_places_of_a_cell_are_its_own(tmp_path: Path) -> None:
    (cell,) = cells_of(
        learning_rate={"log2": [-5]}, seeds=[1], scale={"axis": "width", "values": [32]}
    )
    plain = placed(cell, tmp_path, Limits())
    assert (plain["checkpoint"]["save"], plain["logging"]["metrics_path"]) == (None, None)
    assert plain["logging"]["log_interval"] == 1
    assert plain["data"]["data_cache_path"] == f"{tmp_path}/cache/3"
    saved = placed(cell, tmp_path, Limits(checkpoint_fraction=0.25))
    place = f"{tmp_path}/cells/{cell.id}/checkpoints"
    assert (saved["checkpoint"]["save"], saved["checkpoint"]["load"]) == (place, place)
    # A quarter of 10 steps, rounded up.
    assert (saved["checkpoint"]["save_interval"], saved["checkpoint"]["keep_last"]) == (3, 1)
    kept = placed(cell, tmp_path, Limits(keep_checkpoints=True))
    assert (kept["checkpoint"]["save"], kept["checkpoint"]["save_interval"]) == (place, None)


def placed(cell: Cell, folder: Path, limits: Limits) -> dict[str, Any]:
    """What the worker in slot 3 would be sent."""
    from megatron_mup.transfer.sweep.runner import _Runner

    strategy = SeedsNearMinimum([cell], None)
    runner = _Runner(strategy, Ending({}), folder=SweepFolder(folder), origin=ORIGIN, limits=limits)
    return runner._placed(cell, 3)
