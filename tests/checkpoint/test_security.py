"""A malicious file of each kind that a checkpoint or a configuration consists of runs nothing."""

from __future__ import annotations

import contextlib
import io
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint import filesystem
from torch.distributed.checkpoint.api import CheckpointException

from megatron_mup.checkpoint.safe_pickle import safe_reading
from megatron_mup.config_io import load_config
from megatron_mup.errors import CheckpointError, ConfigError
from megatron_mup.training.loop import TrainData, train
from tests.checkpoint.malicious import KINDS, Marker, saved
from tests.configurations import tiny
from tests.random_samples import RandomSamples

VARIANTS = {
    "plain": [],
    "bf16": ["bf16=true"],
    "distributed optimizer": ["use_distributed_optimizer=true"],
}


def run_training(*overrides: str) -> int:
    """Train on random tokens; the iteration that was reached."""
    run = tiny("lr_decay_iters=3", *overrides)
    samples = RandomSamples(run.model.vocab_size, run.model.seq_length)
    return train(run, data=TrainData(samples), echo=lambda _line: None).iteration


@pytest.fixture(scope="module")
def genuine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("genuine")
    run_training("train_iters=1", f"save={root}")
    return root / "iter_0000001"


@pytest.fixture
def folder(genuine: Path, tmp_path: Path) -> Path:
    """A copy of a genuine checkpoint, to be spoiled."""
    return Path(shutil.copytree(genuine, tmp_path / "iter_0000001"))


def read(folder: Path) -> None:
    """Read ``.metadata`` and the non-tensor items as a load does."""
    from megatron.core import dist_checkpointing

    with safe_reading(folder):
        dist_checkpointing.load_common_state_dict(str(folder))


def change_metadata(folder: Path, change: Callable[[Any], None]) -> None:
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    change(metadata)
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))


def replace_common_state(folder: Path, blob: bytes) -> None:
    """Let the checkpoint's non-tensor item be ``blob``, appended to its data file."""

    def change(metadata: Any) -> None:
        (info,) = (v for k, v in metadata.storage_data.items() if "common_state" in k.fqn)
        with (folder / info.relative_path).open("ab") as stream:
            info.offset, info.length = stream.tell(), len(blob)
            stream.write(blob)

    change_metadata(folder, change)


@pytest.mark.parametrize("variant", list(VARIANTS))
def test_a_genuine_checkpoint_loads(variant: str, tmp_path: Path) -> None:
    options = [*VARIANTS[variant], f"save={tmp_path}"]
    run_training(*options, "train_iters=1")
    with safe_reading(tmp_path / "iter_0000001"):
        assert run_training(*options, f"load={tmp_path}", "train_iters=2") == 2


@pytest.mark.parametrize("kind", KINDS)
def test_code_in_metadata_is_refused_and_named(kind: str, folder: Path, marker: Marker) -> None:
    change_metadata(folder, lambda data: setattr(data, "planner_data", marker.payload(kind)))
    refused = Marker.refused(kind) if kind != "nested" else "collections.OrderedDict"
    with pytest.raises(CheckpointError, match=rf"\.metadata names '{refused}'"):
        read(folder)


def test_code_instead_of_metadata_is_refused(folder: Path, marker: Marker) -> None:
    (folder / ".metadata").write_bytes(pickle.dumps(marker.payload("posix.system")))
    with pytest.raises(CheckpointError, match=r"\.metadata names 'posix\.system'"):
        read(folder)


@pytest.mark.parametrize(
    ("module", "name"),
    [
        # Attributes of allowed modules and classes; both resolve in a plain unpickler.
        ("torch.distributed.checkpoint.metadata", "os.system"),
        ("torch.distributed.checkpoint.metadata", "Metadata.__init__.__globals__.update"),
        ("torch", "load"),
        ("torch.serialization", "os.system"),
    ],
)
def test_a_path_through_an_allowed_module_is_refused(
    module: str, name: str, folder: Path, marker: Marker
) -> None:
    call = b"\x93" + b"X" + len(str(marker.path)).to_bytes(4, "little") + str(marker.path).encode()
    names = b"".join(b"\x8c" + bytes([len(text)]) + text.encode() for text in (module, name))
    (folder / ".metadata").write_bytes(b"\x80\x04" + names + call + b"\x85R.")
    with pytest.raises(CheckpointError, match=rf"\.metadata names '{module}\.{name}'"):
        read(folder)


