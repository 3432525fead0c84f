"""What is said of the data before the first step."""

from __future__ import annotations

from pathlib import Path

from megatron_mup.training.loop import train
from megatron_mup.training.preparation import data_text
from tests.configurations import tiny
from tests.data.test_datasets import write_set


def test_epochs_are_listed_and_repetition_is_warned_of() -> None:
    assert data_text({"a": 0.25}) == "epochs of the training shards: 'a' 0.25"
    first, second = data_text({"a": 0.25, "b": 2.5}).splitlines()
    assert first == "epochs of the training shards: 'a' 0.25, 'b' 2.5"
    assert second.startswith("warning: training repeats its data: 'b' 2.5 times; ")


def test_a_run_on_a_set_warns_before_its_first_step(tmp_path: Path) -> None:
    prefix = write_set(tmp_path / "text", 2, 4)
    lines: list[str] = []
    # 24 sequences of 16 tokens from 192 tokens.
    train(tiny(f"train_data_path=[{prefix}]"), echo=lines.append)
    (warned,) = [number for number, line in enumerate(lines) if "repeats its data" in line]
    (first,) = [number for number, line in enumerate(lines) if "iteration       1/6" in line]
    assert f"'{prefix}' 2 times" in lines[warned]
    assert warned < first
