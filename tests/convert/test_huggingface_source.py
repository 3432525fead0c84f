"""Hugging Face folders are read exactly or refused with file and tensor."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import GraniteConfig, GraniteForCausalLM, LlamaConfig, LlamaForCausalLM

from megatron_mup.config import Activation
from megatron_mup.convert.formats import HfFormat
from megatron_mup.convert.huggingface_source import HuggingFaceSource
from megatron_mup.convert.huggingface_target import write_huggingface
from megatron_mup.convert.safetensors_shards import SafetensorsFile
from megatron_mup.convert.transformers_forward import ExportedFolder
from megatron_mup.errors import CheckpointError
from megatron_mup.parameterization.roles import NormGain
from tests.convert.memory_weights import in_memory, random_weights, small_model
from tests.convert.plain_folders import edit_config
from tests.convert.plain_forward import PlainModel

TOKENS = torch.randint(0, 90, (2, 24), generator=torch.Generator().manual_seed(5))
_SIZES: dict[str, Any] = {
    "vocab_size": 90,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 24,
    "rope_parameters": {"rope_type": "default", "rope_theta": 700.0},
}
_GRANITE = {
    "embedding_multiplier": 3.1,
    "attention_multiplier": 0.2,
    "residual_multiplier": 0.7,
    "logits_scaling": 1.7,
}


def exported(folder: Path, **options: Any) -> Path:
    """A Llama of one file, made by this package."""
    write_huggingface(random_weights(small_model()), folder, hf_format=HfFormat.LLAMA, **options)
    return folder


def edit_tensors(folder: Path, edit: Callable[[dict[str, Tensor]], None]) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path)


@pytest.mark.parametrize(
    "options",
    [
        {"num_key_value_heads": 4},
        {"num_key_value_heads": 2, "tie_word_embeddings": True},
        {"num_key_value_heads": 1, "attention_bias": True, "mlp_bias": True},
        {"num_key_value_heads": 2, "head_dim": 12},
    ],
)
@pytest.mark.parametrize("kind", ["llama", "granite"])
def test_a_folder_of_transformers_gives_the_logprobs_of_transformers(
    tmp_path: Path, kind: str, options: dict[str, Any]
) -> None:
    torch.manual_seed(3)
    model: Any
    if kind == "llama":
        model = LlamaForCausalLM(LlamaConfig(**_SIZES, **options))
    else:
        model = GraniteForCausalLM(GraniteConfig(**_SIZES, **_GRANITE, **options))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
        expected = model(TOKENS).logits.double().log_softmax(-1)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert (tmp_path / "model.safetensors.index.json").exists()
    found = PlainModel(in_memory(HuggingFaceSource(tmp_path))).logprobs(TOKENS)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "options", [{}, {"untie_embeddings_and_output_weights": False, "add_bias_linear": True}]
)
def test_a_round_trip_through_granite_changes_no_bit(
    tmp_path: Path, options: dict[str, Any]
) -> None:
    source = random_weights(small_model(**options))
    write_huggingface(source, tmp_path / "out", hf_format=HfFormat.GRANITE, max_shard_bytes=20_000)
    found = HuggingFaceSource(tmp_path / "out")
    assert found.multipliers.embedding == 3.1
    assert found.multipliers.logit == pytest.approx(0.3, rel=1e-15)
    for name, values in source.tensors.items():
        assert torch.equal(found.read(name), values), name


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_round_trip_in_half_precision_is_one_cast(tmp_path: Path, dtype: str) -> None:
    source = random_weights(small_model())
    write_huggingface(source, tmp_path / "out", hf_format=HfFormat.GRANITE, dtype=dtype)
    found = HuggingFaceSource(tmp_path / "out")
    for name, values in source.tensors.items():
        read = found.read(name)
        # As it is stored: in half of fp32's memory.
        assert read.dtype is getattr(torch, dtype)
        assert torch.equal(read, values.to(read.dtype))


@pytest.mark.parametrize(
    "options", [{}, {"untie_embeddings_and_output_weights": False, "norm_gain": NormGain.NONE}]
)
def test_a_round_trip_through_llama_is_the_same_function(
    tmp_path: Path, options: dict[str, Any]
) -> None:
    source = random_weights(small_model(**options))
    write_huggingface(source, tmp_path / "out", hf_format=HfFormat.LLAMA)
    found = in_memory(HuggingFaceSource(tmp_path / "out"))
    assert found.multipliers.embedding == 1.0
    torch.testing.assert_close(
        PlainModel(found).logprobs(TOKENS),
        PlainModel(source).logprobs(TOKENS),
        rtol=0,
        atol=3e-6,
    )


def test_a_round_trip_through_the_own_format_changes_no_bit(tmp_path: Path) -> None:
    model = small_model(
        activation=Activation.SQUARED_RELU,
        norm_gain=NormGain.NONE,
        embedding_norm=True,
        unembedding_bias=True,
    )
    source = random_weights(model)
    write_huggingface(source, tmp_path / "out", hf_format=HfFormat.MEGATRON_MUP)
    found = HuggingFaceSource(tmp_path / "out")
    assert found.multipliers == source.multipliers
    assert (found.model.shape, found.model.activation) == (model.shape, model.activation)
    for name, values in source.tensors.items():
        assert torch.equal(found.read(name), values), name


def test_a_tied_readout_that_was_written_all_the_same_must_be_the_embedding(
    tmp_path: Path,
) -> None:
    model = small_model(untie_embeddings_and_output_weights=False)
    write_huggingface(random_weights(model), tmp_path / "out", hf_format=HfFormat.LLAMA)

    def add(tensors: dict[str, Tensor]) -> None:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()

    def spoil(tensors: dict[str, Tensor]) -> None:
        tensors["lm_head.weight"][4, 5] += 1e-3

    edit_tensors(tmp_path / "out", add)
    HuggingFaceSource(tmp_path / "out")
    edit_tensors(tmp_path / "out", spoil)
    with pytest.raises(CheckpointError, match=r"lm_head.weight differs from model.embed_tokens"):
        HuggingFaceSource(tmp_path / "out")


def test_frequencies_that_old_versions_saved_are_passed_over(tmp_path: Path) -> None:
    folder = exported(tmp_path / "out")
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    edit_tensors(folder, lambda tensors: tensors.update({name: torch.ones(4)}))
    HuggingFaceSource(folder)


def _remove(name: str) -> Callable[[dict[str, Tensor]], None]:
    return lambda tensors: tensors.__delitem__(name)


def _put(name: str, values: Tensor) -> Callable[[dict[str, Tensor]], None]:
    return lambda tensors: tensors.__setitem__(name, values)


_NORM = "model.layers.1.input_layernorm.weight"


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (_remove(_NORM), f"lacks the tensors {_NORM}, which its config.json"),
        (_put("model.layers.0.mlp.extra.weight", torch.ones(3)), r"mlp.extra.weight \(model.safe"),
        (_put(_NORM, torch.ones(31)), rf"model.safetensors: tensor {_NORM} has shape \(31,\)"),
        (_put(_NORM, torch.ones(32, dtype=torch.float64)), f"tensor {_NORM} is F64"),
    ],
)
def test_a_missing_surplus_or_wrong_tensor_is_named(
    tmp_path: Path, edit: Callable[[dict[str, Tensor]], None], message: str
) -> None:
    folder = exported(tmp_path / "out")
    edit_tensors(folder, edit)
    with pytest.raises(CheckpointError, match=message):
        HuggingFaceSource(folder)


def test_a_tensor_that_is_not_finite_is_named_when_it_is_read(tmp_path: Path) -> None:
    folder = exported(tmp_path / "out")
    edit_tensors(folder, _put(_NORM, torch.full((32,), torch.nan)))
    source = HuggingFaceSource(folder)
    with pytest.raises(CheckpointError, match=f"model.safetensors: tensor {_NORM} is not finite"):
        source.read("decoder.layers.1.input_layernorm.weight")


def test_a_cut_file_is_named_with_the_tensor_that_it_cuts(tmp_path: Path) -> None:
    folder = exported(tmp_path / "out")
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=r"model.safetensors is cut: tensor lm_head.weight"):
        HuggingFaceSource(folder)


@pytest.mark.parametrize("contents", [b"", b"12345678{}", b"\x02" + bytes(7) + b"[]", bytes(100)])
def test_a_file_that_is_no_safetensors_file_is_named(tmp_path: Path, contents: bytes) -> None:
    folder = exported(tmp_path / "out")
    (folder / "model.safetensors").write_bytes(contents)
    with pytest.raises(CheckpointError, match=r"model.safetensors is damaged"):
        HuggingFaceSource(folder)


def test_a_header_with_a_hole_in_the_data_is_named(tmp_path: Path) -> None:
    header = b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}}'
    path = tmp_path / "model.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))
    with pytest.raises(CheckpointError, match=r"safetensors is damaged: a is not where it should"):
        SafetensorsFile(path)


def safetensors(path: Path, header: str, data: bytes) -> Path:
    path.write_bytes(len(header).to_bytes(8, "little") + header.encode() + data)
    return path


def test_a_header_whose_shape_is_not_its_bytes_is_named_before_memory_is_asked_for(
    tmp_path: Path,
) -> None:
    header = '{"a":{"dtype":"F32","shape":[1000000000000,1000000],"data_offsets":[0,8]}}'
    path = safetensors(tmp_path / "model.safetensors", header, bytes(8))
    with pytest.raises(CheckpointError, match=r"is damaged .*a: 8 bytes are no F32 of shape \[10"):
        SafetensorsFile(path)


def test_bytes_after_the_last_tensor_are_damage(tmp_path: Path) -> None:
    header = (
        '{"b":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},'
        '"a":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}'
    )
    path = safetensors(tmp_path / "model.safetensors", header, bytes(4))
    assert SafetensorsFile(path).read("a").shape == (0,)
    safetensors(path, header, bytes(7))
    with pytest.raises(CheckpointError, match=r"is damaged: 3 bytes follow its last tensor"):
        SafetensorsFile(path)


def test_brackets_without_end_are_damage(tmp_path: Path) -> None:
    folder = exported(tmp_path / "out")
    safetensors(folder / "model.safetensors", '{"a":' + "[" * 100_000, b"")
    with pytest.raises(CheckpointError, match=r"model.safetensors is damaged"):
        HuggingFaceSource(folder)
    (folder / "config.json").write_text("[" * 100_000)
    with pytest.raises(CheckpointError, match=r"config.json is damaged"):
        HuggingFaceSource(folder)


def test_a_single_file_counts_before_an_index(tmp_path: Path) -> None:
    folder = exported(tmp_path / "out")
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "nowhere"}}')
    HuggingFaceSource(folder)
    ExportedFolder(folder)


def test_a_tensor_that_the_model_has_not_is_refused_by_name(tmp_path: Path) -> None:
    source = HuggingFaceSource(exported(tmp_path / "out"))
    with pytest.raises(CheckpointError, match=r"out has no tensor decoder\.nonsense"):
        source.read("decoder.nonsense")


def test_a_missing_shard_and_a_wrong_index_are_named(tmp_path: Path) -> None:
    folder = exported(tmp_path / "out", max_shard_bytes=30_000)
    index = folder / "model.safetensors.index.json"
    text = index.read_text()
    index.write_text(text.replace("model.norm.weight", "model.norm.bias"))
    with pytest.raises(CheckpointError, match=r"has no tensor model.norm.bias"):
        HuggingFaceSource(folder)
    index.write_text(text.replace("model-00001-of", "../model-00001-of"))
    with pytest.raises(CheckpointError, match=r"index.json is damaged"):
        HuggingFaceSource(folder)
    index.write_text(text)
    (folder / "model-00002-of-00004.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"cannot read .*model-00002-of-00004.safetensors"):
        HuggingFaceSource(folder)


def test_pickled_weights_are_refused_with_the_cure(tmp_path: Path) -> None:
    folder = exported(tmp_path / "out")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"pytorch_model.bin .*save_pretrained"):
        HuggingFaceSource(folder)


def test_a_folder_without_weights_or_config_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"cannot read .*config.json: No such file"):
        HuggingFaceSource(tmp_path)
    folder = exported(tmp_path / "out")
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"has neither model.safetensors nor"):
        HuggingFaceSource(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"config.json is damaged"):
        HuggingFaceSource(folder)


def test_a_config_that_does_not_fit_names_its_file(tmp_path: Path) -> None:
    folder = exported(tmp_path / "out")
    edit_config(folder, hidden_act="relu")
    with pytest.raises(CheckpointError, match=r"out/config.json: hidden_act is 'relu'"):
        HuggingFaceSource(folder)
