"""The file of update dynamics: place, resuming, damage."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path

import pytest

from megatron_mup.config import RunConfig
from megatron_mup.diagnostics.dynamics import observer_for
from megatron_mup.diagnostics.dynamics_records import (
    DynamicsFile,
    Measured,
    Quantity,
    dynamics_path,
    read_dynamics,
    role_means,
)
from megatron_mup.errors import ConfigError, DataError
from megatron_mup.training.loop import TrainData, train
from tests.configurations import tiny
from tests.random_samples import RandomSamples

NAN = float("nan")


def trained(run: RunConfig) -> None:
    """The run on random tokens."""
    samples = RandomSamples(run.model.vocab_size, run.model.seq_length)
    train(run, data=TrainData(samples), observer=observer_for(run), echo=lambda _line: None)


def test_a_resumed_run_has_each_iteration_once_with_the_values_of_an_uninterrupted_one(
    tmp_path: Path,
) -> None:
    save = tmp_path / "run"
    run = tiny("diagnostics_interval=1", f"save={save}", f"load={save}", "save_interval=3")
    trained(run)
    whole = read_dynamics(save)
    assert list(whole) == [1, 2, 3, 4, 5, 6]

    # As if the run had been killed after iteration 6 was measured and before it was saved.
    shutil.rmtree(save / "iter_0000006")
    (save / "latest_checkpointed_iteration.txt").write_text("3")
    trained(run)
    lines = [json.loads(line) for line in (save / "dynamics.jsonl").read_text().splitlines()]
    assert [line["iteration"] for line in lines] == [1, 2, 3, 4, 5, 6, 3, 4, 5, 6]
    assert lines[6] == {"iteration": 3, "resumed": True}
    assert read_dynamics(save) == whole


def test_an_early_row_beyond_the_resumed_iteration_is_dropped(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    item = Measured("w", "query", {Quantity.WEIGHT_NORM: 2.0})
    for start, iterations in ((0, (2, 4, 6)), (3, (4,))):
        file = DynamicsFile(path, start=start)
        for iteration in iterations:
            file.write(iteration, [item])
        file.close()
    assert list(read_dynamics(path)) == [2, 4]


def test_role_means_leave_out_what_is_not_defined() -> None:
    measured = [
        Measured("a", "query", {Quantity.WEIGHT_NORM: 1.0, Quantity.RELATIVE_UPDATE: NAN}),
        Measured("b", "query", {Quantity.WEIGHT_NORM: 4.0, Quantity.RELATIVE_UPDATE: 0.5}),
        Measured("c", "key", {Quantity.RELATIVE_UPDATE: NAN}),
    ]
    assert role_means(measured) == {"weight-norm/query": 2.5, "relative-update/query": 0.5}


def test_the_file_lies_in_the_save_folder_unless_told_otherwise(tmp_path: Path) -> None:
    every = "diagnostics_interval=2"
    assert dynamics_path(tiny(every, "save=folder")) == Path("folder/dynamics.jsonl")
    both = tiny(every, "save=folder", "diagnostics_path=other.jsonl")
    assert dynamics_path(both) == Path("other.jsonl")
    with pytest.raises(
        ConfigError, match=r"set logging\.diagnostics_path=FILE or checkpoint\.save"
    ):
        dynamics_path(tiny(every))
    with pytest.raises(ConfigError, match=r"is a folder; give the name of a JSON lines file"):
        dynamics_path(tiny(every, f"diagnostics_path={tmp_path}"))


def test_a_run_that_has_nowhere_to_write_to_is_refused_before_work() -> None:
    with pytest.raises(ConfigError, match="has no file to write to"):
        observer_for(tiny("diagnostics_interval=2"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("diagnostics_interval=0",), "logging.diagnostics_interval is 0; it must be at least 1"),
        (("diagnostics_path=d.jsonl",), "set logging.diagnostics_interval as well"),
    ],
)
def test_options_that_measure_nothing_are_refused(options: tuple[str, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        tiny(*options)


def test_rows_that_cannot_be_written_are_lost_with_one_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    with caplog.at_level(logging.WARNING):
        file = DynamicsFile(blocked / "dynamics.jsonl", start=7)
        file.write(8, [Measured("w", "query", {Quantity.WEIGHT_NORM: 2.0})])
        file.close()
    assert [record.message[:43] for record in caplog.records] == [
        "update dynamics from iteration 7 on are los"
    ]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "does not exist; give a folder of checkpoint.save or a file"),
        ("", "holds no update dynamics; train with --diagnostics-interval N"),
        ('{"iteration": 5, "lm loss": 3.0, "learning-rate/query": 0.1}\n', "holds no update"),
        ('{"iteration": 5, "weight-norm/query": 3.0}\n{"iterat', "holds no update dynamics"),
    ],
)
def test_a_source_without_dynamics_is_refused(
    content: str | None, message: str, tmp_path: Path
) -> None:
    path = tmp_path / "rows.jsonl"
    if content is not None:
        path.write_text(content)
    with pytest.raises(DataError, match=message):
        read_dynamics(path)
