"""Any source becomes a checkpoint of this package, which trains on and loses no digit."""

from __future__ import annotations

import errno
import json
import shutil
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_mup.checkpoint.folders import RECORD, TRACKER
from megatron_mup.checkpoint.integrity import check_files
from megatron_mup.checkpoint.load import load_checkpoint
from megatron_mup.config import RunConfig
from megatron_mup.convert import published_folder, tensor_files
from megatron_mup.convert.megatron_source import MegatronSource
from megatron_mup.convert.megatron_target import write_megatron
from megatron_mup.convert.tensor_files import TensorFiles
from megatron_mup.errors import CheckpointError
from megatron_mup.parameterization.roles import logical_tensors
from megatron_mup.training.processes import Launch, parallel_processes
from megatron_mup.training.state import build_state
from tests.checkpoint.short_runs import losses, run_training
from tests.convert.small_checkpoints import (
    BIASES,
    GQA,
    MQA,
    PAPER,
    TIED,
    MakeCheckpoint,
    random_values,
    small_run,
)

KINDS = [GQA, MQA, TIED, PAPER, BIASES, ("norm_gain=scalar", "embedding_norm=true")]


class RandomWeights:
    """A source that makes each tensor from its name when it is asked for."""

    def __init__(self, run: RunConfig, change: Callable[[Tensor], Tensor] | None = None) -> None:
        self.model, self.multipliers = run.model, run.table.multipliers
        self.where, self.provenance = "random weights", {"iteration": 5}
        self._change = change
        self._shapes = {t.name: t.shape for t in logical_tensors(run.model.shape)}

    def read(self, name: str) -> Tensor:
        values = random_values(name, self._shapes[name])
        return values if self._change is None else self._change(values)


class LateDigits(RandomWeights):
    """The last tensor alone has values that bf16 cannot hold."""

    def read(self, name: str) -> Tensor:
        values = super().read(name)
        return torch.full_like(values, 1 / 3) if name == "output_layer.weight" else values


class MixedPrecision(RandomWeights):
    """Tensors in bf16 before and after one in fp16, whose digits bf16 has not."""

    def read(self, name: str) -> Tensor:
        half = torch.float16 if name.endswith("layers.0.mlp.linear_fc2.weight") else torch.bfloat16
        return super().read(name).to(half)


def parameters(folder: Path, run: RunConfig) -> dict[str, Tensor]:
    """The weights that a run gets from a checkpoint."""
    with parallel_processes(run, Launch()):
        state = build_state(run)
        load_checkpoint(state, folder, weights_only=True)
        return {name: p.detach().clone() for name, p in state.model_chunks[0].named_parameters()}


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: ",".join(kind))
def test_what_was_written_is_loaded_as_the_checkpoint_that_it_was_read_from(
    kind: tuple[str, ...], checkpoint_of: MakeCheckpoint, tmp_path: Path
) -> None:
    source = MegatronSource(checkpoint_of(*kind))
    told: list[tuple[int, int]] = []
    folder = write_megatron(
        source, tmp_path, run=source.run, progress=lambda *seen: told.append(seen)
    )
    assert folder == tmp_path / "iter_0000000"
    assert (tmp_path / TRACKER).read_text() == "0"
    assert check_files(folder) == []
    original = parameters(source.folder, source.run)
    written = parameters(folder, source.run)
    assert original.keys() == written.keys()
    assert all(torch.equal(original[name], written[name]) for name in original)
    again = MegatronSource(folder)
    assert all(torch.equal(again.read(name), source.read(name)) for name in again._places)
    assert told[-1][0] == told[-1][1] == sum(4 * source.read(n).numel() for n in again._places)
    assert told == sorted(told)


def test_a_bf16_run_keeps_fp32_values_only_where_they_say_more(tmp_path: Path) -> None:
    run = small_run(*GQA, "bf16=true")
    name = "decoder.layers.1.self_attention.linear_qkv.weight.query"
    shapes = {t.name: t.shape for t in logical_tensors(run.model.shape)}
    exact = write_megatron(
        RandomWeights(run, lambda values: values.bfloat16().float()), tmp_path / "a", run=run
    )
    source = MegatronSource(exact)
    assert not [key for key in source.stored.tensors if key.startswith("optimizer.")]
    assert torch.equal(source.read(name), random_values(name, shapes[name]).bfloat16().float())
    fine = RandomWeights(run)
    folder = write_megatron(fine, tmp_path / "b", run=run)
    source = MegatronSource(folder)
    assert source.read_stored("output_layer.weight").dtype == torch.bfloat16
    for logical in shapes:
        assert torch.equal(source.read(logical), fine.read(logical)), logical
    loaded = parameters(folder, run)["decoder.layers.1.mlp.linear_fc1.weight"]
    gate, up = (f"decoder.layers.1.mlp.linear_fc1.weight.{part}" for part in ("gate", "up"))
    assert torch.equal(loaded, torch.cat([fine.read(gate), fine.read(up)]).bfloat16())


