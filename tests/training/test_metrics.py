"""Sinks over restarts: JSON lines, TensorBoard, wandb; failures; the console line."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import wandb
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megatron_mup.errors import ConfigError, DataError
from megatron_mup.training import metrics as module
from megatron_mup.training.metrics import (
    JsonLines,
    Progress,
    console_line,
    open_sinks,
    read_metrics,
    wandb_run_id,
)
from tests.configurations import tiny


def write_losses(path: Path, losses: Mapping[int, float], *, start: int = 0) -> None:
    """What one process of a run writes."""
    sink = JsonLines(path, start=start)
    for iteration, loss in losses.items():
        sink.write(iteration, {"lm loss": loss})
    sink.close()


def test_a_fresh_file_holds_rows_only(tmp_path: Path) -> None:
    path = tmp_path / "new" / "metrics.jsonl"
    write_losses(path, {1: 2.5, 2: math.nan})
    assert path.read_text() == (
        '{"iteration": 1, "lm loss": 2.5}\n{"iteration": 2, "lm loss": null}\n'
    )


def test_rows_beyond_the_iteration_of_a_resumed_run_are_superseded(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write_losses(path, {50: 3.0, 100: 2.0, 150: 1.5, 200: 1.0})
    write_losses(path, {150: 1.25}, start=100)
    assert path.read_text().splitlines()[4] == '{"iteration": 100, "resumed": true}'
    assert read_metrics(path) == [
        {"iteration": 50, "lm loss": 3.0},
        {"iteration": 100, "lm loss": 2.0},
        {"iteration": 150, "lm loss": 1.25},
    ]


def test_rows_of_one_iteration_are_joined_and_the_last_value_counts(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write_losses(path, {1: 3.0})
    sink = JsonLines(path, start=1)
    sink.write(2, {"lm loss": 2.0, "grad-norm": math.inf})
    sink.write(2, {"lm loss validation": 2.5})
    sink.write(2, {"lm loss": 1.0})
    sink.close()
    first, second = read_metrics(path)
    assert first == {"iteration": 1, "lm loss": 3.0}
    assert math.isnan(second.pop("grad-norm"))
    assert second == {"iteration": 2, "lm loss": 1.0, "lm loss validation": 2.5}


def test_a_row_cut_by_a_kill_spoils_no_other(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"iteration": 1, "lm loss": 3.0}\n{"iteration": 2, "lm lo')
    write_losses(path, {2: 2.0}, start=1)
    assert [row["lm loss"] for row in read_metrics(path)] == [3.0, 2.0]


def test_lines_that_are_no_rows_are_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(
        b'\xff\n[1]\n"x"\n{"lm loss": 1}\n' + b"[" * 100_000 + b'\n{"iteration": 7, "a": 1.0}\n'
    )
    assert read_metrics(path) == [{"iteration": 7, "a": 1.0}]


def test_a_missing_metrics_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none\.jsonl': No such file.*logging\.metrics_path"):
        read_metrics(tmp_path / "none.jsonl")


def test_a_row_that_a_full_disk_cuts_is_lost_alone(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "metrics.jsonl"
    with ExitStack() as stack:
        (sink,) = open_sinks(tiny(f"metrics_path={path}"), stack)
        sink.write(1, {"lm loss": 3.0})
        inner: Any = sink._sink  # type: ignore[attr-defined]
        whole = inner._file

        class FullDisk:
            name = "metrics.jsonl"

            def write(self, line: bytes) -> int:
                return int(whole.write(line[:10]))

        inner._file = FullDisk()
        with caplog.at_level(logging.WARNING):
            sink.write(2, {"lm loss": 2.0})
            sink.write(3, {"lm loss": 2.0})
        inner._file = whole
        sink.write(4, {"lm loss": 1.0})
    assert [row["iteration"] for row in read_metrics(path)] == [1, 4]
    # Told once, not at every row.
    (message,) = [record.getMessage() for record in caplog.records]
    assert message.startswith("JsonLines: metrics from iteration 2 on are lost (only part of a row")


def test_tensorboard_hides_the_points_that_a_resumed_run_supersedes(tmp_path: Path) -> None:
    run = tiny(f"tensorboard_dir={tmp_path}")
    for start, losses in ((0, {1: 3.0, 2: 2.0, 3: 1.0}), (1, {2: 2.5})):
        with ExitStack() as stack:
            (sink,) = open_sinks(run, stack, start=start)
            for iteration, loss in losses.items():
                sink.write(iteration, {"lm loss": loss})
    events = EventAccumulator(str(tmp_path)).Reload()
    points = [(event.step, event.value) for event in events.Scalars("lm loss")]
    assert points == [(1, 3.0), (2, 2.5)]


class FakeRun:
    """Stands for a wandb run."""

    def __init__(self) -> None:
        self.rows: list[dict[str, float]] = []
        self.axes: list[tuple[str, str | None]] = []

    def define_metric(self, name: str, step_metric: str | None = None) -> None:
        self.axes.append((name, step_metric))

    def log(self, row: dict[str, float]) -> None:
        self.rows.append(row)

    def finish(self) -> None:
        self.rows.append({})


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Options of every wandb run that is started."""
    options: list[dict[str, Any]] = []

    def init(**given: Any) -> FakeRun:
        options.append(given)
        return FakeRun()

    monkeypatch.setattr(wandb, "init", init)
    return options


