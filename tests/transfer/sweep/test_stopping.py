"""Runs that end before their time: the rule on written curves, the worker's files, real runs."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_mup.errors import ConfigError, DataError
from megatron_mup.training.exit_requests import ExitReason, ExitRequests
from megatron_mup.training.metrics import JsonLines, read_metrics
from megatron_mup.transfer.runs import read_rows
from megatron_mup.transfer.sweep.cells import make_cells
from megatron_mup.transfer.sweep.curves import losses_by_step, read_curve, write_curve
from megatron_mup.transfer.sweep.folder import SweepFolder
from megatron_mup.transfer.sweep.pool import Share
from megatron_mup.transfer.sweep.refinement import strategy_of
from megatron_mup.transfer.sweep.session import RunRequest, run_sweep
from megatron_mup.transfer.sweep.spec import StopEarly, load_sweep
from megatron_mup.transfer.sweep.status_report import render_status, sweep_status
from megatron_mup.transfer.sweep.stopping import (
    Contest,
    contest,
    looks,
    near_rates,
    scatter,
    smoothed,
    surely_worse,
)
from megatron_mup.transfer.sweep.worker import Watch
from tests.transfer.sweep.sweeps import cells_of, sweep_of, write_sweep


def wavy(level: float, steps: int = 100) -> list[float]:
    """Losses 0.1 above and below a level in turn."""
    return [level + (0.1 if step % 2 else -0.1) for step in range(steps)]


def test_runs_are_looked_at_at_every_tenth_of_the_rest() -> None:
    assert looks(0.5, 200) == [100, 120, 140, 160, 180]
    assert looks(0.75, 100) == [75, 85, 95]
    assert looks(0.95, 100) == [95]
    assert looks(0.5, 2) == [1]


def test_the_mean_is_of_the_last_twentieth_before_the_step() -> None:
    losses = [float(step) for step in range(1, 101)]
    # Steps 46 to 50.
    assert smoothed(losses, 50, 100) == 48.0
    assert math.isnan(smoothed(losses[:49], 50, 100))
    assert smoothed([1.0, math.nan, 3.0, math.nan, math.nan], 5, 100) == 2.0
    assert math.isnan(smoothed([math.nan] * 5, 5, 100))


def test_the_scatter_of_a_step_does_not_count_a_trend_twice() -> None:
    # Differences of 0.2: 0.2 / sqrt 2.
    assert scatter(wavy(3.0), 100, 100) == pytest.approx(0.141421, rel=1e-5)
    # The last fifth alone counts.
    assert scatter([9.0, 1.0] * 40 + [2.0] * 20, 100, 100) == 0.0


def test_the_scatter_of_a_few_steps_is_not_known() -> None:
    # A fifth of 55 steps are 11, with 10 differences; one of them not finite leaves 9.
    assert scatter(wavy(3.0), 55, 55) == pytest.approx(0.141421, rel=1e-5)
    assert math.isnan(scatter(wavy(3.0), 50, 50))
    assert math.isnan(scatter([*wavy(3.0, steps=50), math.nan, *wavy(3.0, steps=4)], 55, 55))
    assert math.isnan(scatter([1.0], 1, 100))


@pytest.mark.parametrize("planned", [5, 10, 50])
def test_very_short_runs_are_not_stopped(planned: int) -> None:
    step = planned - 1
    rivals = {-6.0: wavy(3.0)}
    long: dict[str, Any] = {"near": (), "margin": 0.1}
    assert not surely_worse([99.0] * planned, rivals, step=step, planned=planned, **long)
    assert surely_worse([99.0] * 55, rivals, step=54, planned=55, **long)


def worse(level: float, margin: float = 1.0, near: tuple[float, ...] = (-9.0,)) -> bool:
    # The first of them has not come as far as step 50.
    rivals = {-5.0: wavy(1.0, steps=40), -6.0: wavy(3.0), -7.0: wavy(3.3)}
    return surely_worse([level] * 60, rivals, near=near, step=50, planned=100, margin=margin)


def test_a_run_ends_if_it_is_worse_than_the_lowest_by_more_than_the_margin() -> None:
    # The scatter of the lowest is 0.1414 nats, and its last five steps have a mean of 3.02.
    assert worse(3.17)
    assert not worse(3.15)
    assert worse(3.31, margin=2.0)
    assert not worse(3.29, margin=2.0)
    assert not worse(2.0)


def test_a_run_near_the_lowest_does_not_end() -> None:
    assert not worse(9.0, near=(-7.0, -6.0))
    # Near a rate that is not the lowest one.
    assert worse(9.0, near=(-8.0, -7.0))


def test_without_losses_nothing_ends() -> None:
    arguments: dict[str, Any] = {"near": (), "step": 50, "planned": 100, "margin": 1.0}
    assert not surely_worse(wavy(9.0), {}, **arguments)
    assert not surely_worse([], {-6.0: wavy(3.0)}, **arguments)
    assert not surely_worse([math.nan] * 60, {-6.0: wavy(3.0)}, **arguments)


def test_near_is_where_a_fit_would_use_the_run_and_one_rate_further() -> None:
    rates = [-9.0, -8.0, -7.0, -6.0, -5.0, -1.0]
    # A fit around any of -9 to -6 uses -8, and a lowest loss at -5 may still move to -6.
    assert near_rates(-8.0, rates, 2.0) == [-9.0, -8.0, -7.0, -6.0, -5.0]
    assert near_rates(-9.0, rates, 2.0) == [-9.0, -8.0, -7.0, -6.0]
    assert near_rates(-9.0, rates, 0.0) == [-9.0, -8.0, -7.0]
    # A neighbour is used however far it is.
    assert near_rates(-1.0, rates, 2.0) == [-6.0, -5.0, -1.0]
    # Steps of 0.4 are no binary fractions; five of them are two octaves.
    fine = [-6.0 + 0.4 * index for index in range(11)]
    assert near_rates(fine[2], fine, 2.0) == fine[:9]


def test_a_curve_comes_back(tmp_path: Path) -> None:
    path = tmp_path / "curves" / "a.npy"
    write_curve(path, [3.5, math.nan, 2.25])
    found = read_curve(path)
    assert (found[0], found[2]) == (3.5, 2.25)
    assert math.isnan(found[1])
    assert [item.name for item in path.parent.iterdir()] == ["a.npy"]
    path.write_bytes(b"nonsense")
    with pytest.raises(DataError, match=r"cannot read the losses"):
        read_curve(path)


def test_losses_stand_at_their_steps() -> None:
    rows = [{"iteration": 1.0, "lm loss": 4.0}, {"iteration": 2.0, "x": 1.0}]
    losses = losses_by_step([*rows, {"iteration": 3.0, "lm loss": 2.0}])
    assert (losses[0], losses[2], len(losses)) == (4.0, 2.0, 3)
    assert math.isnan(losses[1])
    assert losses_by_step([]) == []


def test_rivals_are_the_other_rates_of_the_arm_size_and_seed(tmp_path: Path) -> None:
    changes: dict[str, Any] = {
        "arms": {"a": {}, "b": {"clip_grad": 0.5}},
        "learning_rate": {"log2": [-9, -8, -6, -5, -4]},
    }
    cells = cells_of(**changes)
    folder = SweepFolder(tmp_path)
    data = contest(cells[0], cells, rule=StopEarly(after=0.5, margin=3.0), folder=folder)
    assert [rate for rate, _ in data["rivals"]] == [-8.0, -6.0, -5.0, -4.0]
    assert data["near"] == [-9.0, -8.0, -6.0]
    assert (data["planned"], data["margin"], data["looks"]) == (10, 3.0, [5, 6, 7, 8, 9])
    assert data["own"] == f"{tmp_path}/cells/{cells[0].id}/metrics.jsonl"
    assert data["rivals"][0][1] == [
        f"{tmp_path}/curves/{cells[1].id}.npy",
        f"{tmp_path}/cells/{cells[1].id}/metrics.jsonl",
    ]


def test_rates_in_the_middle_go_first_and_the_first_seed_stays_the_first() -> None:
    options: dict[str, Any] = {
        "learning_rate": {"log2": [-9, -8, -7, -6, -5]},
        "scale": {"axis": "width", "values": [32]},
        "seeds": [7, 2],
    }
    cells = cells_of(**options)
    strategy = strategy_of(sweep_of(stop_early={}, **options), cells)
    first = [(cell.seed, cell.log2_lr) for cell in strategy.wanted({})]
    assert first == [(7, -7.0), (7, -8.0), (7, -6.0), (7, -9.0), (7, -5.0)]
    plain = strategy_of(sweep_of(**options), cells)
    assert [cell.log2_lr for cell in plain.wanted({})] == [-9.0, -8.0, -7.0, -6.0, -5.0]


def running(folder: Path, level: float, *, steps: int = 50, start: int = 0) -> list[str]:
    """Files of a cell that runs: it has no curve yet."""
    path = folder / "metrics.jsonl"
    sink = JsonLines(path, start=start)
    for step, loss in enumerate(wavy(level, steps=steps)[start:], start + 1):
        sink.write(step, {"lm loss": loss})
    sink.close()
    return [f"{folder}.npy", str(path)]


def contest_of(own: list[str], *rivals: list[str]) -> dict[str, Any]:
    """Of a cell at 2^-9 after half of its 100 steps, with rivals from 2^-6 on."""
    return {
        "looks": [50],
        "planned": 100,
        "margin": 1.0,
        "near": [-9.0],
        "own": own[1],
        "rivals": [[-6.0 + index, files] for index, files in enumerate(rivals)],
    }


def test_a_contest_reads_what_ended_and_what_runs(tmp_path: Path) -> None:
    data = contest_of(running(tmp_path / "own", 4.0), running(tmp_path / "running", 5.0))
    # Not begun.
    data["rivals"].append([-7.0, [str(tmp_path / "no.npy"), str(tmp_path / "no.jsonl")]])
    assert not Contest(data).ends_after(50)
    write_curve(tmp_path / "no.npy", wavy(3.0))
    assert Contest(data).ends_after(50)
    assert not Contest(data).ends_after(49)


def test_a_rival_that_runs_decides_up_to_its_last_whole_step(tmp_path: Path) -> None:
    own, rival = running(tmp_path / "own", 4.0), running(tmp_path / "rival", 3.0)
    assert Contest(contest_of(own, rival)).ends_after(50)
    # Step 50 is half written.
    whole = Path(rival[1]).read_bytes()
    Path(rival[1]).write_bytes(whole[:-8])
    assert not Contest(contest_of(own, rival)).ends_after(50)
    Path(rival[1]).write_bytes(whole + b'{"iteration": 51, "lm lo')
    assert Contest(contest_of(own, rival)).ends_after(50)


def test_a_rival_that_ends_between_two_looks_at_its_files_is_not_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = running(tmp_path / "own", 4.0)
    curve, metrics = tmp_path / "rival.npy", tmp_path / "rival" / "metrics.jsonl"

    def read(path: Path) -> list[dict[str, float]]:
        if path == metrics:
            # It keeps its losses, and then its folder is deleted.
            write_curve(curve, wavy(3.0))
        return read_metrics(path)

    monkeypatch.setattr("megatron_mup.training.metrics.read_metrics", read)
    assert Contest(contest_of(own, [str(curve), str(metrics)])).ends_after(50)


def test_a_run_that_went_on_from_a_checkpoint_counts_the_steps_it_made_last(
    tmp_path: Path,
) -> None:
    rival = running(tmp_path / "rival", 3.0)
    # Killed at step 60 with losses of 9, it went on from step 40 with losses of 3.
    running(tmp_path / "own", 9.0, steps=60)
    own = running(tmp_path / "own", 3.0, start=40)
    assert not Contest(contest_of(own, rival)).ends_after(50)


def test_without_its_own_losses_a_run_goes_on(tmp_path: Path) -> None:
    data = contest_of(["", str(tmp_path / "lost.jsonl")], running(tmp_path / "rival", 3.0))
    assert not Contest(data).ends_after(50)


def test_a_run_that_is_worse_is_asked_to_stop_after_its_step() -> None:
    class Worse:
        def ends_after(self, step: int) -> bool:
            return step == 4

    watch = Watch(lambda _iteration: None, lambda: False, Worse())  # type: ignore[arg-type]
    with ExitRequests() as exits:
        for iteration in range(1, 5):
            watch.due(iteration)
        assert exits.agreed() is None
        assert not watch.stopped_early
        watch.due(5)
        assert exits.agreed() is ExitReason.SIGUSR1
        assert watch.stopped_early


def test_a_far_rate_ends_early_and_is_recorded_with_what_it_had(tmp_path: Path) -> None:
    config = write_sweep(
        tmp_path,
        scale={"axis": "width", "values": [32]},
        # The lowest rate is neither a neighbour of the highest one, nor of a neighbour of it.
        learning_rate={"log2": [-15, -12, -9, -6]},
        seeds=[1],
        tokens={"rule": "fixed_tokens", "tokens": 60 * 4 * 16},
        stop_early={"after": 0.5, "margin": 0.1},
    )
    out = tmp_path / "out"
    cells = make_cells(load_sweep(config), out / "data")
    share = Share(workers=1, threads=1)
    lines: list[str] = []
    # The best goes first, so that there is something to compare with.
    best = cells[3]
    write_curve(SweepFolder(out).curve(best.id), [1.0, 1.1] * 30)
    request = RunRequest(config=config, out=out, text=(), share=share)
    assert run_sweep(request, lines.append) == 0
    rows = {row.log2_lr: row for row in read_rows(out / "runs.csv")}
    assert {rate: row.status.value for rate, row in rows.items()} == {
        -15.0: "stopped_early",
        -12.0: "finished",
        -9.0: "finished",
        -6.0: "finished",
    }
    early = rows[-15.0]
    # Looked at after 30 steps, and ended after the next one.
    assert (early.steps, early.planned_steps, early.tokens) == (31, 60, 31 * 64)
    assert math.isnan(early.validation_loss)
    assert early.train_loss > 4.0
    assert len(read_curve(SweepFolder(out).curve(early.cell))) == 31
    assert len(read_curve(SweepFolder(out).curve(best.id))) == 60
    assert any("lr 2^-15 seed 1: stopped early at step 31" in line for line in lines)
    # 29 of 4 x 60 steps.
    saved = "stop_early: 1 of 4 runs ended early, which saved 29 of 240 steps (12%), about "
    assert lines[-1].startswith(saved)
    status = sweep_status(SweepFolder(out))
    assert (status["stop_early"]["steps"], status["stop_early"]["runs"]) == (29, 1)
    assert saved in render_status(status)
    assert list((out / "cells").iterdir()) == []
    # It is through: the same command has nothing to run, nor has one without the option.
    before = (out / "runs.csv").read_bytes()
    assert run_sweep(request, lines.append) == 0
    data = yaml.safe_load(config.read_text())
    del data["stop_early"]
    config.write_text(yaml.safe_dump(data))
    assert run_sweep(request, lines.append) == 0
    assert lines[-1].startswith("0 runs ended")
    assert (out / "runs.csv").read_bytes() == before


def test_the_option_is_read_with_defaults_and_refused_by_name() -> None:
    assert sweep_of().stop_early is None
    assert sweep_of(stop_early={}).stop_early == StopEarly(after=0.5, margin=1.0)
    given = {"after": 0.25, "margin": 4}
    assert sweep_of(stop_early=given).stop_early == StopEarly(after=0.25, margin=4.0)
    for wrong in ({"after": 0}, {"after": 1}, {"margin": 0}, {"step": 3}):
        with pytest.raises(ConfigError, match=r"stop_early\."):
            sweep_of(stop_early=wrong)
