"""An export that does not come to its end leaves nothing that looks finished."""

from __future__ import annotations

import errno
import os
import signal
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_mup.convert import published_folder, safetensors_shards
from megatron_mup.convert.formats import HfFormat
from megatron_mup.convert.huggingface_source import HuggingFaceSource
from megatron_mup.convert.huggingface_target import write_huggingface
from megatron_mup.errors import CheckpointError
from tests.convert.memory_weights import MemoryWeights, random_weights, small_model

_LATE = "decoder.layers.1.mlp.linear_fc2.weight"


class FailingWeights(MemoryWeights):
    """Weights of which a late tensor cannot be read."""

    def __init__(self, failure: Callable[[], None]) -> None:
        whole = random_weights(small_model())
        super().__init__(whole.model, whole.multipliers, whole.tensors)
        self._failure = failure

    def read(self, name: str) -> Tensor:
        if name == _LATE:
            self._failure()
        return super().read(name)


def export(folder: Path, source: MemoryWeights | None = None, **options: Any) -> None:
    whole = source or random_weights(small_model())
    write_huggingface(whole, folder, hf_format=HfFormat.GRANITE, **options)


def raise_(error: BaseException) -> Callable[[], None]:
    def fail() -> None:
        raise error

    return fail


@pytest.mark.parametrize("error", [CheckpointError("tensor is damaged"), KeyboardInterrupt()])
def test_an_interrupted_export_leaves_nothing(tmp_path: Path, error: BaseException) -> None:
    with pytest.raises(type(error)):
        export(tmp_path / "out", FailingWeights(raise_(error)))
    assert list(tmp_path.iterdir()) == []


def test_a_failed_export_leaves_the_earlier_one_alone(tmp_path: Path) -> None:
    export(tmp_path / "out")
    before = HuggingFaceSource(tmp_path / "out").read(_LATE)
    source = FailingWeights(raise_(CheckpointError("damaged")))
    with pytest.raises(CheckpointError, match="damaged"):
        export(tmp_path / "out", source, overwrite=True)
    assert torch.equal(HuggingFaceSource(tmp_path / "out").read(_LATE), before)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_killed_export_has_no_name_and_the_next_one_removes_it(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if child == 0:
        export(tmp_path / "out", FailingWeights(lambda: os.kill(os.getpid(), signal.SIGKILL)))
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    left = [path.name for path in tmp_path.iterdir()]
    assert len(left) == 1
    assert left[0].startswith(".out.")
    assert not (tmp_path / left[0] / "config.json").exists()
    export(tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_full_disk_is_told_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    room = 40_000

    def limited(stream: Any, data: memoryview) -> None:
        nonlocal room
        room -= len(data)
        if room < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        stream.write(data)

    monkeypatch.setattr(safetensors_shards, "_write", limited)
    with pytest.raises(CheckpointError, match=r"No space left on device.*was not made"):
        export(tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_an_error_of_the_disk_behind_the_writer_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(_descriptor: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(safetensors_shards, "_WRITEBACK_BYTES", 10_000)
    monkeypatch.setattr(os, "fdatasync", broken)
    with pytest.raises(CheckpointError, match="Input/output error"):
        export(tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_disk_without_room_is_refused_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def little(_path: Path) -> Any:
        return type("Usage", (), {"free": 1_000_000})

    monkeypatch.setattr(published_folder.shutil, "disk_usage", little)
    with pytest.raises(CheckpointError, match="needs 86,656 bytes and its disk has 1,000,000 free"):
        export(tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_every_file_is_synced_before_the_folder_gets_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: set[str] = set()
    real_sync, real_rename = os.fsync, os.rename

    def sync(descriptor: int) -> None:
        synced.add(Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)
        real_sync(descriptor)

    def rename(old: Path, new: Path) -> None:
        assert {path.name for path in old.iterdir()} <= synced
        assert old.name in synced
        real_rename(old, new)

    monkeypatch.setattr(os, "fsync", sync)
    monkeypatch.setattr(published_folder.os, "rename", rename)
    export(tmp_path / "out")
    assert {"model.safetensors", "config.json", tmp_path.name} <= synced


def test_a_weight_file_is_on_the_disk_when_it_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[int] = []
    monkeypatch.setattr(os, "fsync", lambda _: synced.append((tmp_path / "f").stat().st_size))
    entries = [safetensors_shards.Entry("a", (5,))]
    safetensors_shards.write_file(tmp_path / "f", entries, torch.float32, lambda _: torch.ones(5))
    assert synced == [(tmp_path / "f").stat().st_size]


def test_an_existing_folder_is_kept_unless_it_is_to_be_overwritten(tmp_path: Path) -> None:
    export(tmp_path / "out", dtype="bfloat16")
    with pytest.raises(CheckpointError, match="out exists; pass --overwrite"):
        export(tmp_path / "out")
    export(tmp_path / "out", overwrite=True)
    assert HuggingFaceSource(tmp_path / "out").dtypes == ["F32"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_folder_of_something_else_is_never_overwritten(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(CheckpointError, match="not the output of an earlier conversion"):
        export(tmp_path, overwrite=True)
    assert (tmp_path / "thesis.tex").exists()


def test_an_empty_folder_is_filled(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    export(tmp_path / "out")
    assert (tmp_path / "out" / "config.json").exists()


def test_a_file_in_the_way_of_the_folder_is_told(tmp_path: Path) -> None:
    (tmp_path / "models").write_text("")
    with pytest.raises(CheckpointError, match=r"cannot write .*models"):
        export(tmp_path / "models" / "out")
