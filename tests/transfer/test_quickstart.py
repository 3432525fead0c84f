"""The quickstart: its plan, its text, its table and picture, and continuing after a stop.

The run itself, on real text, is in tests/test_readme.py.
"""

from __future__ import annotations

import math
import os
from dataclasses import replace
from pathlib import Path

import matplotlib.pyplot as plt
import pytest

from megatron_mup.config import RunConfig
from megatron_mup.errors import ConfigError, DataError
from megatron_mup.parameterization.options import Parameterization
from megatron_mup.training import loop
from megatron_mup.training.loop import TrainResult
from megatron_mup.transfer import quickstart as module
from megatron_mup.transfer.picture import curves_of, draw, table_lines
from megatron_mup.transfer.quickstart import (
    QuickstartPlan,
    cell_config,
    report_quickstart,
    run_cell,
    run_quickstart,
)
from megatron_mup.transfer.quickstart_data import cut_text, make_shards
from megatron_mup.transfer.records import Cell, Record


def fake_record(cell: Cell) -> Record:
    """A run whose optimum is -5 for muP and moves by one octave per doubling for SP."""
    shift = 0.0 if cell.parameterization == "mup" else math.log2(cell.width / 32)
    diverged = cell.log2_lr > -3.5 and cell.width == 128
    loss = 3.0 + 0.1 * (cell.log2_lr + 5.0 + shift) ** 2
    return Record(
        cell=cell,
        validation_loss=math.nan if diverged else loss,
        train_loss=loss,
        diverged=diverged,
        parameters=cell.width**2,
        tokens=1000,
        seconds=1.0,
        commit="test",
    )


def test_default_plan_meets_its_promises() -> None:
    plan = QuickstartPlan(out=Path("x"))
    assert max(plan.widths) >= 4 * min(plan.widths)
    assert len(plan.widths) == 3
    assert len(plan.log2_lrs) >= 5
    assert plan.steps >= 150
    assert len(plan.cells) == len(set(plan.cells)) == 3 * len(plan.log2_lrs) * 2


