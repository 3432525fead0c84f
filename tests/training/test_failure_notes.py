"""Which code and words a rank notes of its end, and that training does note it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch.distributed as dist

from megatron_mup.errors import ConfigError
from megatron_mup.rank_outcomes import read_outcomes
from megatron_mup.training.failure_notes import note_failure, noted_failure
from megatron_mup.training.loop import train
from megatron_mup.training.preparation import TrainData
from megatron_mup.training.processes import Launch, parallel_processes
from tests.configurations import tiny
from tests.random_samples import RandomSamples


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MEGATRON_MUP_OUTCOMES", str(tmp_path / "notes"))
    return tmp_path / "notes"


@pytest.mark.parametrize(
    ("error", "exit_code", "words"),
    [
        (ConfigError("no such option"), 2, "ConfigError: no such option"),
        (KeyError("x"), 1, "KeyError: 'x'"),
        (dist.DistStoreError("wait timeout after 60000ms"), 76, "DistStoreError: wait timeout"),
    ],
)
def test_an_error_is_noted_with_the_code_that_the_process_will_have(
    error: Exception, exit_code: int, words: str, folder: Path
) -> None:
    with pytest.raises(type(error)), noted_failure(4):
        raise error
    (note,) = read_outcomes(folder)
    assert (note.rank, note.exit_code) == (4, exit_code)
    assert note.reason.startswith(words)


def test_an_interrupt_is_nobody_s_failure(folder: Path) -> None:
    note_failure(0, KeyboardInterrupt())
    assert read_outcomes(folder) == []


def test_an_error_is_noted_before_the_others_are_left(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    destroy = dist.destroy_process_group

    def leave(*groups: object) -> None:
        seen.append([note.reason for note in read_outcomes(folder)])
        destroy(*groups)

    monkeypatch.setattr(dist, "destroy_process_group", leave)
    with pytest.raises(ValueError, match="bang"), parallel_processes(tiny(), Launch()):
        raise ValueError("bang")
    assert seen[0] == ["ValueError: bang"]


def test_a_run_that_is_refused_leaves_a_note(folder: Path) -> None:
    with pytest.raises(ConfigError, match="cannot hold"):
        train(tiny("tensor_model_parallel_size=2"), launch=Launch(), echo=lambda _line: None)
    (note,) = read_outcomes(folder)
    assert note.exit_code == 2


def test_a_run_that_is_stopped_leaves_a_note_and_a_finished_one_none(folder: Path) -> None:
    data = TrainData(RandomSamples(96, 16))

    def run(*overrides: str) -> None:
        train(tiny(*overrides), data=data, launch=Launch(), echo=lambda _line: None)

    run("train_iters=1")
    assert read_outcomes(folder) == []
    # Long over: it counts from the start of this process.
    run("exit_duration_in_mins=0.00001")
    (note,) = read_outcomes(folder)
    # There is no folder to save to.
    assert note.exit_code == 78
