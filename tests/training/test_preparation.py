"""What is said of the data before the first step."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_mup import platform
from megatron_mup.errors import ConfigError, MupError
from megatron_mup.training.loop import train
from megatron_mup.training.preparation import check_before_work, data_text
from megatron_mup.training.processes import Launch
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


def test_bf16_without_a_fast_kernel_is_warned_of(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(platform, "slow_bf16", lambda: "bf16 is slow")
    for rank, precision, told in ((0, "true", 1), (1, "true", 0), (0, "false", 0)):
        caplog.clear()
        run = tiny(f"bf16={precision}")
        check_before_work(run, Launch(rank=rank, world_size=1, local_rank=rank), with_shards=False)
        assert caplog.messages == ["bf16 is slow"] * told


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ((), "data.train_data_path is empty"),
        (("train_data_path=[nowhere]",), "nowhere"),
        (("train_data_path=[TEXT]", "data.max_epochs=0.01"), "runs out"),
        (("train_data_path=[TEXT]", "checkpoint.load=nowhere", "finetune=true"), "nowhere"),
    ],
)
def test_a_run_that_is_refused_leaves_no_folder(
    overrides: tuple[str, ...], message: str, tmp_path: Path
) -> None:
    prefix = write_set(tmp_path / "text", 2, 4)
    given = [word.replace("TEXT", str(prefix)) for word in overrides]
    folders = (f"checkpoint.save={tmp_path}/runs/one", f"metrics_path={tmp_path}/rows/one.jsonl")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(MupError, match=message):
        train(tiny(*folders, *given), echo=lambda _: None)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_folder_below_a_file_is_told_with_its_option(tmp_path: Path) -> None:
    prefix = write_set(tmp_path / "text", 2, 4)
    (tmp_path / "file").write_text("in the way")
    folder = tmp_path / "file" / "run"
    options = (f"train_data_path=[{prefix}]", f"checkpoint.load={folder}")
    with pytest.raises(ConfigError, match=r"checkpoint.load '.*file/run' cannot be read"):
        train(tiny(*options), echo=lambda _: None)
    with pytest.raises(ConfigError, match=r"cannot write to '.*file/run' of checkpoint.save"):
        train(tiny(*options, f"checkpoint.save={folder}"), echo=lambda _: None)