def test_the_main_weights_of_tensors_before_the_first_that_needs_them_are_written(
    tmp_path: Path,
) -> None:
    run = small_run(*GQA, "bf16=true")
    late = LateDigits(run, torch.round)
    source = MegatronSource(write_megatron(late, tmp_path, run=run))
    for name in ("embedding.word_embeddings.weight", "output_layer.weight"):
        main = source.read_stored(f"optimizer.state.fp32_param.{name}")
        assert main.dtype == torch.float32
        assert torch.equal(main, late.read(name))


def test_main_weights_are_fp32_though_the_source_has_some_in_half_precision(tmp_path: Path) -> None:
    run = small_run(*GQA, "bf16=true")
    source = MixedPrecision(run)
    written = MegatronSource(write_megatron(source, tmp_path, run=run))
    for name in ("embedding.word_embeddings.weight", "output_layer.weight"):
        main = written.read_stored(f"optimizer.state.fp32_param.{name}")
        assert main.dtype == torch.float32
        assert torch.equal(main, source.read(name).float())


def test_training_starts_from_converted_weights_with_a_fresh_optimizer(
    checkpoint_of: MakeCheckpoint, tmp_path: Path
) -> None:
    original = checkpoint_of(*GQA, steps=2)
    converted = write_megatron(MegatronSource(original), tmp_path, run=small_run(*GQA))
    found = []
    for folder in (original, converted):
        options = [*GQA, f"load={folder.parent}", "finetune=true", "train_iters=2"]
        found.append(losses(run_training(small_run(*options))))
    assert len(found[0]) == 2
    assert found[0] == found[1]


def test_resuming_from_converted_weights_says_that_it_must_be_finetuning(
    checkpoint_of: MakeCheckpoint, tmp_path: Path
) -> None:
    write_megatron(MegatronSource(checkpoint_of(*GQA)), tmp_path, run=small_run(*GQA))
    with pytest.raises(CheckpointError, match=r"no optimizer state.*checkpoint\.finetune=true"):
        run_training(small_run(*GQA, f"load={tmp_path}"))


def test_the_record_tells_where_the_weights_come_from(tmp_path: Path) -> None:
    run = small_run(*GQA)
    folder = write_megatron(RandomWeights(run), tmp_path, run=run)
    record = json.loads((folder / RECORD).read_text())
    assert record["contents"] == "weights"
    assert record["provenance"] == {
        "converted_from": "random weights",
        "source": {"iteration": 5},
    }
    assert record["multipliers"]["embedding"] == 2.5


def test_a_source_of_another_model_or_multiplier_is_refused(tmp_path: Path) -> None:
    run = small_run(*GQA)
    for other, message in (
        (small_run(*GQA, "embedding_multiplier=3"), "rescale the weights first"),
        (small_run(*GQA, "norm_epsilon=1e-6"), "another one"),
        (small_run(*MQA), "another one"),
    ):
        with pytest.raises(CheckpointError, match=message):
            write_megatron(RandomWeights(other), tmp_path / "new", run=run)
    assert not (tmp_path / "new").exists()


def test_a_folder_with_checkpoints_is_left_alone(
    checkpoint_of: MakeCheckpoint, tmp_path: Path
) -> None:
    run = small_run(*GQA)
    folder = write_megatron(RandomWeights(run), tmp_path, run=run)
    with pytest.raises(CheckpointError, match="exists; pass --overwrite"):
        write_megatron(RandomWeights(run), tmp_path, run=run)
    before = MegatronSource(folder).read("output_layer.weight")
    write_megatron(RandomWeights(run, torch.neg), tmp_path, run=run, overwrite=True)
    assert torch.equal(MegatronSource(folder).read("output_layer.weight"), -before)
    folder.rename(tmp_path / "iter_0000001")
    with pytest.raises(CheckpointError, match="already holds iter_0000001"):
        write_megatron(RandomWeights(run), tmp_path, run=run, overwrite=True)
    own = shutil.copytree(checkpoint_of(*GQA), tmp_path / "own" / "iter_0000000")
    with pytest.raises(CheckpointError, match="not the output of an earlier conversion"):
        write_megatron(RandomWeights(run), own.parent, run=run, overwrite=True)
    assert check_files(own) == []


def test_a_checkpoint_is_not_converted_onto_itself(tmp_path: Path) -> None:
    run = small_run(*GQA)
    source = MegatronSource(write_megatron(RandomWeights(run), tmp_path, run=run))
    for root, place in ((tmp_path, "is the folder that is"), (source.folder, "lies inside")):
        with pytest.raises(CheckpointError, match=f"{place} .*; pass a folder beside it"):
            write_megatron(source, root, run=run, overwrite=True)
    assert check_files(source.folder) == []


