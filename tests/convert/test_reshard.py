"""Another layout: the same bits, in files as its ranks read them, and training goes on the same."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from megatron_mup.checkpoint.folders import TRACKER, read_record
from megatron_mup.checkpoint.integrity import check_files
from megatron_mup.checkpoint.load import load_checkpoint
from megatron_mup.convert import published_folder
from megatron_mup.convert.megatron_source import MegatronSource
from megatron_mup.convert.megatron_target import write_megatron
from megatron_mup.convert.reshard import reshard
from megatron_mup.convert.stored_tensors import Sizes, StoredTensors
from megatron_mup.convert.tensor_files import TensorFiles
from megatron_mup.errors import CheckpointError, ConfigError
from megatron_mup.model.initialization import part_view
from megatron_mup.parameterization.roles import by_parameter, logical_tensors
from megatron_mup.training.processes import Launch, parallel_processes
from megatron_mup.training.state import build_state
from tests.checkpoint.short_runs import losses, run_training
from tests.convert.layouts import LAYERS, ONE, THREE, options
from tests.convert.small_checkpoints import GQA, MakeCheckpoint, small_run
from tests.convert.test_megatron_target import RandomWeights

TP2 = ["tensor_model_parallel_size=2"]
SPOILED_KEY = "decoder.layers.mlp.linear_fc2.weight"
DIFFERS = r"differs from its source in decoder.layers.mlp.linear_fc2.weight:"


def test_to_one_rank_and_back_keeps_every_bit(layouts: Path) -> None:
    stored = {
        name: StoredTensors(layouts / name / "iter_0000003") for name in ("spread", "one", "back")
    }
    first = stored["spread"]
    assert len([key for key in first.tensors if "exp_avg_sq" in key]) == 9
    for other in (stored["one"], stored["back"]):
        assert other.tensors.keys() == first.tensors.keys()
        assert other.objects.keys() == first.objects.keys()
        for key in first.tensors:
            assert torch.equal(other.read(key), first.read(key)), key
        plain = first.objects.keys() - {"common_state/shard_0_1"}
        assert all(other.read_bytes(key) == first.read_bytes(key) for key in plain)
    commons = {name: each.read_object("common_state/shard_0_1") for name, each in stored.items()}
    layouts_told = {name: common.pop("args") for name, common in commons.items()}
    sizes = {name: told.tensor_model_parallel_size for name, told in layouts_told.items()}
    assert sizes == {"spread": 2, "one": 1, "back": 2}
    assert commons["one"] == commons["back"] == commons["spread"]
    common = commons["back"]
    assert (common["iteration"], common["consumed_train_samples"]) == (3, 12)
    assert common["optimizer"] == {"step": 3}


def test_training_goes_on_as_without_it(layouts: Path) -> None:
    found = json.loads((layouts / "losses.json").read_text())
    assert len(found["spread"]) == 3
    assert found["back"] == found["spread"]
    one = small_run(*options(*LAYERS), f"load={layouts / 'one'}", "train_iters=6")
    assert losses(run_training(one)) == pytest.approx(found["spread"], rel=1e-6)


def test_each_rank_of_the_new_layout_has_a_file_of_what_it_reads(layouts: Path) -> None:
    folder = layouts / "back" / "iter_0000003"
    assert check_files(folder) == []
    assert (layouts / "back" / TRACKER).read_text() == "3"
    fc1 = "optimizer.state.exp_avg.decoder.layers.mlp.linear_fc1.weight"
    stored = StoredTensors(folder).tensors
    # Ranks 0 and 1 are the first stage, with layers 0 and 2; each has half of gate and of up.
    found = {(p.offset, p.size, p.file) for p in stored[fc1].parts if p.offset[0] in (2, 3)}
    assert found == {
        ((layer, row, 0), (1, 48, 64), f"__{rank}_0.distcp")
        for layer, ranks in ((2, (0, 1)), (3, (2, 3)))
        for row, rank in ((0, ranks[0]), (48, ranks[1]), (96, ranks[0]), (144, ranks[1]))
    }
    out = {(p.offset, p.size) for p in stored["decoder.layers.mlp.linear_fc2.weight"].parts}
    assert ((1, 0, 48), (1, 64, 48)) in out
    (gain,) = stored["decoder.final_layernorm.weight"].parts
    assert (gain.size, gain.file) == ((64,), "__2_0.distcp")
    rows = {(p.offset, p.file) for p in stored["embedding.word_embeddings.weight"].parts}
    assert rows == {((0, 0), "__0_0.distcp"), ((48, 0), "__1_0.distcp")}


def test_only_the_layout_of_the_record_changes(layouts: Path) -> None:
    before, after = (read_record(layouts / name / "iter_0000003") for name in ("spread", "one"))
    assert after["config"]["parallel"]["tensor_model_parallel_size"] == 1
    assert after["config"]["parallel"]["use_distributed_optimizer"] is False
    assert after["provenance"].pop("resharded_from") == str(layouts / "spread" / "iter_0000003")
    before["config"].pop("parallel"), after["config"].pop("parallel")
    assert before == after


@pytest.mark.parametrize("name", ["spread", "boxes"])
def test_a_source_reads_from_any_layout_what_megatron_loads(name: str, layouts: Path) -> None:
    source = MegatronSource(layouts / name)
    run = small_run(*options(*(LAYERS if name == "spread" else THREE)))
    with parallel_processes(run, Launch()):
        state = build_state(run)
        load_checkpoint(state, source.folder, weights_only=False)
        held = {
            key: getattr(parameter, "main_param", parameter).detach().clone()
            for key, parameter in state.model_chunks[0].named_parameters()
        }
    shape = run.model.shape
    for parameter, tensors in by_parameter(logical_tensors(shape)).items():
        for tensor in tensors:
            expected = part_view(held[parameter], tensor.part, shape).reshape(tensor.shape)
            assert torch.equal(source.read(tensor.name), expected), tensor.name
    if name == "boxes":
        mains = [t for key, t in source.stored.tensors.items() if "fp32_param" in key]
        # By two tensor-parallel ranks alone: 2 boxes of each of three matrices in three layers, 4
        # of the gated one, each gain whole, 2 of embedding and of readout.
        assert sum(len(stored.parts) for stored in mains) > 3 * (3 * 2 + 4 + 2) + 1 + 2 * 2


def test_the_boxes_of_a_distributed_optimizer_become_whole_tensors(
    layouts: Path, tmp_path: Path
) -> None:
    folder = reshard(layouts / "boxes", tmp_path, layout=ONE)
    before, after = StoredTensors(layouts / "boxes" / "iter_0000002"), StoredTensors(folder)
    assert all(torch.equal(after.read(key), before.read(key)) for key in before.tensors)
    key = "optimizer.state.fp32_param.decoder.layers.self_attention.linear_qkv.weight"
    assert [part.size for part in after.tensors[key].parts] == [(1, 128, 64)] * 3


def test_what_cannot_be_resharded_is_refused_before_anything_is_written(
    checkpoint_of: MakeCheckpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, root = checkpoint_of(*GQA), tmp_path / "new"
    for layout, message in (
        (["tensor_model_parallel_size=3"], "hidden_size 64 is not divisible"),
        (["pipeline_model_parallel_size=4"], "num_layers 2 is not divisible"),
        (["bf16=true"], "'bf16=true' is no option of the layout"),
    ):
        with pytest.raises(ConfigError, match=message):
            reshard(folder, root, layout=layout)
    assert not root.exists()
    with pytest.raises(CheckpointError, match="is the folder that is read"):
        reshard(folder, folder.parent, layout=TP2, overwrite=True)
    assert check_files(folder) == []
    usage = type("Usage", (), {"free": 1_900_000})
    monkeypatch.setattr(published_folder.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(CheckpointError, match="needs 888,576 bytes and its disk has 1,900,000"):
        reshard(folder, root, layout=TP2)


class Spoiled(TensorFiles):
    """Writes one block with other bits than it was given."""

    spoil: Callable[[Tensor], Tensor]

    def add(self, key: str, shape: Sizes, offset: Sizes, block: Tensor, *, rank: int = 0) -> None:
        if key == SPOILED_KEY:
            block = type(self).spoil(block.clone())
        super().add(key, shape, offset, block, rank=rank)


class BoxLost(TensorFiles):
    """Forgets one block."""

    def add(self, key: str, shape: Sizes, offset: Sizes, block: Tensor, *, rank: int = 0) -> None:
        if key != SPOILED_KEY or offset[0] == 0:
            super().add(key, shape, offset, block, rank=rank)


class TensorLost(TensorFiles):
    """Forgets one tensor."""

    def add(self, key: str, shape: Sizes, offset: Sizes, block: Tensor, *, rank: int = 0) -> None:
        if key != SPOILED_KEY:
            super().add(key, shape, offset, block, rank=rank)


class BytesSpoiled(TensorFiles):
    """Writes other objects."""

    def add_bytes(self, key: str, content: bytes, *, rank: int = 0) -> None:
        super().add_bytes(key, content[:-1] + b"?", rank=rank)


def special(values: Tensor) -> Tensor:
    """Values that compare otherwise than their bits."""
    return (
        torch.tensor([0.0, -0.0, math.nan, math.inf])
        .repeat(values.numel())[: values.numel()]
        .view(values.shape)
    )


@pytest.mark.parametrize(
    ("spoiled", "spoil", "message"),
    [
        (Spoiled, torch.abs, DIFFERS),
        (Spoiled, torch.nan_to_num, DIFFERS),
        (Spoiled, torch.Tensor.double, "shape or dtype of decoder"),
        (BoxLost, None, DIFFERS),
        (TensorLost, None, "the names of its tensors"),
        (BytesSpoiled, None, "_extra_state"),
    ],
)
def test_a_copy_that_differs_in_a_bit_is_not_kept(
    spoiled: type[TensorFiles],
    spoil: Callable[[Tensor], Tensor] | None,
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run = small_run(*GQA)
    weights = RandomWeights(run, special)
    folder = write_megatron(weights, tmp_path / "a", run=run)
    reshard(folder, tmp_path / "b", layout=TP2)
    if spoil is not None:
        monkeypatch.setattr(Spoiled, "spoil", staticmethod(spoil), raising=False)
    monkeypatch.setattr("megatron_mup.convert.reshard.TensorFiles", spoiled)
    with pytest.raises(CheckpointError, match=message):
        reshard(folder, tmp_path / "c", layout=TP2)
    assert not (tmp_path / "c").exists()
    reshard(folder, tmp_path / "c", layout=TP2, verify=False)


def test_converted_weights_can_be_resharded_and_stay_weights_only(
    checkpoint_of: MakeCheckpoint, tmp_path: Path
) -> None:
    source = MegatronSource(checkpoint_of(*GQA))
    converted = write_megatron(source, tmp_path / "a", run=source.run)
    told: list[tuple[int, int]] = []
    folder = reshard(
        converted, tmp_path / "b", layout=TP2, progress=lambda *seen: told.append(seen)
    )
    assert read_record(folder)["contents"] == "weights"
    assert told[-1][0] == told[-1][1] == 4 * sum(p.numel() for p in _weights(converted))
    assert all(map(torch.equal, _weights(folder), _weights(converted)))


def _weights(folder: Path) -> list[torch.Tensor]:
    stored = StoredTensors(folder)
    return [stored.read(key) for key in sorted(stored.tensors)]
