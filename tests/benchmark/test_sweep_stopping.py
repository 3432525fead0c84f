"""The rule of early stopping applied to recorded losses."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from megatron_mup.benchmark.sweep_stopping import replay, replay_and_report
from megatron_mup.errors import DataError
from megatron_mup.transfer.runs import Status, append_row
from megatron_mup.transfer.sweep.curves import write_curve
from megatron_mup.transfer.sweep.folder import SweepFolder
from tests.transfer.sweep.sweeps import cells_of, row_of, sweep_of
from tests.transfer.test_runs import ROW


def flat(level: float, steps: int = 100) -> list[float]:
    return [level + (0.1 if step % 2 else -0.1) for step in range(steps)]


def test_the_middle_goes_first_and_far_rates_end_for_it() -> None:
    curves = {float(rate): flat(3 + 0.2 * abs(rate + 6)) for rate in range(-10, -1)}
    result = replay(curves, 100, after=0.5, margin=1.0)
    # Four octaves away the loss is 0.8 higher, and the scatter is 0.14.
    assert result.ends == {-10.0: 51, -2.0: 51}
    assert (result.steps, result.planned) == (7 * 100 + 2 * 51, 900)
    assert replay(curves, 100, after=0.5, margin=6.0).ends == {}
    neighbours = replay(curves, 100, after=0.5, margin=1.0, octaves=0.0)
    assert set(neighbours.ends) == {-10.0, -9.0, -3.0, -2.0}


def test_runs_that_came_before_the_best_are_not_compared_with_it() -> None:
    curves = {float(rate): flat(3 + 0.2 * abs(rate + 10)) for rate in range(-10, -1)}
    # In the order -6, -7, -5, -8, -4, -9, -3, -10, -2; for -5 the lowest one is near until -9.
    assert set(replay(curves, 100, after=0.5, margin=1.0).ends) == {-4.0, -3.0, -2.0}


def test_a_folder_gives_a_line_for_each_size(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = SweepFolder(tmp_path)
    changes = {"learning_rate": {"log2_min": -10, "log2_max": -2, "step": 1}, "seeds": [1]}
    folder.write_sweep(sweep_of(**changes))
    # A run of another YAML: its rate would be the lowest of all.
    append_row(folder.table, replace(ROW, cell="other", size=32.0, log2_lr=-20.0))
    for cell in cells_of(**changes):
        loss = 3 + 0.2 * (cell.log2_lr + 6) ** 2
        append_row(folder.table, row_of(cell, loss, planned_steps=100))
        write_curve(folder.curve(cell.id), flat(loss))
    replay_and_report(tmp_path, 0.5, [1.0, 50.0], 2.0)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 + 4
    # Twice 49 of 900 steps.
    assert lines[2].startswith("| base | 32 | 1 | 2 | 11% | -6.0000 (")
    before, after = lines[2].split("|")[6:8]
    assert before == after
    assert lines[4].startswith("| base | 32 | 50 | 0 | 0% | ")
    folder.curve(cells_of(**changes)[0].id).unlink()
    with pytest.raises(DataError, match=r"was made before losses were kept"):
        replay_and_report(tmp_path, 0.5, None, 2.0)


def test_runs_that_were_stopped_cannot_tell_what_stopping_changes(tmp_path: Path) -> None:
    folder = SweepFolder(tmp_path)
    folder.write_sweep(sweep_of())
    stopped = cells_of()[0].id
    append_row(folder.table, replace(ROW, cell=stopped, status=Status.STOPPED_EARLY))
    with pytest.raises(DataError, match=f"1 runs of .* stopped early, the first one {stopped}"):
        replay_and_report(tmp_path, 0.5, None, 2.0)