def test_what_is_not_approved_is_no_checkpoint_of_the_run(tmp_path: Path) -> None:
    run, seen = small_run(*GQA), []

    def refuse(hidden: Path) -> bool:
        seen.append(MegatronSource(hidden))
        assert seen[-1].where == str(hidden)
        return False

    def write(*, change: Callable[[Tensor], Tensor] | None = None, **options: Any) -> Path:
        return write_megatron(RandomWeights(run, change), tmp_path, run=run, **options)

    assert write(approve=refuse) == tmp_path / "iter_0000000.rejected"
    assert not (tmp_path / TRACKER).exists()
    good = write(approve=lambda _: True)
    before = MegatronSource(good).read("output_layer.weight")
    made = write(change=torch.neg, overwrite=True, approve=refuse)
    assert made.name == "iter_0000000.rejected.2"
    assert torch.equal(MegatronSource(made).read("output_layer.weight"), -before)
    assert torch.equal(MegatronSource(tmp_path).read("output_layer.weight"), before)
    assert len(seen) == 2


@pytest.mark.parametrize(
    ("precision", "free", "needed"),
    [
        # 74,048 elements of 4, of 2, and of 2 and 4 bytes; 1 MiB is kept for small files.
        ("bf16=false", 1_300_000, "296,192"),
        ("bf16=true", 1_100_000, "148,096"),
        ("bf16=true", 1_300_000, "444,288"),
    ],
)
def test_a_disk_without_room_is_told_at_once(
    precision: str, free: int, needed: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = small_run(*GQA, precision)
    usage = type("Usage", (), {"free": free})
    monkeypatch.setattr(published_folder.shutil, "disk_usage", lambda _: usage)
    read: list[Tensor] = []

    def counted(values: Tensor) -> Tensor:
        read.append(values)
        return values

    message = f"needs {needed} bytes and its disk has {free:,} free"
    with pytest.raises(CheckpointError, match=message):
        write_megatron(RandomWeights(run, counted), tmp_path / "root", run=run)
    # Whether main weights are needed is known after the first tensor.
    assert len(read) == (1 if needed == "444,288" else 0)
    assert not (tmp_path / "root").exists()


def test_a_tracker_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    run = small_run(*GQA)
    (tmp_path / TRACKER).mkdir()
    with pytest.raises(CheckpointError, match=r"iter_0000000 is complete, but .*cannot be written"):
        write_megatron(RandomWeights(run), tmp_path, run=run)
    assert check_files(tmp_path / "iter_0000000") == []


def test_a_write_that_fails_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = small_run(*GQA)
    good = write_megatron(RandomWeights(run), tmp_path, run=run)
    before = {path.name for path in tmp_path.iterdir()}

    class FullDisk:
        def __init__(self, stream: Any) -> None:
            self.stream, self.left = stream, 100_000

        def write(self, data: Any) -> int:
            self.left -= memoryview(data).nbytes
            if self.left < 0:
                raise OSError(errno.ENOSPC, "No space left on device")
            return int(self.stream.write(data))

        def __getattr__(self, name: str) -> Any:
            return getattr(self.stream, name)

    save = tensor_files._save
    full: list[FullDisk] = []

    def save_on_full_disk(block: Tensor, stream: Any) -> None:
        full.append(full[0] if full else FullDisk(stream))
        save(block, full[0])  # type: ignore[arg-type]

    monkeypatch.setattr(tensor_files, "_save", save_on_full_disk)
    with pytest.raises(CheckpointError, match=r"No space left on device.*was not made"):
        write_megatron(RandomWeights(run, torch.neg), tmp_path, run=run, overwrite=True)
    assert {path.name for path in tmp_path.iterdir()} == before
    assert check_files(good) == []
    assert "digest" not in {thread.name for thread in threading.enumerate()}


def test_large_tensors_go_to_several_files(tmp_path: Path) -> None:
    run = replace(small_run(*GQA))
    folder = tmp_path / "iter_0000000"
    folder.mkdir()
    values = torch.arange(12.0).view(3, 4)
    with TensorFiles(folder, file_bytes=1) as files:
        files.add("a", (3, 4), (0, 0), values[:2])
        files.add("a", (3, 4), (2, 0), values[2:])
        files.add_object("b", {"x": 1})
        files.finish({"config": run.model.num_layers})
    names = {path.name for path in folder.glob("*.distcp")}
    assert names == {"__0_0.distcp", "__0_1.distcp", "__0_2.distcp"}
    assert check_files(folder) == []
