"""Checkpoints of this package are read tensor by tensor, from any layout, and damage is named."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch

from megatron_mup.checkpoint.folders import RECORD
from megatron_mup.checkpoint.integrity import digest_files, read_checksums, write_checksums
from megatron_mup.convert.megatron_source import MegatronSource
from megatron_mup.convert.stored_tensors import StoredTensors
from megatron_mup.errors import CheckpointError
from megatron_mup.parameterization.roles import logical_tensors
from tests.convert.small_checkpoints import (
    BIASES,
    GQA,
    LLAMA,
    MQA,
    PAPER,
    TIED,
    MakeCheckpoint,
    random_values,
    small_run,
)

BF16 = "bf16=true"
SHARDED = "use_distributed_optimizer=true"
KINDS = [LLAMA, GQA, MQA, TIED, PAPER, BIASES, ("norm_gain=scalar",), ("embedding_norm=true",)]


def expected(name: str, overrides: tuple[str, ...]) -> torch.Tensor:
    """A logical tensor cut by hand from the random value of its parameter.

    Rows of linear_qkv of ``tiny`` (4 heads of 16): for each query group its queries, then 16 rows
    of keys, then 16 of values. Rows of a gated linear_fc1: 96 of the gate, then 96 of up.
    """
    groups = {GQA: 2, MQA: 1}.get(overrides, 4)
    queries = 64 // groups
    parameter, _, part = name.rpartition(".")
    if part in ("query", "key", "value"):
        first, last = {
            "query": (0, queries),
            "key": (queries, queries + 16),
            "value": (queries + 16, queries + 32),
        }[part]
        shape = (64 + 32 * groups, 64) if parameter.endswith("weight") else (64 + 32 * groups,)
        blocks = random_values(parameter, shape).split(queries + 32)
        return torch.cat([block[first:last] for block in blocks])
    if part in ("gate", "up"):
        whole = random_values(parameter, (192, 64))
        return whole[:96] if part == "gate" else whole[96:]
    run = small_run(*overrides)
    shape = next(t.shape for t in logical_tensors(run.model.shape) if t.name == name)
    return random_values(name, shape)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: ",".join(kind))
def test_every_logical_tensor_is_what_the_model_held(
    kind: tuple[str, ...], checkpoint_of: MakeCheckpoint
) -> None:
    source = MegatronSource(checkpoint_of(*kind))
    names = [tensor.name for tensor in logical_tensors(source.model.shape)]
    assert len(names) >= 14
    for name in names:
        values = source.read(name)
        assert values.dtype == torch.float32
        assert values.is_contiguous()
        assert torch.equal(values, expected(name, kind)), name


def test_the_main_weights_of_a_bf16_run_are_read_instead_of_its_rounded_weights(
    checkpoint_of: MakeCheckpoint,
) -> None:
    for options in ((*GQA, BF16), (*GQA, BF16, SHARDED)):
        source = MegatronSource(checkpoint_of(*options))
        name = "decoder.layers.1.self_attention.linear_qkv.weight.key"
        assert torch.equal(source.read(name), expected(name, GQA))
        stored = source.read_stored("output_layer.weight")
        assert stored.dtype == torch.bfloat16
        assert torch.equal(stored, expected("output_layer.weight", GQA).bfloat16())


def test_the_record_tells_model_multipliers_and_origin(checkpoint_of: MakeCheckpoint) -> None:
    folder = checkpoint_of(*GQA, steps=2)
    source = MegatronSource(folder.parent)
    assert source.folder == folder
    assert source.iteration == 2
    assert source.model.query_groups == 2
    multipliers = source.multipliers
    assert (multipliers.embedding, multipliers.attention) == (2.5, 1 / 16)
    assert (multipliers.residual, multipliers.logit) == (0.3, 1.7)
    assert source.provenance["consumed_train_samples"] == 8
    assert source.provenance["consumed_train_tokens"] == 128
    assert source.provenance["checkpoint"] == "iter_0000002"


def test_boxes_of_the_optimizer_state_can_be_read(checkpoint_of: MakeCheckpoint) -> None:
    source = MegatronSource(checkpoint_of(*GQA, SHARDED, steps=2))
    key = "optimizer.state.exp_avg.decoder.layers.mlp.linear_fc1.weight"
    whole = source.read_stored(key)
    assert whole.shape == (2, 192, 64)
    assert whole.count_nonzero() > 0
    assert torch.equal(source.read_stored(key, (1, 90, 3), (1, 10, 5)), whole[1:, 90:100, 3:8])


def test_a_folder_without_a_usable_checkpoint_is_refused(
    checkpoint_of: MakeCheckpoint, tmp_path: Path
) -> None:
    folder = checkpoint_of(*GQA)
    for path, iteration, message in (
        (tmp_path / "none", None, "is no folder"),
        (tmp_path, None, "holds no checkpoint"),
        (folder.parent, 7, r"no whole iteration 7, but \[0\]"),
        (folder, 7, "not iteration 7"),
    ):
        with pytest.raises(CheckpointError, match=message):
            MegatronSource(path, iteration)
    copy = shutil.copytree(folder, tmp_path / folder.name)
    (copy / "checksums.json").unlink()
    with pytest.raises(CheckpointError, match=re.escape(f"{copy}/checksums.json is missing")):
        MegatronSource(copy)
    (copy / RECORD).unlink()
    with pytest.raises(CheckpointError, match="not written by megatron_mup"):
        MegatronSource(copy)


def part_bytes(folder: Path, key: str) -> tuple[Path, int]:
    """The file of a tensor's first part, and a position inside its values."""
    part = StoredTensors(folder).tensors[key].parts[0]
    return folder / part.file, part.position + part.length // 2


