"""Rounds of further runs: on curves whose minimum is known, from rows alone, within the limits."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_mup.transfer.runs import Row, Status, append_row, read_rows
from megatron_mup.transfer.sweep.cells import Cell, with_rate_and_seed
from megatron_mup.transfer.sweep.folder import SweepFolder
from megatron_mup.transfer.sweep.plan_report import render_plan
from megatron_mup.transfer.sweep.pool import Pool, Share, Worker
from megatron_mup.transfer.sweep.refinement import DecisionLog, Refinement, strategy_of
from megatron_mup.transfer.sweep.results import Origin
from megatron_mup.transfer.sweep.runner import Ending, Limits, run_cells
from megatron_mup.transfer.sweep.status_report import render_status, sweep_status
from tests.transfer.sweep.sweeps import cells_of, row_of, sweep_of
from tests.transfer.test_runs import ROW

ONE_WIDTH = {"axis": "width", "values": [32]}
RATES = {"log2_min": -9, "log2_max": -3, "step": 1}
# Scatter of runs, drawn once; entry by rate, seed and size.
NOISE = (0.3, -1.2, 0.8, -0.4, 1.1, -0.9, 0.2, 0.6, -0.7, 1.4, -0.1, -1.0, 0.5)


def loss_of(cell: Cell, best: float, noise: float) -> float:
    """A parabola of curvature 0.1 nats an octave squared, and scatter."""
    at = round(7 * cell.log2_lr + 3 * cell.seed + cell.size) % len(NOISE)
    return 3.0 + 0.05 * (cell.log2_lr - best) ** 2 + noise * NOISE[at]


def refinement(refine: dict[str, Any], **changes: Any) -> Refinement:
    options: dict[str, Any] = {"learning_rate": RATES, "seeds": [1], "refine": refine, **changes}
    strategy = strategy_of(sweep_of(**options), cells_of(**options))
    assert isinstance(strategy, Refinement)
    return strategy


def run_all(
    strategy: Refinement,
    *,
    best: float = -6.0,
    noise: float = 0.002,
    rows: dict[str, Row] | None = None,
    most: int = 1000,
) -> dict[str, Row]:
    """Run one cell after another until nothing is wanted, or so many have run."""
    rows = dict(rows or {})
    for _ in range(most):
        missing = [cell for cell in strategy.wanted(rows) if cell.id not in rows]
        if not missing:
            break
        rows[missing[0].id] = row_of(missing[0], loss_of(missing[0], best, noise))
    return rows


def test_without_the_option_the_grid_is_all() -> None:
    strategy = strategy_of(sweep_of(), cells_of())
    assert not isinstance(strategy, Refinement)


def test_a_cell_off_the_grid_is_what_a_finer_grid_would_have_made() -> None:
    coarse = cells_of(learning_rate={"log2": [-7, -5]}, seeds=[1])
    fine = cells_of(learning_rate={"log2": [-7, -6.5, -5]}, seeds=[1, 4])
    made = with_rate_and_seed(coarse[0], log2_lr=-6.5, seed=4)
    assert made == next(cell for cell in fine if (cell.log2_lr, cell.seed) == (-6.5, 4))
    assert made.id != coarse[0].id


def test_an_optimum_beyond_the_grid_is_reached_in_steps_of_two() -> None:
    strategy = refinement({"interval_octaves": 3, "max_rounds": 2})
    rows = run_all(strategy, best=-1.0)
    assert {row.log2_lr for row in rows.values()} == {float(rate) for rate in range(-9, 2)}
    first, second, last = (d for d in strategy.decisions(rows) if d.size == 32)
    assert (first.action, first.runs) == ("extend", ((-2.0, 1), (-1.0, 1)))
    # The lowest loss is at the new end.
    assert (second.action, second.runs) == ("extend", ((0.0, 1), (1.0, 1)))
    assert last.action == "stop"
    assert last.log2_lr == pytest.approx(-1.0, abs=0.3)


def test_a_wide_interval_is_narrowed_by_half_steps_then_seeds() -> None:
    strategy = refinement({"interval_octaves": 0.3}, scale=ONE_WIDTH)
    rows = run_all(strategy, noise=0.02)
    actions = [decision.action for decision in strategy.decisions(rows)]
    assert actions[:2] == ["halve", "seeds"]
    assert actions[-1] == "stop"
    assert {-6.5, -5.5} < {row.log2_lr for row in rows.values()}
    assert {row.seed for row in rows.values()} > {1}
    assert all(-14 <= row.log2_lr <= 2 for row in rows.values())


def test_narrow_intervals_add_nothing() -> None:
    strategy = refinement({"interval_octaves": 2}, seeds=[1, 2, 3])
    rows = run_all(strategy)
    assert len(rows) == 42
    assert [decision.reason.split(":")[0] for decision in strategy.decisions(rows)] == [
        "narrow enough",
        "narrow enough",
    ]


def test_a_resumed_sweep_decides_the_same() -> None:
    options = {"interval_octaves": 0.3}
    whole = run_all(refinement(options), noise=0.02)
    decided = refinement(options).decisions(whole)
    assert len(decided) > 4
    # In the grid, after it, and in the midst of two rounds.
    for most in (9, 14, 16, len(whole) - 3):
        half = run_all(refinement(options), noise=0.02, most=most)
        again = refinement(options)
        assert run_all(again, noise=0.02, rows=half) == whole
        assert again.decisions(whole) == decided
    # Rows that ended in another order, beside rows of other sweeps.
    other = dict(reversed(whole.items())) | {"x": replace(ROW, validation_loss=1.0)}
    assert refinement(options).decisions(other) == decided


def test_other_losses_of_the_same_runs_are_fitted_anew() -> None:
    strategy = refinement({"interval_octaves": 2}, scale=ONE_WIDTH, seeds=[1, 2, 3])
    for best in (-6.0, -5.2):
        other = refinement({"interval_octaves": 2}, scale=ONE_WIDTH, seeds=[1, 2, 3])
        (decision,) = strategy.decisions(run_all(other, best=best))
        assert decision.log2_lr == pytest.approx(best, abs=0.1)


def test_rates_that_differ_in_their_last_digit_are_one() -> None:
    options = {"interval_octaves": 0.3}
    rows = run_all(refinement(options), noise=0.02)
    # As an earlier YAML wrote them: the runs are the same.
    earlier = {
        key: replace(row, log2_lr=math.nextafter(row.log2_lr, 0.0)) for key, row in rows.items()
    }
    again = refinement(options)
    assert again.decisions(earlier) == refinement(options).decisions(rows)
    assert {cell.id for cell in again.wanted(earlier)} == set(rows)


def ended_as(strategy: Refinement, status: dict[float, Status]) -> dict[str, Row]:
    """All runs of the grid; those at some rates ended without a loss."""
    rows = {}
    for cell in strategy.wanted({}):
        row = row_of(cell, loss_of(cell, -6.0, 0.02))
        if cell.log2_lr in status:
            row = replace(row, status=status[cell.log2_lr], validation_loss=math.nan)
        rows[cell.id] = row
    return rows


def test_runs_that_were_stopped_far_from_the_minimum_change_no_decision() -> None:
    options = {"interval_octaves": 0.3}
    strategy = refinement(options, scale=ONE_WIDTH)
    rows = ended_as(strategy, {-9.0: Status.STOPPED_EARLY, -3.0: Status.STOPPED_EARLY})
    after = run_all(strategy, noise=0.02, rows=rows)
    whole = run_all(refinement(options, scale=ONE_WIDTH), noise=0.02)
    assert strategy.decisions(after) == refinement(options, scale=ONE_WIDTH).decisions(whole)
    assert after.keys() == whole.keys()
    assert len(after) > 7


def test_where_nothing_ended_well_lower_rates_or_those_beside_stopped_runs_follow() -> None:
    strategy = refinement({}, scale=ONE_WIDTH)
    rates = [float(rate) for rate in range(-9, -2)]
    rows = ended_as(strategy, dict.fromkeys(rates, Status.DIVERGED))
    (decision,) = strategy.decisions(rows)
    assert (decision.action, decision.runs) == ("extend", ((-10.0, 1), (-11.0, 1)))
    stopped = dict.fromkeys(rates[:3], Status.STOPPED_EARLY)
    rows = ended_as(strategy, dict.fromkeys(rates, Status.DIVERGED) | stopped)
    (decision,) = strategy.decisions(rows)
    assert (decision.action, decision.runs) == ("halve", ((-6.5, 1),))


def test_one_of_two_runs_that_diverged_spoils_a_rate_and_one_that_was_stopped_does_not() -> None:
    strategy = refinement({"interval_octaves": 0.1}, scale=ONE_WIDTH, seeds=[1, 2])
    cells = cells_of(learning_rate=RATES, scale=ONE_WIDTH)
    rows = {cell.id: row_of(cell, loss_of(cell, -6.0, 0.02)) for cell in cells}
    stopped = next(cell for cell in cells if (cell.log2_lr, cell.seed) == (-5.0, 2))
    for status, reason in {
        Status.STOPPED_EARLY: "half steps beside 2^-6: ",
        Status.DIVERGED: "the lowest loss is at 2^-6, beside runs that did not end well at 2^-5",
    }.items():
        rows[stopped.id] = replace(row_of(stopped, math.nan), status=status)
        (decision,) = strategy.decisions(rows)
        assert decision.reason.startswith(reason)
    for cell in cells:
        early = Status.STOPPED_EARLY if cell.seed == 2 else Status.DIVERGED
        rows[cell.id] = replace(row_of(cell, math.nan), status=early)
        if cell.log2_lr == -3.0:
            rows[cell.id] = row_of(cell, 3.0 if cell.seed == 1 else math.nan)
    (decision,) = strategy.decisions(rows)
    assert (decision.action, decision.runs[0]) == ("extend", (-10.0, 1))


def test_a_run_that_the_grid_holds_for_a_further_seed_is_wanted_once() -> None:
    strategy = refinement(
        {"interval_octaves": 0.3}, scale=ONE_WIDTH, seeds=[1, 2], seeds_within_octaves=0
    )
    rows = run_all(strategy, noise=0.02)
    wanted = [cell.id for cell in strategy.wanted(rows)]
    assert len(wanted) == len(set(wanted)) == len(rows)
    grid = {cell.id for cell in cells_of(learning_rate=RATES, scale=ONE_WIDTH)}
    # The lowest loss came to lie at -6.5, whose seeds are run from -7 to -6.
    added = [row.cell for row in rows.values() if (row.log2_lr, row.seed) == (-7.0, 2)]
    assert len(added) == 1
    assert set(added) < grid


def test_failed_runs_are_waited_for() -> None:
    strategy = refinement({"interval_octaves": 0.3})
    rows = run_all(strategy, noise=0.02, most=14)
    assert len(strategy.wanted(rows)) > 14
    last = list(rows)[-1]
    rows[last] = replace(rows[last], status=Status.FAILED, validation_loss=math.nan)
    assert len(strategy.wanted(rows)) == 14
    assert strategy.decisions(rows) == []


def test_rounds_are_limited_and_the_last_word_says_so() -> None:
    strategy = refinement({"interval_octaves": 3, "max_rounds": 1})
    rows = run_all(strategy, best=-1.0)
    decisions = strategy.decisions(rows)
    assert [decision.round for decision in decisions] == [1, 1, 2, 2]
    words = "refine.max_rounds 1 is used up; the lowest loss is at 2^-1, the highest learning rate"
    assert [decision.reason for decision in decisions[2:]] == [words, words]
    assert decisions[0].words.startswith("base 64, round 1: 2 more runs, ")
    assert decisions[2].words == f"base 64, after round 1: no more runs, {words}"
    # Two rates beyond the grid for each of two widths.
    assert len(rows) == 14 + 4


def test_cells_are_limited_and_shared_by_arms() -> None:
    arms = {"a": {}, "b": {"clip_grad": 0.5}}
    strategy = refinement({"interval_octaves": 0.01, "max_cells": 7}, arms=arms)
    rows = run_all(strategy, noise=0.02)
    # Three for each arm: the half steps of the largest width, and the one that is left.
    assert len(rows) == 28 + 2 * 3
    decided = [decision for decision in strategy.decisions(rows) if decision.arm == "a"]
    assert [(d.size, d.action, d.runs) for d in decided[:2]] == [
        (64.0, "halve", ((-6.5, 1), (-5.5, 1))),
        (32.0, "halve", ((-6.5, 1),)),
    ]
    assert decided[1].reason.startswith("refine.max_cells 7 leaves 1 runs here; half steps")
    # Nobody is closed before the last run is given away.
    assert [(d.size, d.action) for d in decided[2:]] == [(64.0, "stop"), (32.0, "stop")]
    one = refinement({"interval_octaves": 0.01, "max_cells": 1}, scale=ONE_WIDTH)
    last = one.decisions(run_all(one, noise=0.02))[-1]
    assert last.reason.startswith("refine.max_cells 1 leaves 0 runs here; half steps beside")
    # As many as there are is not too many.
    exact = refinement({"interval_octaves": 0.01, "max_cells": 2}, scale=ONE_WIDTH)
    assert len(run_all(exact, noise=0.02)) == 7 + 2


def test_each_arm_waits_for_itself_alone() -> None:
    arms = {"a": {}, "b": {"clip_grad": 0.5}}
    strategy = refinement({"interval_octaves": 0.01}, arms=arms)
    rows = {
        cell.id: row_of(cell, loss_of(cell, -6.0, 0.02))
        for cell in strategy.wanted({})
        if cell.arm == "b"
    }
    assert {decision.arm for decision in strategy.decisions(rows)} == {"b"}


def test_decisions_are_kept_and_told_once(tmp_path: Path) -> None:
    strategy = refinement({"interval_octaves": 0.3}, scale=ONE_WIDTH)
    lines: list[str] = []
    log = DecisionLog(SweepFolder(tmp_path), strategy, lines.append)
    log.update({})
    assert not (tmp_path / "refinement.jsonl").exists()
    rows = run_all(strategy, noise=0.02, most=7)
    log.update(rows)
    log.update(rows)
    assert len(lines) == 1
    assert lines[0].startswith("refine base 32, round 1: 2 more runs, half steps beside 2^-6: ")
    rows = run_all(strategy, noise=0.02, rows=rows)
    log.update(rows)
    records = [json.loads(line) for line in (tmp_path / "refinement.jsonl").open()]
    assert len(records) == len(lines) == len(strategy.decisions(rows))
    assert records[0]["runs"] == [[-6.5, 1], [-5.5, 1]]
    assert (records[0]["arm"], records[0]["size"], records[0]["round"]) == ("base", 32.0, 1)
    assert records[-1]["action"] == "stop"
    assert records[-1]["low"] < records[-1]["log2_lr"] < records[-1]["high"]


def test_what_is_on_record_is_not_told_again_and_what_no_longer_holds_goes(tmp_path: Path) -> None:
    strategy = refinement({"interval_octaves": 0.3}, scale=ONE_WIDTH)
    path = tmp_path / "refinement.jsonl"
    rows = run_all(strategy, noise=0.02)
    DecisionLog(SweepFolder(tmp_path), strategy, lambda _line: None).update(rows)
    kept = path.read_bytes()
    lines: list[str] = []
    DecisionLog(SweepFolder(tmp_path), strategy, lines.append).update(rows)
    assert (lines, path.read_bytes()) == ([], kept)
    # A task does not refine, and leaves what is there.
    plain = strategy_of(sweep_of(), cells_of())
    DecisionLog(SweepFolder(tmp_path, 2), plain, lines.append).update(rows)
    assert path.read_bytes() == kept
    # The YAML does not ask for it any more.
    DecisionLog(SweepFolder(tmp_path), plain, lines.append).update(rows)
    assert (lines, path.read_bytes()) == ([], b"")


def test_the_runner_makes_the_rounds_and_starts_workers_as_work_comes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("megatron_mup.transfer.sweep.pool._WORKER", f"{__package__}.fake_worker")
    started: list[int] = []
    start = Pool.start

    def note(pool: Pool, slot: int) -> Worker:
        started.append(slot)
        return start(pool, slot)

    monkeypatch.setattr(Pool, "start", note)
    options: dict[str, Any] = {
        "learning_rate": {"log2": [-9, -8]},
        "seeds": [1],
        "scale": {"axis": "width", "values": [32]},
        "refine": {"max_rounds": 2},
    }
    folder = SweepFolder(tmp_path)
    folder.write_sweep(sweep_of(**options))
    lines: list[str] = []

    def run(limits: Limits) -> Ending:
        strategy = strategy_of(sweep_of(**options), cells_of(**options))
        log = DecisionLog(folder, strategy, lines.append)
        return run_cells(
            strategy,
            {row.cell: row for row in read_rows(folder.table)},
            folder=folder,
            origin=Origin(sweep="s", data_sha256="d", commit="c", torch="2", megatron_core="0"),
            share=Share(workers=2, threads=1),
            limits=limits,
            echo=lines.append,
            recorded=log.update,
        )

    run(Limits(max_cells=1))
    assert started == [0]
    rows = run(Limits()).rows
    # One run was left; the second worker came with the two beyond the grid.
    assert started == [0, 0, 1]
    # Its losses are (log2 LR + 7)^2.
    assert sorted(row.log2_lr for row in rows.values()) == [-9.0, -8.0, -7.5, -7.0, -6.5, -6.0]
    records = [json.loads(line) for line in (tmp_path / "refinement.jsonl").open()]
    assert [record["action"] for record in records] == ["extend", "halve", "stop"]
    assert records[-1]["log2_lr"] == pytest.approx(-7.0)
    told = [line.split(":")[0] for line in lines if line.startswith("refine base 32")]
    assert told == [f"refine base 32, {when}" for when in ("round 1", "round 2", "after round 2")]


def test_status_and_plan_tell_what_was_decided(tmp_path: Path) -> None:
    options: dict[str, Any] = {
        "learning_rate": RATES,
        "seeds": [1],
        "scale": {"axis": "width", "values": [32]},
        "refine": {"interval_octaves": 0.01, "max_rounds": 1, "max_cells": 5},
    }
    folder = SweepFolder(tmp_path)
    folder.write_sweep(sweep_of(**options))
    strategy = strategy_of(sweep_of(**options), cells_of(**options))
    assert isinstance(strategy, Refinement)
    rows = run_all(strategy, noise=0.02, most=8)
    for row in rows.values():
        append_row(folder.table, row)
    status = sweep_status(folder)
    assert (status["done"], status["total"], status["rows_of_other_cells"]) == (8, 9, 0)
    assert status["curves"][0]["ended"] == 8
    assert [item["action"] for item in status["refinement"]] == ["halve"]
    assert "refine base 32, round 1: 2 more runs, half steps beside 2^-6" in render_status(status)
    text = render_plan(sweep_of(**options), cells_of(**options), rows)
    assert "refine: at most 5 runs more, in 1 round at most" in text
