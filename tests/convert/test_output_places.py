"""What can be refused is refused before all of a checkpoint is read."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from megatron_mup.checkpoint import integrity
from megatron_mup.convert import megatron_source
from megatron_mup.convert.commands import app
from megatron_mup.convert.formats import HfFormat
from megatron_mup.convert.huggingface_target import write_huggingface
from megatron_mup.errors import MupError
from tests.convert.command_calls import call
from tests.convert.memory_weights import random_weights, small_model
from tests.convert.small_checkpoints import GQA, MakeCheckpoint

TO_HF = ("to-hf", "--format", "granite", "--no-verify", "--output")


@pytest.fixture
def run(checkpoint_of: MakeCheckpoint, tmp_path: Path) -> Path:
    """A run's folder that the test may change."""
    source = checkpoint_of(*GQA)
    return Path(shutil.copytree(source.parent, tmp_path / "runs" / "demo"))


def model(folder: Path, seed: int = 0) -> Path:
    write_huggingface(random_weights(small_model(), seed=seed), folder, hf_format=HfFormat.GRANITE)
    return folder


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((*TO_HF, "taken"), "taken exists; pass --overwrite"),
        ((*TO_HF, "somebodys", "--overwrite"), "not the output of an earlier conversion"),
        ((*TO_HF, "runs/demo/iter_0000000"), "is the folder that is read"),
        ((*TO_HF, "new", "--dtype", "float64"), "--dtype float32 or bfloat16 or float16"),
        ((*TO_HF, "new", "--tokenizer-model", "missing.model"), "missing.model"),
        ((*TO_HF, "new", "--max-shard-size", "0.1"), "--max-shard-size"),
        (("to-sp", "--save", "runs/demo"), "is the folder that is read"),
        (("to-sp", "--save", "new", "--text", "t.txt"), "--text t.txt needs --tokenizer-model"),
        (("to-sp", "--save", "new", "hidden_size=96"), "hidden_size"),
    ],
)
def test_a_wrong_request_is_refused_before_any_file_is_compared(
    words: tuple[str, ...],
    message: str,
    run: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    compared: list[Path] = []
    monkeypatch.setattr(megatron_source, "check_files", compared.append)
    monkeypatch.chdir(tmp_path)
    model(tmp_path / "taken")
    (tmp_path / "somebodys").mkdir()
    (tmp_path / "somebodys" / "thesis.tex").write_text("years of work")
    with pytest.raises(MupError, match=message):
        call(app, *words, "--load", run)
    assert compared == []
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("words", [(*TO_HF, "new"), ("to-sp", "--no-verify", "--save", "new")])
def test_a_right_request_compares_all_files(
    words: tuple[str, ...], run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compared: list[Path] = []

    def check(folder: Path) -> list[str]:
        compared.append(folder)
        return integrity.check_files(folder)

    monkeypatch.setattr(megatron_source, "check_files", check)
    monkeypatch.chdir(tmp_path)
    assert call(app, *words, "--load", run).exit_code == 0
    assert compared == [run / "iter_0000000"]


@pytest.mark.parametrize("place", ["export", "exports/granite"])
def test_no_export_goes_into_the_folder_of_a_run(place: str, run: Path) -> None:
    before = sorted(run.rglob("*"))
    with pytest.raises(MupError, match=r"lies in .*demo, where a run saves .*--output"):
        call(app, *TO_HF, run / place, "--load", run)
    # One that has not saved yet holds its lease.
    other = run.parent / "other"
    other.mkdir()
    (other / "lease.json").write_text("{}")
    with pytest.raises(MupError, match=r"lies in .*other, where a run saves"):
        call(app, *TO_HF, other / place, "--load", run)
    assert sorted(run.rglob("*")) == before


def test_no_checkpoint_goes_into_a_folder_of_exports_or_of_a_live_run(
    run: Path, tmp_path: Path
) -> None:
    source = model(tmp_path / "exports" / "granite")
    other = model(tmp_path / "other", seed=1)
    live = tmp_path / "live"
    live.mkdir()
    (live / "lease.json").write_text("{}")
    before = sorted(tmp_path.rglob("*"))
    for folder, message in (
        (tmp_path / "exports", "exports holds granite, a model for transformers"),
        (other, "other is itself a model for transformers"),
        (live, r"live is the save folder of a run \(lease.json is there\)"),
    ):
        with pytest.raises(MupError, match=rf"{message}.*pass another one with --save"):
            call(app, "from-hf", "--input", source, "--save", folder, "--no-verify")
        with pytest.raises(MupError, match=message):
            call(app, "to-sp", "--load", run, "--save", folder, "--no-verify")
    assert sorted(tmp_path.rglob("*")) == before