@pytest.mark.parametrize("check", [True, False])
@pytest.mark.parametrize("damage", ["flipped", "truncated", "missing"])
def test_a_damaged_file_is_named_with_its_tensor(
    damage: str, check: bool, checkpoint_of: MakeCheckpoint, tmp_path: Path
) -> None:
    folder = shutil.copytree(checkpoint_of(*GQA), tmp_path / "iter_0000000")
    name = "output_layer.weight"
    path, position = part_bytes(folder, name)
    content = bytearray(path.read_bytes())
    if damage == "flipped":
        content[position] ^= 1
        path.write_bytes(content)
    elif damage == "truncated":
        path.write_bytes(content[:position])
    else:
        path.unlink()
    with pytest.raises(CheckpointError) as caught:
        MegatronSource(folder, check=check).read(name)
    assert str(path) in str(caught.value)
    assert check == ("is not what was saved" in str(caught.value))
    assert (damage != "missing") == (name in str(caught.value))
    if damage == "flipped" and not check:
        # The damaged tensor is not in the way of the others.
        MegatronSource(folder, check=False).read("embedding.word_embeddings.weight")


def change_record(folder: Path, section: str, name: str, value: object) -> None:
    """Change an option in the record, as nobody should."""
    record = json.loads((folder / RECORD).read_text())
    record["config"][section][name] = value
    (folder / RECORD).write_text(json.dumps(record))
    write_checksums(folder, digest_files(folder, read_checksums(folder)))


def test_a_record_that_contradicts_its_numbers_or_its_tensors_is_refused(
    checkpoint_of: MakeCheckpoint, tmp_path: Path
) -> None:
    first = shutil.copytree(checkpoint_of(*GQA), tmp_path / "a" / "iter_0000000")
    change_record(first, "parameterization", "embedding_multiplier", 4.0)
    with pytest.raises(CheckpointError, match=r"embedding multiplier was 2\.5, now 4\.0"):
        MegatronSource(first)
    change_record(first, "model", "nonsense", 1)
    with pytest.raises(CheckpointError, match=r"unknown key 'model\.nonsense'"):
        MegatronSource(first)


def test_a_tensor_that_is_missing_or_of_another_shape_is_named(
    checkpoint_of: MakeCheckpoint, tmp_path: Path
) -> None:
    bias = "decoder.layers.0.mlp.linear_fc2.bias"
    plain, biased = checkpoint_of("norm_gain=vector"), checkpoint_of(*BIASES)
    for record, tensors, name, message in (
        (biased, plain, bias, r"has no tensor decoder\.layers\.mlp\.linear_fc2\.bias"),
        (
            checkpoint_of(*GQA),
            plain,
            "decoder.layers.0.mlp.linear_fc1.weight.up",
            r"linear_fc1\.weight has shape \[2, 256, 64\], but .* needs \[2, 192, 64\]",
        ),
    ):
        folder = tmp_path / name / "iter_0000000"
        shutil.copytree(tensors, folder)
        shutil.copy(record / RECORD, folder / RECORD)
        write_checksums(folder, digest_files(folder, read_checksums(folder)))
        with pytest.raises(CheckpointError, match=message):
            MegatronSource(folder).read(name)
    with pytest.raises(CheckpointError, match="has no tensor nonsense"):
        MegatronSource(plain).read("nonsense")
