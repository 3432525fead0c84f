"""One command: one writer a folder, refusals before anything runs, what is told of other rows."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from megatron_mup.cli import app
from megatron_mup.errors import ConfigError, DataError
from megatron_mup.transfer.runs import append_row
from megatron_mup.transfer.sweep.folder import SweepFolder
from megatron_mup.transfer.sweep.pool import Share
from megatron_mup.transfer.sweep.session import (
    RunRequest,
    prepare_sweep,
    record_lines,
    run_sweep,
    selected_ids,
)
from tests.transfer.sweep.sweeps import cells_of, write_sweep
from tests.transfer.test_runs import ROW


def run(config: Path, out: Path, only: tuple[str, ...] = ()) -> int:
    share = Share(workers=1, threads=1)
    request = RunRequest(config=config, out=out, text=(), share=share, only=only)
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


def test_missing_shards_are_refused_before_anything_runs(tmp_path: Path) -> None:
    config = write_sweep(tmp_path)
    (tmp_path / "shards" / "train.bin").unlink()
    with pytest.raises(DataError, match=r"shards/train"):
        run(config, tmp_path / "out")
    assert not (tmp_path / "out" / "runs.csv").exists()


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


def test_a_base_that_says_what_the_sweep_sets_is_refused_unless_it_was_kept_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "megatron_mup.transfer.sweep.pool._WORKER", "tests.transfer.sweep.fake_worker"
    )
    monkeypatch.setenv("FAKE_WORKER_CALM", "1")
    config, out = write_sweep(tmp_path, seeds=[1]), tmp_path / "out"
    data = yaml.safe_load(config.read_text())
    data["base"]["optimizer"] = {"lr": 0.1}
    config.write_text(yaml.safe_dump(data))
    words = r"base sets optimizer.lr, but in each run it is set by learning_rate; remove it"
    with pytest.raises(ConfigError, match=words):
        run(config, out)
    with pytest.raises(ConfigError, match=words):
        prepare_sweep(config, out, text=[], echo=print)
    planned = CliRunner().invoke(app, ["sweep", "plan", str(config)])
    assert re.search(words, str(planned.exception))
    assert not out.exists()
    # A folder of an earlier version, which took its base from a file.
    out.mkdir()
    config.rename(out / "sweep.yaml")
    assert run(out / "sweep.yaml", out) == 0
    assert "lr" not in yaml.safe_load((out / "sweep.yaml").read_text())["base"]["optimizer"]
