"""The quickstart: its sweep, what it refuses, and how it ends.

The run itself, on real text, is in tests/test_readme.py.
"""

from __future__ import annotations

import math
import re
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_mup.errors import ConfigError, DataError
from megatron_mup.parameterization.options import Parameterization
from megatron_mup.transfer import quickstart as module
from megatron_mup.transfer.quickstart import QuickstartPlan, run_quickstart, sweep_document
from megatron_mup.transfer.runs import append_row
from megatron_mup.transfer.sweep.cells import Cell, make_cells
from megatron_mup.transfer.sweep.pool import Share
from megatron_mup.transfer.sweep.session import RunRequest
from megatron_mup.transfer.sweep.spec import load_sweep, sweep_from_dict
from tests.transfer.report.sample_rows import arm_rows

SHARE = Share(workers=1, threads=1, gpus=(), gpu_share=1)


def cells_of(plan: QuickstartPlan) -> dict[tuple[str, float, float, int], Cell]:
    cells = make_cells(sweep_from_dict(sweep_document(plan), origin="test"), Path("data"))
    return {(cell.arm, cell.size, cell.log2_lr, cell.seed): cell for cell in cells}


def test_the_default_is_a_sweep_that_can_tell_a_shift() -> None:
    cells = cells_of(QuickstartPlan(out=Path("x")))
    assert {key[1] for key in cells} == {32, 64, 128}
    assert {key[2] for key in cells} == {-8, -7, -6, -5, -4, -3, -2}
    # Two arms; the further seeds of all rates are the most that can be asked for.
    assert len(cells) == 2 * 3 * 7 * 3
    training = cells["mup", 32, -5, 1].run.training
    assert (training.train_iters, training.eval_iters) == (200, 16)
    assert cells["mup", 32, -5, 1].run.schedule.lr_warmup_iters == 20


def test_mup_differs_from_sp_in_rules_and_not_in_architecture() -> None:
    cells = cells_of(QuickstartPlan(out=Path("x")))
    mup, sp = (cells[name, 128, -5, 1].run for name in ("mup", "sp"))
    assert (mup.model, mup.training) == (sp.model, sp.training)
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
        ({"steps": 0}, "--steps is 0; give at least 1"),
        ({"seeds": (1, 1)}, "--seeds is 1,1; give whole numbers from 0, each once"),
        ({"seeds": ()}, "--seeds is ; give"),
        ({"seeds": (-1,)}, "--seeds is -1; give"),
    ],
)
def test_plans_that_show_nothing_are_refused(change: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        QuickstartPlan(out=Path("x"), **change)  # type: ignore[arg-type]


def quickstart_with(
    code: int, out: Path, monkeypatch: pytest.MonkeyPatch, **options: object
) -> tuple[int, list[RunRequest], list[str]]:
    """Run the quickstart with a sweep that leaves a table behind and ends with a code."""
    requests: list[RunRequest] = []

    def sweep(request: RunRequest, _echo: object) -> int:
        requests.append(request)
        grid = {"sizes": (32, 64), "seeds": (1, 2), "log2_lrs": (-8, -7, -6, -5, -4)}
        for row in arm_rows("mup", optimum=-6, **grid):
            append_row(out / "runs.csv", row)
        return code

    monkeypatch.setattr(module, "run_sweep", sweep)
    monkeypatch.setattr(module, "unigram_entropy", lambda *_: 5.4321)
    lines: list[str] = []
    plan = QuickstartPlan(out=out, **options)  # type: ignore[arg-type]
    return run_quickstart(plan, SHARE, lines.append), requests, lines


def test_it_ends_with_a_table_and_pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = (tmp_path / "my.txt",)
    text[0].write_text("some words")
    code, (request,), lines = quickstart_with(0, tmp_path, monkeypatch, text=text, seeds=(4,))
    assert code == 0
    assert (request.out, request.text, request.share) == (tmp_path, text, SHARE)
    # What was run can be changed and run again as a sweep.
    assert load_sweep(request.config).seeds == (4,)
    assert lines[0].startswith("| arm | width |")
    # The sample's optimum is -6 at both widths, with noise.
    assert [re.match(r"\| mup \| (\d+) \| -(5\.9|6\.0)", line)[1] for line in lines[2:4]] == [
        "32",
        "64",
    ]
    assert any("5.4321 nats" in line for line in lines)
    (pictures,) = (line for line in lines if line.startswith("pictures: "))
    for name in pictures.removeprefix("pictures: ").split(", "):
        assert Path(name).read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize("code", [1, 75])
def test_a_sweep_that_is_not_through_is_not_reported(
    code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ended, _, lines = quickstart_with(code, tmp_path, monkeypatch)
    assert (ended, lines) == (code, [])
    assert not (tmp_path / "report").exists()


def test_what_cannot_be_trained_leaves_no_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigError, match=r"gives the learning rate 2\^2000"):
        quickstart_with(0, tmp_path / "out", monkeypatch, log2_lrs=(-6.0, -5.0, 2000.0))
    with pytest.raises(DataError, match=r"there is no file '.*/typo.txt'; correct --text"):
        quickstart_with(0, tmp_path / "out", monkeypatch, text=(tmp_path / "typo.txt",))
    assert not (tmp_path / "out").exists()