def test_cells_of_mup_differ_from_sp_in_rules_and_not_in_architecture() -> None:
    mup = cell_config(Cell("mup", 128, -5.0, 1, 200), Path("d"))
    sp = cell_config(Cell("sp", 128, -5.0, 1, 200), Path("d"))
    assert mup.model == sp.model
    assert mup.training == sp.training
    # Everything else that could move the picture is the same, zero queries included.
    assert replace(mup.parameterization, name=Parameterization.SP) == sp.parameterization
    assert mup.parameterization.q_init == "zero"
    assert (mup.optimizer, mup.schedule, mup.data) == (sp.optimizer, sp.schedule, sp.data)
    rates = {row.tensor.role: row.lr for row in mup.table.rows}
    # Width 128 over base 32: hidden and readout learn at a quarter of 2^-5.
    assert rates["query"] == rates["unembedding"] == 2.0**-7
    assert rates["embedding"] == 2.0**-5
    assert {row.lr for row in sp.table.rows} == {2.0**-5}
    assert mup.table.multipliers.attention == 1 / 16
    assert sp.table.multipliers.attention == 1 / 4


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"widths": (32, 40)}, "--widths is 32,40; give positive multiples of 16"),
        ({"widths": (0, 32)}, "--widths is 0,32; give positive multiples of 16"),
        ({"widths": (-16,)}, "--widths is -16; give positive"),
        ({"widths": (32, 32)}, "each once, the smallest first"),
        ({"widths": ()}, "--widths is ; give positive"),
        ({"log2_lrs": (-5.0, -6.0, -7.0)}, "--log2-lrs is -5,-6,-7; give at least 3 finite"),
        ({"log2_lrs": (-6.0, -5.0)}, "--log2-lrs is -6,-5; give at least 3 finite"),
        ({"log2_lrs": (-6.0, math.nan, -5.0)}, "--log2-lrs is -6,nan,-5; give at least 3 finite"),
        ({"log2_lrs": (-6.0, -5.0, math.inf)}, "at least 3 finite"),
        ({"steps": 0}, "--steps is 0 and --workers is 2; both must be at least 1"),
    ],
)
def test_plans_that_show_nothing_are_refused(change: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        QuickstartPlan(out=Path("x"), **change)  # type: ignore[arg-type]


def test_only_missing_runs_are_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[Cell] = []

    def fake_runs(cells: list[Cell], *_rest: object) -> list[Record]:
        ran.extend(cells)
        return [fake_record(cell) for cell in cells]

    monkeypatch.setattr(module, "_run_all", fake_runs)
    monkeypatch.setattr(module, "prepare_data", lambda *_: tmp_path)
    small = QuickstartPlan(out=tmp_path, widths=(32, 64), log2_lrs=(-6.0, -5.0, -4.0))
    large = QuickstartPlan(out=tmp_path, widths=(32, 64, 128), log2_lrs=(-6.0, -5.0, -4.0))
    run_quickstart(small, echo=lambda _line: None)
    assert len(ran) == 12
    records = run_quickstart(large, echo=lambda _line: None)
    assert len(ran) == 18
    assert [record.cell for record in records] == large.cells
    assert len((tmp_path / "runs.csv").read_text().splitlines()) == 19


def test_table_says_where_optima_lie_and_how_far_they_moved() -> None:
    plan = QuickstartPlan(out=Path("x"), log2_lrs=(-9.0, -8.0, -7.0, -6.0, -5.0, -4.0, -3.0))
    text = "\n".join(table_lines(curves_of([fake_record(cell) for cell in plan.cells]), 5.0))
    assert "mup: the optimum moved +0.00 octaves from width 32 to 128." in text
    assert "sp: the optimum moved -2.00 octaves from width 32 to 128." in text
    assert "| mup | 128 | 16,384 | -5.00 | 3.0000 | 1 run(s) diverged |" in text


def test_table_reports_edges_and_losses_above_the_unigram_entropy() -> None:
    plan = QuickstartPlan(out=Path("x"), log2_lrs=(-9.0, -8.0, -7.0))
    text = "\n".join(table_lines(curves_of([fake_record(cell) for cell in plan.cells]), 3.05))
    assert "minimum at the edge" in text
    assert "not below the unigram entropy 3.050" in text
    assert "the shift from width 32 to 128 cannot be told" in text


def test_picture_is_drawn_with_diverged_runs(tmp_path: Path) -> None:
    plan = QuickstartPlan(out=tmp_path)
    curves = curves_of([fake_record(cell) for cell in plan.cells])
    draw(curves, 5.0, tmp_path / "picture.png", caption="fake")
    assert (tmp_path / "picture.png").read_bytes()[:4] == b"\x89PNG"
    assert [path.name for path in tmp_path.iterdir()] == ["picture.png"]


def test_each_worker_process_has_an_index_cache_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs: list[RunConfig] = []

    def fake_train(run: RunConfig, **_rest: object) -> TrainResult:
        runs.append(run)
        return TrainResult(history=[{"lm loss": 3.0}], validation_loss=2.5)

    monkeypatch.setattr(loop, "train", fake_train)
    cell = Cell("mup", 32, -5.0, 1, 10)
    for process in (11, 12):
        monkeypatch.setattr(os, "getpid", lambda process=process: process)
        assert run_cell(cell, tmp_path).validation_loss == 2.5
    folders = [run.data.data_cache_path for run in runs]
    assert folders == [f"{tmp_path}/cache/11", f"{tmp_path}/cache/12"]
    assert runs[0].data.train_data_path == [f"{tmp_path}/text_train"]


def all_diverged(plan: QuickstartPlan) -> list[Record]:
    return [
        replace(fake_record(cell), validation_loss=math.nan, diverged=True) for cell in plan.cells
    ]


def test_table_says_that_every_run_diverged() -> None:
    plan = QuickstartPlan(out=Path("x"), log2_lrs=(-3.0, -2.0, -1.0))
    lines = table_lines(curves_of(all_diverged(plan)), 5.0)
    assert "| mup | 64 | 4,096 | - | - | all runs diverged |" in lines
    assert "sp: no optimum from width 32 to 128; too many runs diverged." in lines


def test_picture_shows_a_cross_for_every_run_when_all_diverged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = QuickstartPlan(out=tmp_path, log2_lrs=(-3.0, -2.0, -1.0))
    figures = []
    monkeypatch.setattr(plt, "close", figures.append)
    draw(curves_of(all_diverged(plan)), 5.0, tmp_path / "picture.png", caption="fake")
    monkeypatch.undo()
    (figure,) = figures
    assert len(figure.axes) == 2
    for axis in figure.axes:
        crosses = [line for line in axis.lines if line.get_marker() == "x"]
        assert [list(line.get_xdata()) for line in crosses] == [[-3.0, -2.0, -1.0]] * 3
        # At the upper end of an axis that also holds the entropy.
        top = axis.get_ylim()[1]
        assert top > 5.0
        assert {y for line in crosses for y in line.get_ydata()} == {top}
        assert axis.get_xlim()[0] <= -3.0 < -1.0 <= axis.get_xlim()[1]
    plt.close(figure)


def test_report_leaves_a_whole_table_and_picture_that_say_what_was_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "unigram_entropy", lambda *_: 5.0)
    plan = QuickstartPlan(out=tmp_path, log2_lrs=(-7.0, -6.0, -5.0, -4.0))
    (tmp_path / "quickstart.md").write_text("old")
    report_quickstart(plan, [fake_record(cell) for cell in plan.cells], echo=lambda _line: None)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["quickstart.md", "quickstart.png"]
    page = (tmp_path / "quickstart.md").read_text()
    assert "200 steps, 409,600 tokens a run; one seed; queries start at zero in both" in page


