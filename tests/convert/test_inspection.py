"""A checkpoint is told without reading its weights, and whether it is whole."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import GraniteConfig, GraniteForCausalLM

from megatron_mup.convert.inspection import TensorGroup, inspect_checkpoint
from megatron_mup.convert.inspection_report import inspection_text, readable_bytes
from megatron_mup.convert.megatron_source import MegatronSource
from megatron_mup.convert.megatron_target import write_megatron
from megatron_mup.convert.stored_tensors import StoredTensors
from megatron_mup.errors import CheckpointError
from tests.convert.small_checkpoints import GQA, PAPER, MakeCheckpoint

LAYER = "decoder.layers."


def test_a_run_is_told_with_its_model_multipliers_and_tensors(
    checkpoint_of: MakeCheckpoint,
) -> None:
    found = inspect_checkpoint(checkpoint_of(*GQA, "bf16=true", steps=2).parent)
    assert (found.kind, found.iteration, found.problems) == ("megatron_mup", 2, ())
    # Two layers of 128x64 + 64x64 + 192x64 + 64x96 weights and two gains, one gain, two of 96x64.
    assert found.parameters == 2 * (8192 + 4096 + 12288 + 6144 + 128) + 64 + 2 * 6144
    assert found.model["num_query_groups"] == 2
    assert found.multipliers == {
        "embedding": 2.5,
        "attention": 0.0625,
        "residual": 0.3,
        "logit": 1.7,
    }
    assert found.parameterization["name"] == "mup"
    assert found.layout["tensor_model_parallel_size"] == 1
    assert found.optimizer == {"name": "adam", "state": ["exp_avg", "exp_avg_sq", "fp32_param"]}
    assert found.dtypes == ("bfloat16",)
    groups = {group.name: group for group in found.groups}
    assert groups[f"{LAYER}self_attention.linear_qkv.weight"] == TensorGroup(
        name=f"{LAYER}self_attention.linear_qkv.weight",
        role="query+key+value",
        count=2,
        shape=(128, 64),
        dtype="bfloat16",
        nbytes=2 * 128 * 64 * 2,
    )
    moment = groups[f"optimizer.state.exp_avg.{LAYER}mlp.linear_fc2.weight"]
    assert (moment.role, moment.count, moment.dtype) == ("optimizer exp_avg", 2, "float32")
    # 2 bytes of weight, 4 of main weight and 8 of moments.
    assert found.nbytes == 14 * found.parameters
    assert json.loads(json.dumps(found.to_json()))["nbytes"] == found.nbytes


def test_converted_weights_have_no_optimizer_and_tell_their_origin(
    checkpoint_of: MakeCheckpoint, tmp_path: Path
) -> None:
    source = MegatronSource(checkpoint_of(*PAPER))
    found = inspect_checkpoint(write_megatron(source, tmp_path, run=source.run), check=True)
    assert found.optimizer == {}
    assert found.checked == "sha256"
    assert found.provenance["converted_from"] == str(source.folder)
    # The gains that nobody learns.
    others = {group.name for group in found.groups if group.role == "other"}
    assert "decoder.final_layernorm.weight" in others


def test_the_text_names_everything_once(checkpoint_of: MakeCheckpoint) -> None:
    lines = inspection_text(inspect_checkpoint(checkpoint_of(*GQA))).splitlines()
    assert any(line.split() == ["iteration", "0"] for line in lines)
    (row,) = [line for line in lines if line.startswith("embedding.word_embeddings.weight")]
    assert row.split() == [
        "embedding.word_embeddings.weight",
        "embedding",
        "1",
        "96x64",
        "float32",
        "24.0",
        "KiB",
    ]
    assert lines[-1] == (
        "complete: every file has its size; contents were not compared (pass --check to compare "
        "them)"
    )
    assert [readable_bytes(n) for n in (0, 1023, 1536, 3 << 30)] == [
        "0 B",
        "1023 B",
        "1.5 KiB",
        "3.0 GiB",
    ]


@pytest.mark.parametrize("damage", ["flipped", "cut", "missing"])
def test_damage_is_told_and_not_raised(
    damage: str, checkpoint_of: MakeCheckpoint, tmp_path: Path
) -> None:
    folder = shutil.copytree(checkpoint_of(*GQA), tmp_path / "iter_0000000")
    path = folder / "__0_0.distcp"
    content = bytearray(path.read_bytes())
    if damage == "missing":
        # Next to the one that holds the plain values, without which nothing can be told.
        path = folder / "metadata.json"
        path.unlink()
    elif damage == "flipped":
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
        assert inspect_checkpoint(folder).problems == ()
    else:
        path.write_bytes(content[:-100])
    (problem,) = inspect_checkpoint(folder, check=damage == "flipped").problems
    assert str(path) in problem
    assert (damage == "flipped") == ("Damaged in it: " in problem)
    text = inspection_text(inspect_checkpoint(folder, check=True))
    assert text.splitlines()[-1].startswith(f"damaged: {path}")


def test_a_checkpoint_without_an_iteration_is_told(
    checkpoint_of: MakeCheckpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(StoredTensors, "read_object", lambda *_: {"args": None})
    found = inspect_checkpoint(checkpoint_of(*GQA))
    assert found.iteration is None
    assert "names no iteration" in found.problems[0]


@pytest.fixture
def granite(tmp_path: Path) -> Path:
    """A Granite model of two layers and two files, without any of this package's code."""
    config = GraniteConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
        embedding_multiplier=12.0,
        attention_multiplier=0.25,
        residual_multiplier=0.5,
        logits_scaling=8.0,
    )
    model: Any = GraniteForCausalLM(config)
    model.to(torch.bfloat16).save_pretrained(tmp_path / "granite", max_shard_size="4KB")
    return tmp_path / "granite"