def test_a_restarted_run_continues_the_same_wandb_run(
    tmp_path: Path, started: list[dict[str, Any]]
) -> None:
    run = tiny("wandb_project=p", f"checkpoint.save={tmp_path}")
    for start in (0, 100):
        with ExitStack() as stack:
            open_sinks(run, stack, start=start)
    first, second = started
    kept = (tmp_path / "wandb_run_id.txt").read_text()
    assert first["id"] == second["id"] == kept
    assert len(kept) == 8
    assert {options["resume"] for options in started} == {"allow"}


def test_runs_that_save_nothing_are_new_wandb_runs(started: list[dict[str, Any]]) -> None:
    for _ in range(2):
        with ExitStack() as stack:
            open_sinks(tiny("wandb_project=p"), stack)
    assert started[0]["id"] != started[1]["id"]


def test_wandb_rows_carry_their_iteration_because_its_own_step_cannot_go_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fake = FakeRun()
    monkeypatch.setattr(wandb, "init", lambda **_: fake)
    with ExitStack() as stack:
        (sink,) = open_sinks(tiny("wandb_project=p"), stack)
        sink.write(7, {"lm loss": 2.0})
    assert fake.axes == [("iteration", None), ("*", "iteration")]
    assert fake.rows == [{"iteration": 7, "lm loss": 2.0}, {}]


def test_wandb_itself_takes_the_id_and_the_axes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    run = tiny("wandb_project=p", f"wandb_save_dir={tmp_path}", f"checkpoint.save={tmp_path}")
    for start in (0, 1):
        with ExitStack() as stack:
            (sink,) = open_sinks(run, stack, start=start)
            sink.write(start + 1, {"lm loss": 2.0})
    name = (tmp_path / "wandb_run_id.txt").read_text()
    folders = list(tmp_path.glob("wandb/offline-run-*"))
    assert folders
    # offline-run-DATE-ID, and a number behind it if both started in the same second.
    assert {folder.name.split("-")[3] for folder in folders} == {name}


@pytest.mark.parametrize("damaged", ["", "../../x", "a b", "x" * 65, "\x00"])
def test_a_damaged_wandb_id_is_replaced(
    damaged: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "wandb_run_id.txt").write_text(damaged)
    new = wandb_run_id(str(tmp_path))
    assert len(new) == 8
    assert wandb_run_id(str(tmp_path)) == new
    assert "holds no wandb run id" in caplog.text


def test_a_resumed_run_goes_on_without_wandb_but_a_new_one_is_refused(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(**_options: object) -> None:
        raise wandb.Error("server unreachable")

    monkeypatch.setattr(wandb, "init", refuse)
    with ExitStack() as stack:
        assert open_sinks(tiny("wandb_project=p"), stack, start=5) == []
        assert "goes on without wandb: logging.wandb_project 'p': server unreachable" in caplog.text
        with pytest.raises(ConfigError, match="server unreachable"):
            open_sinks(tiny("wandb_project=p"), stack)


def test_a_sink_that_fails_to_close_is_only_reported(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    fake = FakeRun()

    def fail() -> None:
        raise OSError("gone")

    monkeypatch.setattr(fake, "finish", fail)
    monkeypatch.setattr(wandb, "init", lambda **_: fake)
    with ExitStack() as stack:
        open_sinks(tiny("wandb_project=p"), stack)
    assert "Wandb: the last metrics may be lost (gone)" in caplog.text


def test_time_left_is_the_mean_rate_of_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter([10.0, 16.0, 16.0])
    monkeypatch.setattr(module.time, "perf_counter", now.__next__)
    progress = Progress(100, 40)
    # 3 iterations in 6 seconds, 57 to go.
    assert progress.seconds_per_iteration(43) == 2.0
    assert progress.seconds_left(43) == 114.0


def test_the_console_line_shows_what_there_is_in_a_fixed_order() -> None:
    metrics = {"mfu": 0.41234, "lm loss": 2.0, "tokens/sec": 1234.5, "unshown": 1.0}
    assert console_line(20, 100, metrics, 3661.0) == (
        "iteration      20/100 | lm loss 2.0000 | tokens/sec 1234 | mfu 0.412 | left 1:01:01"
    )
    assert "skipped" not in console_line(1, 2, {"skipped-fraction": 0.0}, 0.0)
    assert "| skipped-fraction 0.25 |" in console_line(1, 2, {"skipped-fraction": 0.25}, 0.0)


def test_without_metrics_there_is_no_row(tmp_path: Path) -> None:
    with ExitStack() as stack:
        (sink,) = open_sinks(tiny(f"metrics_path={tmp_path / 'metrics.jsonl'}"), stack)
        sink.write(0, {})
    assert (tmp_path / "metrics.jsonl").read_text() == ""


def test_rows_are_json_without_nan(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write_losses(path, {1: math.inf, 2: -math.inf})
    assert [json.loads(line)["lm loss"] for line in path.read_text().splitlines()] == [None, None]
