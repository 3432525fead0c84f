"""One command: data and text that do not serve, one writer a folder, what is told of other rows."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_mup.errors import ConfigError, DataError
from megatron_mup.transfer.runs import append_row
from megatron_mup.transfer.sweep.cells import make_cells
from megatron_mup.transfer.sweep.folder import SweepFolder
from megatron_mup.transfer.sweep.pool import Share
from megatron_mup.transfer.sweep.session import (
    RunRequest,
    check_same_data,
    check_text,
    prepare_data,
    record_lines,
    run_sweep,
    selected_ids,
)
from megatron_mup.transfer.sweep.spec import load_sweep
from tests.transfer.sweep.sweeps import SWEEP, cells_of, sweep_of, write_sweep
from tests.transfer.test_runs import ROW


def run(config: Path, out: Path, *text: Path, only: tuple[str, ...] = ()) -> int:
    share = Share(workers=1, threads=1)
    request = RunRequest(config=config, out=out, text=text, share=share, only=only)
    return run_sweep(request, lambda _line: None)


def test_a_second_sweep_on_a_folder_is_refused_with_the_owner(tmp_path: Path) -> None:
    config, out = write_sweep(tmp_path), tmp_path / "out"
    folder = SweepFolder(out)
    assert folder.owner() is None
    with folder.locked():
        assert folder.owner() == f"pid {os.getpid()} on {os.uname().nodename}"
        with pytest.raises(ConfigError, match=rf"another sweep \(pid {os.getpid()} on ") as raised:
            run(config, out)
        assert "choose another --out" in str(raised.value)
    assert folder.owner() is None
    assert not (out / "runs.csv").exists()


def test_a_lock_file_that_a_killed_owner_left_is_no_lock(tmp_path: Path) -> None:
    (tmp_path / ".lock").write_text("pid 1 on elsewhere\n")
    with SweepFolder(tmp_path).locked():
        assert (tmp_path / ".lock").read_text() == f"pid {os.getpid()} on {os.uname().nodename}\n"


def test_too_few_held_out_tokens_are_refused_before_anything_runs(tmp_path: Path) -> None:
    # 1,600 tokens are held out: 99 sequences of 16 and a label; 25 batches of 4 need 100.
    for eval_tokens, refused in ((24 * 64, False), (25 * 64, True)):
        config = write_sweep(tmp_path, run={"eval_tokens": eval_tokens})
        sweep = load_sweep(config)
        cells = make_cells(sweep, tmp_path)
        folder = SweepFolder(tmp_path / "out")
        if refused:
            with pytest.raises(DataError, match=r"have 1,600 tokens, but .* reads 1,600 positions"):
                prepare_data(sweep, cells, folder=folder, text=(), echo=print)
        else:
            prepare_data(sweep, cells, folder=folder, text=(), echo=print)


def test_bf16_without_a_fast_kernel_is_warned_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("megatron_mup.platform.slow_bf16", lambda: "bf16 is slow")
    for arms, told in (
        ({"a": {}}, []),
        ({"a": {}, "b": {"bf16": True}}, ["warning: bf16 is slow"]),
    ):
        sweep = load_sweep(write_sweep(tmp_path, arms=arms))
        cells, lines = make_cells(sweep, tmp_path), []
        prepare_data(sweep, cells, folder=SweepFolder(tmp_path), text=(), echo=lines.append)
        assert lines == told


def test_missing_shards_are_refused_before_anything_runs(tmp_path: Path) -> None:
    config = write_sweep(tmp_path)
    (tmp_path / "shards" / "train.bin").unlink()
    with pytest.raises(DataError, match=r"shards/train"):
        run(config, tmp_path / "out")
    assert not (tmp_path / "out" / "runs.csv").exists()


def test_text_that_cannot_serve_is_refused_at_once(tmp_path: Path) -> None:
    config = write_sweep(tmp_path)
    with pytest.raises(ConfigError, match=r"--text novel.txt needs 'text: "):
        run(config, tmp_path / "out", Path("novel.txt"))
    base = {**SWEEP["base"], "data": {}}
    text = {"vocab_size": 96, "valid_tokens": 128}
    sweep = sweep_of(base=base, text=text)
    # 100 tokens in whole batches of 64 are 128, and the last label is one more.
    with pytest.raises(ConfigError, match=r"valid_tokens is 128, but an evaluation reads 128"):
        check_text(sweep, cells_of(base=base, text=text), ())
    text["valid_tokens"] = 129
    check_text(sweep_of(base=base, text=text), cells_of(base=base, text=text), ())


def test_runs_on_other_shards_are_not_mixed(tmp_path: Path) -> None:
    cells = cells_of()
    rows = {cells[3].id: replace(ROW, cell=cells[3].id, data_sha256="e" * 64)}
    check_same_data(cells, rows, "e" * 64)
    with pytest.raises(DataError, match=r"with other shards \(data_sha256 eeeeeeeeeeee, now ffff"):
        check_same_data(cells, rows, "f" * 64)
    # A row of another plan is left alone.
    check_same_data(cells, {"x": ROW}, "f" * 64)


def test_rows_of_no_cell_are_counted_and_kept() -> None:
    cells = cells_of()
    rows = {cells[0].id: ROW, "x": ROW, "y": ROW}
    assert record_lines(cells, rows) == [
        "1 of up to 8 runs are on record",
        "2 runs on record belong to no cell of this YAML; they stay in the table",
    ]
    assert record_lines(cells, {}) == []


def test_only_names_arms_and_sizes() -> None:
    cells = cells_of(arms={"a": {}, "b": {"clip_grad": 0.5}})
    assert len(selected_ids(cells, ["a"])) == 8
    assert len(selected_ids(cells, ["a/64", "b"])) == 12
    with pytest.raises(ConfigError, match=r"--only c names no cell; use an arm or one of \['a/32'"):
        selected_ids(cells, ["c"])


def test_an_unknown_arm_of_only_is_refused_before_the_folder_is_made(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--only mup/99 names no cell"):
        run(write_sweep(tmp_path), tmp_path / "out", only=("mup/99",))
    assert not (tmp_path / "out").exists()


def test_a_foreign_table_in_the_folder_is_refused(tmp_path: Path) -> None:
    config, out = write_sweep(tmp_path), tmp_path / "out"
    out.mkdir()
    (out / "runs.csv").write_text("a,b\n1,2\n")
    with pytest.raises(DataError, match=r"has the columns a, b"):
        run(config, out)
    (out / "runs.csv").unlink()
    append_row(out / "runs.csv", ROW)