def test_a_folder_for_transformers_is_told_by_its_headers(granite: Path) -> None:
    found = inspect_checkpoint(granite)
    assert (found.kind, found.iteration, found.problems) == ("granite", None, ())
    assert found.multipliers == {
        "embedding": 12.0,
        "attention": 0.25,
        "residual": 0.5,
        "logit": 0.125,
    }
    groups = {group.name: group for group in found.groups}
    # Embedding, final norm, and in each layer seven matrices and two norms.
    assert len(groups) == 11
    assert groups["model.embed_tokens.weight"] == TensorGroup(
        name="model.embed_tokens.weight",
        role="embedding",
        count=1,
        shape=(32, 16),
        dtype="bfloat16",
        nbytes=1024,
    )
    assert groups["model.layers.*.self_attn.k_proj.weight"] == TensorGroup(
        name="model.layers.*.self_attn.k_proj.weight",
        role="key",
        count=2,
        shape=(8, 16),
        dtype="bfloat16",
        nbytes=512,
    )
    assert inspection_text(found).splitlines()[-1] == (
        "complete: every tensor of config.json is there; contents were not compared (pass --check "
        "to compare them)"
    )


def test_faults_of_a_folder_for_transformers_are_told_and_not_raised(granite: Path) -> None:
    path = sorted(granite.glob("*.safetensors"))[0]
    whole, tensors = path.read_bytes(), load_file(path)
    path.write_bytes(whole[:-1])
    cut = inspect_checkpoint(granite)
    assert f"{path} is cut" in cut.problems[0]
    # What the other files hold is told all the same.
    assert cut.groups
    path.unlink()
    problems = inspect_checkpoint(granite).problems
    assert str(path) in problems[0]
    assert "lacks the tensors model.embed_tokens.weight" in problems[1]
    tensors["model.embed_tokens.weight"] = torch.zeros(31, 16)
    save_file(tensors, path)
    (problem,) = inspect_checkpoint(granite).problems
    assert "model.embed_tokens.weight has shape [31, 16] and config.json asks for [32, 16]" in (
        problem
    )


def test_a_tensor_that_neither_files_nor_index_name_is_missing(granite: Path) -> None:
    index = granite / "model.safetensors.index.json"
    weight_map = json.loads(index.read_text())["weight_map"]
    name = "model.layers.1.mlp.up_proj.weight"
    path = granite / weight_map.pop(name)
    tensors = load_file(path)
    del tensors[name]
    save_file(tensors, path)
    index.write_text(json.dumps({"weight_map": weight_map}))
    (problem,) = inspect_checkpoint(granite).problems
    assert f"lacks the tensors {name}, which its config.json asks for" in problem
    index.unlink()
    assert "has neither model.safetensors nor" in inspect_checkpoint(granite).problems[0]


def test_checking_a_folder_for_transformers_reads_its_tensors(granite: Path) -> None:
    checked = inspect_checkpoint(granite, check=True)
    assert (checked.problems, checked.checked) == ((), "values")
    assert inspection_text(checked).splitlines()[-1].startswith("readable: every tensor of config")
    path = sorted(granite.glob("*.safetensors"))[0]
    tensors = load_file(path)
    tensors["model.embed_tokens.weight"][3, 4] = torch.nan
    save_file(tensors, path)
    assert inspect_checkpoint(granite).problems == ()
    (problem,) = inspect_checkpoint(granite, check=True).problems
    assert problem == f"{path}: model.embed_tokens.weight is not finite."


def test_anything_else_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="holds no checkpoint"):
        inspect_checkpoint(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(CheckpointError, match=r"config\.json is damaged: it is no JSON object"):
        inspect_checkpoint(tmp_path)
