"""Which runs a report is made of, and what it says of those that it lacks."""

import math
from pathlib import Path

import pytest

from megatron_mup.errors import ConfigError
from megatron_mup.transfer.report.command import make_folder_report, summary
from megatron_mup.transfer.report.source import reported, rows_of_sweep
from megatron_mup.transfer.runs import Status, append_row
from megatron_mup.transfer.sweep.cells import with_rate_and_seed
from megatron_mup.transfer.sweep.folder import SweepFolder
from tests.transfer.report.folders import TEN, folder_of, rows_of_cells
from tests.transfer.report.sample_rows import a_row
from tests.transfer.sweep.sweeps import cells_of, row_of


def test_runs_that_refinement_added_stay_and_those_on_other_shards_go(tmp_path):
    rows = rows_of_cells(TEN)
    cell = with_rate_and_seed(cells_of(**TEN)[0], log2_lr=-6.5, seed=4)
    added = a_row(cell=cell.id, arm="base", size=32.0, log2_lr=-6.5, seed=4)
    cell = with_rate_and_seed(cell, log2_lr=-7.5, seed=4)
    old = a_row(
        cell=cell.id,
        arm="base",
        size=32.0,
        log2_lr=-7.5,
        seed=4,
        data_sha256="e" * 64,
        started="2026-01-01T00:00:00+00:00",
    )
    folder_of(tmp_path, TEN, [])

    kept, missing, notes = rows_of_sweep(tmp_path, [*rows, added, old])

    assert kept == [*rows, added]
    assert missing == []
    assert notes == [
        "1 of 12 rows are left out: on other shards than the run that started last (column "
        "data_sha256)"
    ]
    assert rows_of_sweep(tmp_path, [*rows, added]) == ([*rows, added], [], [])


def test_a_yaml_that_cannot_be_read_any_more_leaves_all_rows(tmp_path):
    rows = rows_of_cells(TEN)
    assert rows_of_sweep(tmp_path, rows) == (rows, [], [])
    (tmp_path / "sweep.yaml").write_text("name: x\nstairs: {}\n")
    kept, _, (note,) = rows_of_sweep(tmp_path, rows)
    assert kept == rows
    assert note.startswith("all 10 rows are used: sweep.yaml cannot be read (")
    assert "stairs" in note


@pytest.mark.parametrize(
    ("columns", "words"),
    [
        (["width"], "--column 'width' must be NAME=COLUMN"),
        (["width="], "must be NAME=COLUMN"),
        (["lr=a", "lr=b"], "--column lr is given twice: a and b"),
    ],
)
def test_columns_in_another_form_are_refused(tmp_path, columns, words):
    (tmp_path / "t.csv").touch()
    with pytest.raises(ConfigError, match=words):
        reported(tmp_path / "t.csv", columns)


def notes_of(folder: Path) -> tuple[str, ...]:
    return reported(folder).notes


def test_a_whole_sweep_lacks_nothing(tmp_path):
    assert notes_of(folder_of(tmp_path, TEN, rows_of_cells(TEN))) == ()


def test_missing_runs_are_counted_by_arm_and_size_on_top_of_everything(tmp_path):
    # Five rates at each of two widths; two of width 32 and one of width 64 are there not yet.
    rows = rows_of_cells(TEN)
    kept = [row for row in rows if (row.size, row.log2_lr) not in ((32, -8), (32, -4), (64, -8))]
    folder = folder_of(tmp_path / "widths", TEN, kept)

    (note,) = notes_of(folder)
    assert note == (
        "3 of 10 runs are missing: base width 32 (2) and 64 (1); 'megatron-mup sweep run "
        f"{folder}/sweep.yaml --out {folder}' goes on"
    )
    report = make_folder_report(folder)
    assert summary(report)[0] == note
    text = report.markdown.read_text("utf-8")
    assert "## What to run next\n\n- First the runs that the sweep still asks for" in text
    chapter = text.split("## Before you believe it\n\n")[1]
    assert chapter.startswith("- 3 of 10 runs are missing: base width 32 (2) and 64 (1); ")
    assert "3 of 10 runs are missing" in report.page.read_text("utf-8")


def test_missing_runs_of_several_arms_stand_by_arm(tmp_path):
    arms = {"mup": {}, "sp": {"parameterization.name": "sp"}}
    options = {**TEN, "arms": arms, "axes": {"optimizer.weight_decay": [0.1]}}
    rows = [row for row in rows_of_cells(options) if row.log2_lr > -8]
    (note,) = notes_of(folder_of(tmp_path, options, rows))
    assert note.startswith(
        "4 of 20 runs are missing: mup weight_decay=0.1 width 32 (1) and 64 (1), sp "
        "weight_decay=0.1 width 32 (1) and 64 (1); 'megatron-mup"
    )


def test_a_failed_run_is_missing_and_a_diverged_or_stopped_one_is_not(tmp_path):
    ends = (Status.FAILED, Status.DIVERGED, Status.STOPPED_EARLY)
    rows = rows_of_cells(TEN)
    rows[2:5] = [
        row_of(cell, math.nan, status=status)
        for cell, status in zip(cells_of(**TEN)[2:5], ends, strict=True)
    ]

    (note,) = notes_of(folder_of(tmp_path, TEN, rows))
    assert note.startswith("1 of 10 runs is missing (1 failed): base width 32 (1); 'megatron-mup")


def test_seeds_near_the_minimum_are_missing_only_where_they_are_due(tmp_path):
    options = {**TEN, "seeds": [1, 2, 3], "seeds_within_octaves": 1}
    first = [row for row in rows_of_cells(options) if row.seed == 1]
    folder = folder_of(tmp_path / "due", options, first)
    # The lowest loss is at -6: -7, -6 and -5 with two seeds, at two widths.
    (note,) = notes_of(folder)
    assert note.startswith("12 of 22 runs are missing: base width 32 (6) and 64 (6); ")

    # Width 64 lacks a run of the first seed: its 2 x 5 further ones are not decided.
    waits = [row for row in first if (row.size, row.log2_lr) != (64, -8)]
    (note,) = notes_of(folder_of(tmp_path / "waits", options, waits))
    assert note.startswith("7 of 16 runs are missing: base width 32 (6) and 64 (1); up to ")
    assert "up to 10 runs of further seeds wait for those of the first; 'megatron-mup" in note

    outside = [row for row in rows_of_cells(options) if row.seed == 1 or abs(row.log2_lr + 6) <= 1]
    assert notes_of(folder_of(tmp_path / "whole", options, outside)) == ()


def test_runs_that_refinement_asks_for_are_missing_too(tmp_path):
    options = {**TEN, "refine": {}}
    (note,) = notes_of(folder_of(tmp_path, options, rows_of_cells(options)))
    # The lowest loss of each width is at -6: -6.5 and -5.5 come first, with its seed.
    assert note.startswith("4 of 14 runs are missing: base width 32 (2) and 64 (2); refine")
    assert "refinement adds runs when these have ended" in note


def test_rows_of_tasks_that_were_not_merged_are_told_of(tmp_path):
    first, *others = rows_of_cells(TEN)
    folder_of(tmp_path, TEN, others)
    (tmp_path / "tasks").mkdir()
    append_row(SweepFolder(tmp_path, 1).table, first)
    (note,) = notes_of(tmp_path)
    assert note.startswith("1 of 10 runs is missing: base width 32 (1); 1 of them is in a table of")
    assert f"which 'megatron-mup sweep merge {tmp_path}' takes over" in note