def test_the_layout_rebuilder_knows_one_layout_and_cannot_be_changed(folder: Path) -> None:
    rebuild = b"ctorch.serialization\n_get_layout\n"
    for raw in (b"X\x03\0\0\0abc\x85R.", b"}X\x05\0\0\0cache}sb."):
        (folder / ".metadata").write_bytes(b"\x80\x04" + rebuild + raw)
        with pytest.raises(CheckpointError, match=r"\.metadata holds something else"):
            read(folder)
    assert "cache" in vars(torch.serialization._get_layout)
    assert vars(torch.serialization._get_layout)["cache"] != {}


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "..", "a/b"])
def test_data_outside_the_folder_is_refused(name: str, folder: Path) -> None:
    def change(metadata: Any) -> None:
        next(iter(metadata.storage_data.values())).relative_path = name

    change_metadata(folder, change)
    with pytest.raises(CheckpointError, match=rf"places data in '{name}', outside the folder"):
        read(folder)


def test_a_link_out_of_the_folder_is_refused(folder: Path, tmp_path: Path) -> None:
    (data,) = folder.glob("*.distcp")
    data.rename(tmp_path / "secret")
    data.symlink_to(tmp_path / "secret")
    with pytest.raises(CheckpointError, match="outside the folder"):
        read(folder)


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("offset", -1, "no place in a file"),
        ("length", "5", "no place in a file"),
        ("transform_descriptors", ["zstd"], "compressed"),
    ],
)
def test_a_place_that_cannot_be_read_is_refused(
    field: str, value: Any, words: str, folder: Path
) -> None:
    def change(metadata: Any) -> None:
        setattr(next(iter(metadata.storage_data.values())), field, value)

    change_metadata(folder, change)
    with pytest.raises(CheckpointError, match=words):
        read(folder)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("zipped", [True, False])
def test_code_in_an_item_is_refused_and_named(
    kind: str, zipped: bool, folder: Path, marker: Marker
) -> None:
    blob = saved([marker.payload(kind)], _use_new_zipfile_serialization=zipped)
    replace_common_state(folder, blob)
    # torch leaves the module's name out for builtins.
    refused = Marker.refused(kind).removeprefix("builtins.")
    with pytest.raises(CheckpointError, match=rf"an item names '{refused}'"):
        read(folder)


@pytest.mark.parametrize("environment", ["0", "1"])
def test_code_in_a_legacy_common_file_is_refused_whatever_the_environment_says(
    environment: str, folder: Path, marker: Marker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", environment)
    (folder / "common.pt").write_bytes(saved(marker.payload("posix.system")))
    with pytest.raises(CheckpointError, match=r"an item names 'posix\.system'"):
        read(folder)


def test_without_the_block_these_files_would_run_code(folder: Path, tmp_path: Path) -> None:
    from megatron.core import dist_checkpointing

    marker = Marker(tmp_path / "was-run")
    replace_common_state(folder, saved([marker.payload("posix.system")]))
    dist_checkpointing.load_common_state_dict(str(folder))
    assert marker.path.exists()
    marker.path.unlink()
    (folder / ".metadata").write_bytes(pickle.dumps(marker.payload("posix.system")))
    with pytest.raises((Exception, CheckpointException)):
        dist_checkpointing.load_common_state_dict(str(folder))
    assert marker.path.exists()


def test_the_readers_are_as_before_after_the_block(folder: Path) -> None:
    before = (torch.load, vars(filesystem)["pickle"])
    seen = []

    def fail_inside() -> None:
        with safe_reading(folder):
            seen.extend([torch.load, vars(filesystem)["pickle"]])
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail_inside()
    assert seen[0] is not before[0]
    assert seen[1] is not before[1]
    assert (torch.load, vars(filesystem)["pickle"]) == before


def test_a_refusal_that_a_reader_swallows_still_stops_the_load(
    folder: Path, marker: Marker
) -> None:
    def swallow() -> None:
        with safe_reading(folder), contextlib.suppress(CheckpointError):
            torch.load(io.BytesIO(saved(marker.payload("posix.system"))), weights_only=False)

    with pytest.raises(CheckpointError, match=r"posix\.system"):
        swallow()


def test_tensors_load_inside_the_block(folder: Path) -> None:
    with safe_reading(folder):
        blob = io.BytesIO(saved([torch.arange(3)]))
        assert torch.equal(torch.load(blob, weights_only=True)[0], torch.tensor([0, 1, 2]))


@pytest.mark.parametrize(
    "tag", ["!!python/object/apply:os.system", "!!python/object/new:os.system"]
)
def test_code_in_a_configuration_is_refused(tag: str, tmp_path: Path, marker: Marker) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(f'training:\n  train_iters: {tag} ["touch {marker.path}"]\n')
    with pytest.raises(ConfigError, match=r"run\.yaml"):
        load_config(path)
