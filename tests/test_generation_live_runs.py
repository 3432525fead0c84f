"""Loading a checkpoint to generate from: of a run that is alive, with the right tokenizer."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_mup.checkpoint.integrity import check_files
from megatron_mup.checkpoint.retention import Remover
from megatron_mup.config import SampleLayout
from megatron_mup.convert.megatron_source import MegatronSource
from megatron_mup.convert.tokenizer_check import check_tokenizer
from megatron_mup.errors import CheckpointError, DataError, InstallationError
from megatron_mup.generation import load_model
from tests.convert.small_checkpoints import GQA, save_small
from tests.letter_tokenizer import letters


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with grouped queries, 1/D attention, three more multipliers and padding rows."""
    return save_small(tmp_path_factory.mktemp("run"), *GQA, "vocab_size=90").parent


def with_tokenizers(monkeypatch: pytest.MonkeyPatch, recorded: list[str]) -> None:
    """Let every checkpoint say which tokenizers made its data."""
    own: Callable[[MegatronSource], dict[str, Any]] = MegatronSource._provenance
    data = {"train_shards": [], "weights": None, "tokenizers": recorded}
    monkeypatch.setattr(MegatronSource, "_provenance", lambda source: {**own(source), "data": data})


def test_another_tokenizer_is_refused_unless_it_is_asked_for(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with_tokenizers(monkeypatch, ["aa", "bb"])
    assert load_model(folder, letters(sha256="bb")).iteration == 0
    with pytest.raises(DataError, match=r"has sha256 cc, .* made with aa, bb; .* --any-tokenizer"):
        load_model(folder, letters(sha256="cc"))
    assert load_model(folder, letters(sha256="cc"), any_tokenizer=True).iteration == 0
    assert not caplog.records
    with pytest.raises(DataError, match=r"has 91 ids, but the model of .* has vocab_size 90"):
        load_model(folder, letters(91), any_tokenizer=True)
    with_tokenizers(monkeypatch, [])
    load_model(folder, letters())
    assert "does not say which tokenizer made its data" in caplog.text


@pytest.mark.parametrize(
    "options", [{"sample_layout": SampleLayout.DOCUMENT}, {"eod_mask_loss": True}]
)
def test_another_end_of_document_than_in_training_is_refused(
    options: dict[str, Any], folder: Path
) -> None:
    source = MegatronSource(folder, check=False)
    check_tokenizer(source, letters(eod=5))
    # Where training gave the id a meaning; ``tiny`` leaves the option at 2.
    data = replace(source.run.data, **options)
    source.run = replace(source.run, data=data)
    check_tokenizer(source, letters(eod=2))
    message = r"end with id 5 \('F'\), but .* data.eod_token=2; pass --eod-token"
    for any_tokenizer in (False, True):
        with pytest.raises(DataError, match=message):
            check_tokenizer(source, letters(eod=5), any_tokenizer=any_tokenizer)


def test_without_transformers_the_error_says_how_to_install_it(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    # Before anything else is looked at.
    with pytest.raises(InstallationError, match=r"pip install 'megatron-mup\[hf\]'"):
        load_model(folder / "missing", letters())


@pytest.fixture
def alive(folder: Path, tmp_path: Path) -> Path:
    """A run's folder with iterations 1 and 2."""
    for name in ("iter_0000001", "iter_0000002"):
        shutil.copytree(folder / "iter_0000000", tmp_path / name)
    return tmp_path


def interrupt_reading(
    monkeypatch: pytest.MonkeyPatch, name: str, change: Callable[[Path], None], *, after: int = 5
) -> None:
    """Change a checkpoint's folder once, after some of its tensors were read."""
    read, done = MegatronSource.read, []

    def reading(source: MegatronSource, tensor: str) -> torch.Tensor:
        if source.folder.name == name:
            done.append(tensor)
            if len(done) == after:
                change(source.folder)
        return read(source, tensor)

    monkeypatch.setattr(MegatronSource, "read", reading)


def delete(folder: Path) -> None:
    """As a run deletes a checkpoint that it keeps no longer."""
    remover = Remover()
    remover.remove(folder)
    remover.wait(10)
    remover.close()
    assert not folder.exists()


def exchange(folder: Path) -> None:
    """Put another checkpoint of the same iteration in a checkpoint's place."""
    old = folder.rename(folder.with_name(f"{folder.name}.old.tmp"))
    shutil.copytree(old, folder)


def test_a_checkpoint_that_is_deleted_while_it_is_read_makes_room_for_the_newest(
    alive: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    interrupt_reading(monkeypatch, "iter_0000002", delete)
    assert load_model(alive, letters()).folder.name == "iter_0000001"
    assert "iter_0000002 was deleted or replaced while it was read; looking again" in caplog.text


def test_a_checkpoint_that_is_replaced_while_it_is_read_is_read_again(
    alive: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    interrupt_reading(monkeypatch, "iter_0000002", exchange)
    assert load_model(alive, letters()).folder.name == "iter_0000002"
    assert "looking again" in caplog.text


@pytest.mark.parametrize("by_name", [False, True])
def test_the_checkpoint_that_was_asked_for_has_no_substitute(
    by_name: bool, alive: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert load_model(alive, letters(), iteration=1).folder.name == "iter_0000001"
    interrupt_reading(monkeypatch, "iter_0000002", delete)
    load = alive / "iter_0000002" if by_name else alive
    with pytest.raises(CheckpointError, match=r"iter_0000002 was deleted .* --ckpt-step"):
        load_model(load, letters(), iteration=None if by_name else 2)


def test_a_damaged_checkpoint_is_an_error_with_file_and_tensor(alive: Path) -> None:
    folder = alive / "iter_0000002"
    for path in folder.glob("*.distcp"):
        content = path.read_bytes()
        path.write_bytes(bytes(byte ^ 1 for byte in content))
    assert check_files(folder)
    with pytest.raises(CheckpointError, match=r"\.distcp: \S+ is damaged"):
        load_model(alive, letters())
    with pytest.raises(CheckpointError, match="holds no whole iteration 7"):
        load_model(alive, letters(), iteration=7)