def test_a_failed_table_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "unigram_entropy", lambda *_: 5.0)
    monkeypatch.setattr(module, "draw", lambda *_, **__: None)
    (tmp_path / "quickstart.md").write_text("old")

    def full(_descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    plan = QuickstartPlan(out=tmp_path)
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        report_quickstart(plan, [fake_record(cell) for cell in plan.cells], lambda _line: None)
    assert (tmp_path / "quickstart.md").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["quickstart.md"]


def test_a_users_text_becomes_shards_once_and_another_text_is_refused(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("\n".join(f"line {n} of a text, {n * n} squared." for n in range(8000)))
    lines: list[str] = []

    def make(*sources: Path) -> Path:
        return make_shards(
            tmp_path / "data",
            text=sources,
            corpus_bytes=1000,
            vocab_size=400,
            echo=lines.append,
        )

    folder = make(text)
    assert (folder / "text_train.idx").exists()
    made = (folder / "text_train.bin").stat().st_mtime_ns
    make(text)
    assert (folder / "text_train.bin").stat().st_mtime_ns == made
    other = tmp_path / "other.txt"
    other.write_text("other")
    with pytest.raises(DataError, match="was made from another text"):
        make(other)


def test_a_missing_or_short_text_is_refused_by_the_option_that_named_it(tmp_path: Path) -> None:
    options = {"corpus_bytes": 1000, "vocab_size": 400}
    with pytest.raises(DataError, match=r"there is no file '.*absent.txt'; correct --text"):
        make_shards(tmp_path / "a", text=[tmp_path / "absent.txt"], echo=print, **options)
    short = tmp_path / "short.txt"
    short.write_text("one short line\n" * 100)
    with pytest.raises(DataError, match=r"the text has 1,.* bytes, too few for the quickstart"):
        make_shards(tmp_path / "b", text=[short], echo=print, **options)
    assert not (tmp_path / "b" / "corpus.jsonl").exists()


def test_a_text_of_which_nothing_is_held_out_is_too_short(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("megatron_mup.transfer.quickstart_data.MIN_TEXT_BYTES", 1)
    (tmp_path / "one.txt").write_text("".join(f"word{number} " for number in range(300)), "utf-8")
    with pytest.raises(DataError, match=r"held-out part of the text has 0 tokens.*longer text"):
        make_shards(
            tmp_path / "a",
            text=[tmp_path / "one.txt"],
            corpus_bytes=10_000,
            vocab_size=300,
            echo=print,
        )


def test_cutting_keeps_every_character_and_drops_only_blank_ends() -> None:
    text = "".join(f"line {n}\n" for n in range(2000))
    pieces = list(cut_text(text))
    assert "".join(pieces) == text
    assert max(map(len, pieces)) < 4200
    assert list(cut_text(" \n \n")) == []
