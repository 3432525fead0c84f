"""What is told of a sweep: its plan, its progress, its status."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_mup.errors import ConfigError
from megatron_mup.transfer.runs import Status, append_row
from megatron_mup.transfer.sweep.cell_yaml import cell_yaml
from megatron_mup.transfer.sweep.folder import SweepFolder
from megatron_mup.transfer.sweep.order import grid_of
from megatron_mup.transfer.sweep.plan_report import plan_lines, render_plan
from megatron_mup.transfer.sweep.progress import Progress, Rates, Saved, duration, saved_early
from megatron_mup.transfer.sweep.status_report import render_status, sweep_status
from tests.transfer.sweep.sweeps import cells_of, row_of, sweep_of
from tests.transfer.test_runs import ROW

_ARMS = {"mup": {}, "sp": {"parameterization.name": "sp"}}


def test_the_plan_counts_parameters_steps_and_flops() -> None:
    small, large = plan_lines(cells_of(arms=_ARMS))
    assert (small.size, small.arms) == (32.0, ("mup", "sp"))
    # 12 M^2 in the layer and 96 M in each of embedding and unembedding.
    assert (small.parameters, small.non_embedding_parameters) == (18_432, 12_288)
    assert (large.parameters, large.non_embedding_parameters) == (61_440, 49_152)
    assert (large.steps, large.tokens) == (10, 640)
    assert (large.first_runs, large.all_runs) == (4, 8)
    # Of a sequence 3 x 2 x 16 x (12 x 64^2 + 2 x 16 x 64 + 96 x 64); 10 steps and 2/3 for 2
    # batches of evaluation, of 4 sequences.
    assert large.flops == pytest.approx(5_505_024 * 4 * (10 + 2 / 3))


def test_arms_of_other_models_have_lines_of_their_own() -> None:
    arms = {"mup": {}, "wide": {"ffn_multiplier": 8}}
    lines = plan_lines(cells_of(arms=arms))
    assert [(line.size, line.arms, line.parameters) for line in lines] == [
        (32.0, ("mup",), 18_432),
        (64.0, ("mup",), 61_440),
        (32.0, ("wide",), 18_432 + 8 * 32**2),
        (64.0, ("wide",), 61_440 + 8 * 64**2),
    ]


def test_the_plan_as_text_tells_cost_and_time() -> None:
    sweep, cells = sweep_of(arms=_ARMS), cells_of(arms=_ARMS)
    text = render_plan(sweep, cells, {})
    assert "| 64 | all | 61,440 | 49,152 | 10 | 640 | 2.35e+08 | 4 to 8 |" in text
    # 4 runs each of 2.349e8 and 6.711e7 FLOPs with the first seed.
    assert "whole cost: 8 to 16 runs, 1.21e+09 to 2.42e+09 model FLOPs" in text
    assert "time: not known before runs have finished" in text
    rows = {
        cell.id: row_of(cell, seconds=100.0)
        for cell in cells
        if cell.words.startswith("mup width 64")
    }
    known = render_plan(sweep, cells, rows)
    # Two of sp at width 64, 100 s each, and four at width 32 of 28.6 s are 314 s; so are the
    # undecided ones.
    assert "left: 6 runs, about 5 min to 10 min of one worker" in known


def test_time_goes_by_the_nearest_cost() -> None:
    cells = cells_of(scale={"axis": "width", "values": [32, 64, 512]})
    by_size = {cell.size: cell for cell in cells}
    rows = {
        by_size[32].id: row_of(by_size[32], seconds=4.0),
        by_size[512].id: row_of(by_size[512], seconds=80.0),
    }
    rates = Rates(cells, rows)
    assert rates.seconds(by_size[512]) == 80.0
    assert rates.seconds(by_size[64]) == pytest.approx(4.0 * by_size[64].flops / by_size[32].flops)
    assert Rates(cells, {}).seconds(by_size[64]) is None
    diverged = {by_size[32].id: row_of(by_size[32], math.nan, seconds=4.0)}
    assert Rates(cells, diverged).seconds(by_size[64]) is None


def test_durations_are_told_in_fitting_units() -> None:
    assert [duration(seconds) for seconds in (5, 89, 91, 5399, 9000)] == [
        "5 s",
        "89 s",
        "2 min",
        "90 min",
        "2.5 h",
    ]


@pytest.fixture
def folder(tmp_path: Path) -> SweepFolder:
    """A sweep of eight cells, three of which are through, and one row of another YAML."""
    folder = SweepFolder(tmp_path)
    folder.write_sweep(sweep_of())
    first, second, third, *_ = (cell for cell in cells_of() if cell.seed == 1)
    append_row(folder.table, row_of(first, 3.5, seconds=2.0))
    append_row(folder.table, row_of(second, 3.25, seconds=2.0))
    diverged = row_of(third, math.nan, seconds=2.0)
    append_row(folder.table, diverged)
    append_row(folder.table, replace(ROW, cell="other"))
    return folder


def test_status_tells_what_ended_and_what_is_left(folder: SweepFolder) -> None:
    status = json.loads(json.dumps(sweep_status(folder)))
    assert status["owner"] is None
    assert (status["done"], status["total"], status["undecided"]) == (3, 6, 2)
    assert status["counts"] == {"finished": 2, "diverged": 1, "stopped_early": 0, "failed": 0}
    assert status["rows_of_other_cells"] == 1
    assert status["running"] == []
    small, large = status["curves"]
    assert (small["ended"], small["lowest_loss"], small["at_log2_lr"]) == (2, 3.25, -5.0)
    assert (large["ended"], large["diverged"], large["lowest_loss"]) == (1, 1, None)
    text = render_status(status)
    assert "sweep tiny: 3 of 6 to 8 runs ended (2 finished, 1 diverged)" in text
    assert "not running" in text
    assert "1 runs in the table belong to no cell of it" in text
    assert "| base | 32 | 2 | 0 | 0 | 0 | 3.2500 | -5 |" in text
    assert "| base | 64 | 1 | 0 | 1 | 0 | - | - |" in text


def test_status_of_a_running_sweep_names_owner_and_cells(folder: SweepFolder) -> None:
    cell = cells_of()[-1]
    running = {
        "cell": cell.id,
        "words": cell.words,
        "iteration": 3,
        "train_iters": 10,
        "seconds": 7,
    }
    folder.write_state({"updated": "now", "running": [running]})
    assert sweep_status(folder)["running"] == []
    with folder.locked():
        text = render_status(sweep_status(folder))
    assert "running: pid " in text
    assert "  base width 64 lr 2^-5 seed 2: iteration 3 of 10, 7 s" in text


def test_the_time_left_is_of_one_worker_and_of_those_that_run(folder: SweepFolder) -> None:
    status = sweep_status(folder)
    assert status["stop_early"] is None
    shown = {**status, "worker_seconds_left": 300.0}
    assert "left: about 5 min of one worker\n" in render_status(shown)
    shown["running_cells"] = 4
    assert "left: about 5 min of one worker, 75 s with 4 at a time\n" in render_status(shown)
    assert "stop_early" not in render_status(shown)


def test_a_progress_line_says_how_many_run_at_a_time() -> None:
    # 8 cells of 100 s at width 64 and of 28.6 s at width 32, two seeds not decided.
    cells = cells_of()
    first = next(cell for cell in cells if (cell.size, cell.seed) == (64, 1))
    rows = {first.id: row_of(first, seconds=100.0)}
    line = Progress(grid_of(sweep_of(), cells), rows, selected=None).line
    told = line(first, rows[first.id], running=2, reason="")
    # Of seven cells that are left three are large: 414 s by two.
    assert told.endswith("loss 3.0000, 100.0 s, about 3 min left with 2 at a time")


def test_what_early_ends_save_is_counted_of_what_is_through() -> None:
    early = replace(ROW, status=Status.STOPPED_EARLY, steps=25, planned_steps=100, seconds=10.0)
    whole = replace(ROW, steps=100, planned_steps=100, seconds=40.0)
    failed = replace(ROW, status=Status.FAILED, steps=0, planned_steps=100)
    assert saved_early([whole, failed]) is None
    saved = saved_early([early, whole, whole, failed])
    # 75 steps at 0.4 s.
    assert saved == Saved(runs=1, ended=3, steps=75, planned_steps=300, seconds=30.0)
    assert saved.words == (
        "stop_early: 1 of 3 runs ended early, which saved 75 of 300 steps (25%), about 30 s of one "
        "worker"
    )


def test_a_folder_without_a_sweep_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"holds no sweep.yaml; give the --out folder"):
        sweep_status(SweepFolder(tmp_path))


def test_a_cell_is_printed_by_the_beginning_of_its_name(folder: SweepFolder) -> None:
    cell = cells_of()[1]
    text = cell_yaml(folder, cell.id[:6])
    assert text.startswith(f"# Cell {cell.id} of the sweep tiny.\n")
    assert "hidden_size: 32\n" in text
    assert "lr: 0.03125\n" in text
    for wrong in ("zzzz", "", cell.id[:3]):
        with pytest.raises(ConfigError, match=r"no cell of the sweep begins with"):
            cell_yaml(folder, wrong)


def test_a_printed_cell_names_its_shards_from_any_folder(
    folder: SweepFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = Path.cwd()
    monkeypatch.chdir(tmp_path)
    text = cell_yaml(folder, cells_of()[1].id)
    assert f"train_data_path:\n  - {here}/shards/train\n" in text


def test_a_cell_of_an_earlier_yaml_is_printed_from_the_record(folder: SweepFolder) -> None:
    earlier = cells_of(warmup_fraction=0.5)[0]
    with pytest.raises(ConfigError, match="no cell of the sweep begins"):
        cell_yaml(folder, earlier.id)
    folder.write_config(earlier)
    assert "lr_warmup_iters: 5\n" in cell_yaml(folder, earlier.id)
