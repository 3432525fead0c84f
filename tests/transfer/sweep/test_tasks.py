"""Tasks of an array: shares, tables of their own, and the one table in the end."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from megatron_mup.cli import app
from megatron_mup.errors import ConfigError, DataError
from megatron_mup.transfer.runs import Row, Status, append_row, read_rows
from megatron_mup.transfer.sweep.folder import SweepFolder
from megatron_mup.transfer.sweep.pool import Share
from megatron_mup.transfer.sweep.session import RunRequest, prepare_sweep, run_sweep
from megatron_mup.transfer.sweep.spec import load_sweep
from megatron_mup.transfer.sweep.status_report import sweep_status
from megatron_mup.transfer.sweep.tasks import Task, share_of, task_from_text
from tests.transfer.sweep.sweeps import SWEEP, cells_of, sweep_data, write_sweep
from tests.transfer.test_runs import ROW

FIRST, SECOND = Task(number=1, count=2), Task(number=2, count=2)


@pytest.fixture(autouse=True)
def fake_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    """Loss (log2 LR + 7)^2 at once."""
    monkeypatch.setattr("megatron_mup.transfer.sweep.pool._WORKER", f"{__package__}.fake_worker")
    monkeypatch.setenv("FAKE_WORKER_CALM", "1")


def run(config: Path, task: Task | None = None, *text: Path) -> tuple[int, list[str]]:
    """Exit code and lines of the command, in the folder beside the YAML."""
    lines: list[str] = []
    share = Share(workers=1, threads=1)
    out = config.parent / "out"
    request = RunRequest(config=config, out=out, text=text, share=share, task=task)
    return run_sweep(request, lines.append), lines


def places(table: Path) -> list[tuple[float, float, int]]:
    return [(row.size, row.log2_lr, row.seed) for row in read_rows(table)]


def test_shares_are_disjoint_and_equal_and_leave_nothing_out() -> None:
    cells = cells_of(learning_rate={"log2": [-8, -7, -6]}, seeds=[1, 2, 3])
    shares = [share_of(cells, Task(number=number, count=4)) for number in (1, 2, 3, 4)]
    # 6 of the first seed are dealt as 2, 2, 1, 1 and 12 further ones as 3 each.
    assert [len(share) for share in shares] == [5, 5, 4, 4]
    assert frozenset().union(*shares) == {cell.id for cell in cells}


def test_the_expensive_runs_are_dealt_first() -> None:
    cells = cells_of(learning_rate={"log2": [-8, -7]}, seeds=[1])
    share = share_of(cells, Task(number=1, count=3))
    mine = [(cell.size, cell.log2_lr) for cell in cells if cell.id in share]
    # 64 at -8, 64 at -7, 32 at -8, and then the first task again.
    assert mine == [(32.0, -7.0), (64.0, -8.0)]


@pytest.mark.parametrize("text", ["0/4", "5/4", "2", "a/b", "1/0", "-1/2", "1/2/3"])
def test_what_is_no_task_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=r"--task is .*; give I/N with I from 1 to N"):
        task_from_text(text)
    assert task_from_text("2/8") == Task(number=2, count=8)


def test_tasks_run_their_shares_into_tables_of_their_own(tmp_path: Path) -> None:
    config, out = write_sweep(tmp_path), tmp_path / "out"
    assert run(config, FIRST)[0] == 0
    # Further seeds need no row of the other task where they run everywhere.
    mine = [(64.0, -7.0, 1), (32.0, -7.0, 1), (64.0, -7.0, 2), (32.0, -7.0, 2)]
    assert places(out / "tasks/task-1.csv") == mine
    assert not (out / "runs.csv").exists()
    # Further seeds count once their curve's first seed is through.
    assert sweep_status(SweepFolder(out))["done"] == 2
    assert run(config, SECOND)[0] == 0
    assert run(config, FIRST)[1][-1].startswith("0 runs ended (nothing was missing)")

    done = CliRunner().invoke(app, ["sweep", "merge", str(out)])

    assert (done.exit_code, done.output) == (0, f"8 runs in {out}/runs.csv\n")
    assert sorted(places(out / "runs.csv")) == [
        (size, rate, seed) for size in (32.0, 64.0) for rate in (-7.0, -5.0) for seed in (1, 2)
    ]
    assert read_rows(out / "runs.parquet") == read_rows(out / "runs.csv")
    assert run(config)[1][-1].startswith("0 runs ended (nothing was missing)")


def test_further_seeds_near_the_minimum_wait_for_the_other_tasks(tmp_path: Path) -> None:
    config, out = write_sweep(tmp_path, seeds_within_octaves=1), tmp_path / "out"
    for task in (FIRST, SECOND):
        run(config, task)
    # The first task did not know the second one's rates.
    assert len(places(out / "tasks/task-1.csv")) == 2
    for task in (FIRST, SECOND):
        run(config, task)
    every = places(out / "tasks/task-1.csv") + places(out / "tasks/task-2.csv")
    # The lowest loss is at 2^-7.
    assert sorted(place for place in every if place[2] == 2) == [(32.0, -7.0, 2), (64.0, -7.0, 2)]
    assert len(every) == len(set(every)) == 6


def test_merging_tells_which_runs_failed_or_are_missing(tmp_path: Path) -> None:
    config, out = write_sweep(tmp_path, seeds=[1]), tmp_path / "out"
    run(config, FIRST)
    (cell,) = (cell for cell in cells_of(seeds=[1]) if (cell.size, cell.log2_lr) == (64.0, -5.0))
    data = read_rows(out / "tasks/task-1.csv")[0].data_sha256
    failed = replace(ROW, cell=cell.id, status=Status.FAILED, data_sha256=data)
    append_row(SweepFolder(out, 2).table, failed)

    done = CliRunner().invoke(app, ["sweep", "merge", str(out)])

    assert done.exit_code == 1
    assert done.output.splitlines() == [
        f"3 runs in {out}/runs.csv",
        "1 runs failed and 1 are missing:",
        "  base width 64 lr 2^-5 seed 1: failed",
        "  base width 32 lr 2^-5 seed 1: missing",
        "start the tasks again, or 'megatron-mup sweep run': what is done is not done again",
    ]
    assert len(read_rows(out / "runs.csv")) == 3
    only = CliRunner().invoke(app, ["sweep", "merge", str(out), "--only", "base/32"])
    assert only.output.splitlines()[1] == "0 runs failed and 1 are missing:"
    run(config, SECOND)
    assert CliRunner().invoke(app, ["sweep", "merge", str(out)]).exit_code == 0


def test_merging_an_array_that_has_not_begun_counts_all_its_runs(tmp_path: Path) -> None:
    merge = ["sweep", "merge", str(tmp_path / "out")]
    config = write_sweep(tmp_path)
    prepare_sweep(config, tmp_path / "out", text=[], echo=lambda _line: None)
    lines = CliRunner().invoke(app, merge).output.splitlines()
    # Two widths, two rates, two seeds: tasks wait for nothing.
    assert lines[:2] == [f"0 runs in {tmp_path}/out/runs.csv", "0 runs failed and 8 are missing:"]

    config = write_sweep(tmp_path, seeds_within_octaves=1)
    prepare_sweep(config, tmp_path / "out", text=[], echo=lambda _line: None)
    lines = CliRunner().invoke(app, merge).output.splitlines()
    assert lines[1:3] == [
        "up to 4 runs of further seeds wait for the first seed's losses (seeds_within_octaves)",
        "0 runs failed and 4 are missing:",
    ]


def test_many_missing_runs_are_counted_and_the_first_are_named(tmp_path: Path) -> None:
    rates = {"log2": [-9, -8, -7, -6, -5, -4]}
    config, out = write_sweep(tmp_path, seeds=[1], learning_rate=rates), tmp_path / "out"
    prepare_sweep(config, out, text=[], echo=lambda _line: None)
    lines = CliRunner().invoke(app, ["sweep", "merge", str(out)]).output.splitlines()
    assert lines[1] == "0 runs failed and 12 are missing:"
    assert lines[-2] == "  and 2 more"
    assert len(lines) == 2 + 10 + 2


def test_what_is_left_out_by_name_is_not_dealt(tmp_path: Path) -> None:
    config, out = write_sweep(tmp_path, seeds=[1]), tmp_path / "out"
    share = Share(workers=1, threads=1)
    for task in (FIRST, SECOND):
        request = RunRequest(
            config=config, out=out, text=(), share=share, only=("base/32",), task=task
        )
        run_sweep(request, lambda _line: None)
    assert places(out / "tasks/task-1.csv") == [(32.0, -7.0, 1)]
    assert places(out / "tasks/task-2.csv") == [(32.0, -5.0, 1)]


def test_a_task_without_runs_says_so_and_ends_well(tmp_path: Path) -> None:
    config = write_sweep(tmp_path, seeds=[1])
    code, lines = run(config, Task(number=5, count=5))
    assert code == 0
    assert lines[0] == "this task has no runs: there are fewer runs than tasks"


def test_shards_that_the_rows_are_not_of_are_told_before_the_tasks_begin(tmp_path: Path) -> None:
    config, out = write_sweep(tmp_path, seeds=[1]), tmp_path / "out"
    run(config, FIRST)
    table = SweepFolder(out, 1).table
    table.write_text(table.read_text().replace(read_rows(table)[0].data_sha256, "0" * 64))
    with pytest.raises(DataError, match=r"is on record with other shards .*000000000000"):
        prepare_sweep(config, out, text=[], echo=lambda _line: None)


def test_preparing_says_that_tasks_do_not_refine(tmp_path: Path) -> None:
    said: list[str] = []
    config = write_sweep(tmp_path, refine={"max_rounds": 1})
    prepare_sweep(config, tmp_path / "out", text=[], echo=said.append)
    assert said == [
        f"{tmp_path}/out is ready for tasks: up to 8 runs",
        "refine: tasks leave it out; 'megatron-mup sweep run' without --task does it afterwards",
    ]


def test_merging_tells_what_refinement_still_wants(tmp_path: Path) -> None:
    config, out = write_sweep(tmp_path, seeds=[1], refine={"max_rounds": 1}), tmp_path / "out"
    merge = ["sweep", "merge", str(out)]
    run(config, FIRST)
    # Nothing is decided before the grid is through.
    assert "refine:" not in CliRunner().invoke(app, merge).output
    run(config, SECOND)
    # The lowest loss is at 2^-7, the lowest rate, at both widths: two more rates for each.
    wanted = (
        f"refine: 2 curves want 4 more runs: run 'megatron-mup sweep run {out}/sweep.yaml --out "
        f"{out}'"
    )
    for only in ([], ["--only", "base/32"]):
        done = CliRunner().invoke(app, [*merge, *only])
        assert done.output.splitlines() == [f"4 runs in {out}/runs.csv", wanted]
        assert done.exit_code == 0
    run(config)
    assert CliRunner().invoke(app, merge).output.splitlines() == [f"8 runs in {out}/runs.csv"]


def test_a_command_without_a_task_takes_over_what_tasks_have(tmp_path: Path) -> None:
    config, out = write_sweep(tmp_path), tmp_path / "out"
    run(config, SECOND)
    code, lines = run(config)
    assert code == 0
    assert lines[0] == "4 of up to 8 runs are on record"
    assert len(places(out / "runs.csv")) == 8


def test_a_row_that_failed_gives_way_to_one_that_did_not(tmp_path: Path) -> None:
    folders = [SweepFolder(tmp_path), SweepFolder(tmp_path, 1), SweepFolder(tmp_path, 12)]
    good = replace(ROW, cell="a", status=Status.FINISHED, started="2026-01-01T00:00:00+00:00")
    failed = replace(good, status=Status.FAILED, started="2026-01-02T00:00:00+00:00")
    later = replace(good, train_loss=7.0, started="2026-01-03T00:00:00+00:00")
    tables: list[list[Row]] = [[failed], [good], [failed]]
    for folder, rows in zip(folders, tables, strict=True):
        folder.table.parent.mkdir(exist_ok=True)
        for row in rows:
            append_row(folder.table, row)
    assert SweepFolder(tmp_path).rows() == [good]
    append_row(folders[1].table, later)
    assert SweepFolder(tmp_path).rows() == [later]
    assert [folder.task for folder in SweepFolder(tmp_path).writers()] == [None, 1, 12]


def test_tasks_hold_a_folder_together_and_nobody_else(tmp_path: Path) -> None:
    whole, one, two = SweepFolder(tmp_path), SweepFolder(tmp_path, 1), SweepFolder(tmp_path, 2)
    with one.locked(), two.locked():
        for other in (whole, SweepFolder(tmp_path, 2)):
            with pytest.raises(ConfigError, match="is in use by another sweep"), other.locked():
                pass
        # Rows may be merged meanwhile.
        with whole.shared():
            pass
    with whole.locked():
        for held in (one.locked(), whole.shared()):
            with pytest.raises(ConfigError, match="is in use by another sweep"), held:
                pass


def test_a_task_makes_no_shards_but_prepare_does(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("\n".join(f"line {n} of a text, {n * n} squared." for n in range(9000)))
    base = {**SWEEP["base"], "data": {}, "model": SWEEP["base"]["model"] | {"vocab_size": 400}}
    config = tmp_path / "sweep.yaml"
    config.write_text(yaml.safe_dump(sweep_data(base=base, text={"vocab_size": 400})))
    with pytest.raises(
        DataError, match=r"no shards in .*; make them with 'megatron-mup sweep prep"
    ):
        run(config, FIRST, text)
    said: list[str] = []
    prepare_sweep(config, tmp_path / "out", text=[text], echo=said.append)
    assert said[-1] == f"{tmp_path}/out is ready for tasks: up to 8 runs"
    assert load_sweep(tmp_path / "out/sweep.yaml").name == "tiny"
    assert run(config, FIRST, text)[0] == 0
    text.write_text(text.read_text().replace("squared", "SQUARED"))
    with pytest.raises(DataError, match=r"text.txt has changed since the shards in .* were made"):
        run(config, FIRST, text)
