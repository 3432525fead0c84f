"""Exports compute the source's function in transformers, and are the files that people expect."""

from __future__ import annotations

import hashlib
import json
import math
import threading
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor
from transformers import AutoModelForCausalLM

from megatron_mup.config import Activation
from megatron_mup.convert.formats import HfFormat
from megatron_mup.convert.huggingface_target import HfExport, write_huggingface
from megatron_mup.convert.safetensors_shards import Entry, _read_ahead, write_file
from megatron_mup.errors import CheckpointError
from megatron_mup.parameterization.evaluation import Multipliers
from megatron_mup.parameterization.roles import NormGain
from tests.convert.memory_weights import MemoryWeights, random_weights, small_model
from tests.convert.plain_forward import PlainModel

TOKENS = torch.randint(0, 96, (2, 24), generator=torch.Generator().manual_seed(5))

MODELS: dict[str, dict[str, Any]] = {
    "multi-head": {"num_query_groups": None},
    "grouped": {},
    "multi-query, no gains": {"num_query_groups": 1, "norm_gain": NormGain.NONE},
    "tied": {"untie_embeddings_and_output_weights": False},
    "tied, no gains": {
        "untie_embeddings_and_output_weights": False,
        "norm_gain": NormGain.NONE,
    },
    "tied, scalar gains": {
        "untie_embeddings_and_output_weights": False,
        "norm_gain": NormGain.SCALAR,
    },
    "biases": {"add_bias_linear": True},
    "wide heads": {"kv_channels": 12, "num_layers": 1},
}
OWN_MODELS: dict[str, dict[str, Any]] = {
    "relu, no gains": {"activation": Activation.RELU, "norm_gain": NormGain.NONE},
    "squared relu, everything": {
        "activation": Activation.SQUARED_RELU,
        "embedding_norm": True,
        "unembedding_bias": True,
        "add_bias_linear": True,
        "rotary_percent": 0.5,
        "norm_gain": NormGain.SCALAR,
    },
    "gelu, tied": {
        "activation": Activation.GELU,
        "untie_embeddings_and_output_weights": False,
    },
    "swiglu": {},
}


def export(source: MemoryWeights, folder: Path, hf_format: HfFormat, **options: Any) -> HfExport:
    return write_huggingface(source, folder, hf_format=hf_format, **options)


def loaded_logprobs(folder: Path, dtype: torch.dtype = torch.float32) -> Tensor:
    model, report = AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, output_loading_info=True, trust_remote_code=True
    )
    assert not any(report.values()), report
    with torch.no_grad():
        return model(TOKENS).logits.double().log_softmax(-1)


def tensors_of(folder: Path) -> dict[str, Tensor]:
    """Every tensor of a folder, by the safetensors library."""
    tensors = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            tensors.update({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
    return tensors


def assert_same_function(source: MemoryWeights, folder: Path) -> None:
    expected = PlainModel(source).logprobs(TOKENS)
    # Where the source would say so little that any mistake fits, nothing is compared.
    assert expected.std() > 0.1
    torch.testing.assert_close(loaded_logprobs(folder), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("hf_format", [HfFormat.LLAMA, HfFormat.GRANITE])
@pytest.mark.parametrize("options", MODELS.values(), ids=MODELS)
def test_an_export_gives_the_logprobs_of_the_source(
    tmp_path: Path, options: dict[str, Any], hf_format: HfFormat
) -> None:
    source = random_weights(small_model(**options))
    export(source, tmp_path / "out", hf_format)
    assert_same_function(source, tmp_path / "out")


@pytest.mark.usefixtures("own_modules")
@pytest.mark.parametrize("options", OWN_MODELS.values(), ids=OWN_MODELS)
def test_any_architecture_loads_with_the_code_beside_its_weights(
    tmp_path: Path, options: dict[str, Any]
) -> None:
    source = random_weights(small_model(**options))
    export(source, tmp_path / "out", HfFormat.MEGATRON_MUP)
    assert_same_function(source, tmp_path / "out")


def test_granite_holds_the_weights_unchanged(tmp_path: Path) -> None:
    source = random_weights(small_model())
    export(source, tmp_path / "out", HfFormat.GRANITE)
    found, layer = tensors_of(tmp_path / "out"), "model.layers.1.self_attn.q_proj.weight"
    assert torch.equal(
        found[layer], source.tensors["decoder.layers.1.self_attention.linear_qkv.weight.query"]
    )
    assert torch.equal(found["lm_head.weight"], source.tensors["output_layer.weight"])


def test_folding_powers_of_two_into_llama_is_exact_in_bf16(tmp_path: Path) -> None:
    # Heads of 16 have the plain scale 1/4, and 1/16 is a quarter of it.
    model = small_model(num_attention_heads=2, num_query_groups=1)
    multipliers = Multipliers(embedding=4.0, attention=1 / 16, residual=0.5, logit=0.125)
    source = random_weights(model, multipliers)
    source.tensors = {name: t.bfloat16().float() for name, t in source.tensors.items()}
    export(source, tmp_path / "out", HfFormat.LLAMA, dtype="bfloat16")
    found = tensors_of(tmp_path / "out")
    layer = "decoder.layers.0"
    for name, logical, factor in [
        ("model.embed_tokens.weight", "embedding.word_embeddings.weight", 4.0),
        (
            "model.layers.0.self_attn.q_proj.weight",
            f"{layer}.self_attention.linear_qkv.weight.query",
            0.25,
        ),
        (
            "model.layers.0.self_attn.k_proj.weight",
            f"{layer}.self_attention.linear_qkv.weight.key",
            1.0,
        ),
        (
            "model.layers.0.self_attn.o_proj.weight",
            f"{layer}.self_attention.linear_proj.weight",
            0.5,
        ),
        ("model.layers.0.mlp.down_proj.weight", f"{layer}.mlp.linear_fc2.weight", 0.5),
        ("lm_head.weight", "output_layer.weight", 0.125),
        ("model.norm.weight", "decoder.final_layernorm.weight", 1.0),
    ]:
        assert found[name].dtype is torch.bfloat16
        assert torch.equal(found[name].float() / factor, source.tensors[logical]), name


@pytest.mark.parametrize("head_dim", [8, 24, 32, 48, 96, 128])
def test_a_standard_model_is_not_said_to_be_folded(tmp_path: Path, head_dim: int) -> None:
    # 1/sqrt(D) and D**-0.5 differ in their last bit for these.
    plain = Multipliers(embedding=1.0, attention=1 / math.sqrt(head_dim), residual=1.0, logit=1.0)
    source = random_weights(small_model(kv_channels=head_dim, num_layers=1), plain)
    assert not export(source, tmp_path / "plain", HfFormat.LLAMA).folded
    source.multipliers = replace(plain, attention=1 / head_dim)
    assert export(source, tmp_path / "folded", HfFormat.LLAMA).folded
    assert not export(source, tmp_path / "native", HfFormat.GRANITE).folded


def test_the_cast_comes_after_the_folding(tmp_path: Path) -> None:
    source = random_weights(small_model())
    export(source, tmp_path / "out", HfFormat.LLAMA, dtype="bfloat16")
    found = tensors_of(tmp_path / "out")["lm_head.weight"]
    assert torch.equal(found, (source.tensors["output_layer.weight"] * 0.3).bfloat16())


def test_gains_that_were_not_learned_are_ones_and_scalars_are_spread(tmp_path: Path) -> None:
    export(random_weights(small_model(norm_gain=NormGain.NONE)), tmp_path / "a", HfFormat.GRANITE)
    assert torch.equal(tensors_of(tmp_path / "a")["model.norm.weight"], torch.ones(32))
    source = random_weights(small_model(norm_gain=NormGain.SCALAR))
    export(source, tmp_path / "b", HfFormat.GRANITE)
    gain = source.tensors["decoder.layers.0.pre_mlp_layernorm.weight"]
    found = tensors_of(tmp_path / "b")["model.layers.0.post_attention_layernorm.weight"]
    assert torch.equal(found, gain * torch.ones(32))


def test_a_tied_model_has_no_readout_of_its_own(tmp_path: Path) -> None:
    source = random_weights(small_model(untie_embeddings_and_output_weights=False))
    export(source, tmp_path / "out", HfFormat.LLAMA)
    assert "lm_head.weight" not in tensors_of(tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"]


def test_shards_stay_below_their_size_and_the_index_finds_every_tensor(tmp_path: Path) -> None:
    source, folder = random_weights(small_model()), tmp_path / "out"
    made = export(source, folder, HfFormat.LLAMA, max_shard_bytes=20_000)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert len(made.files) > 2
    assert sorted(set(index["weight_map"].values())) == sorted(made.files)
    assert made.files[0] == f"model-00001-of-0000{len(made.files)}.safetensors"
    for name in made.files:
        with safe_open(folder / name, framework="pt") as file:
            sizes = [file.get_tensor(key).nbytes for key in file.keys()]  # noqa: SIM118
            assert all(index["weight_map"][key] == name for key in file.keys())  # noqa: SIM118
        assert sum(sizes) <= 20_000
    assert index["metadata"]["total_size"] == made.weight_bytes == made.elements * 4
    assert_same_function(source, folder)


def test_a_small_model_is_one_file_beside_config_generation_config_and_card(tmp_path: Path) -> None:
    ids = {"bos_token_id": None, "eos_token_id": 3}
    made = export(random_weights(small_model()), tmp_path / "out", HfFormat.LLAMA, token_ids=ids)
    assert made.files == ("model.safetensors",)
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {
        "README.md",
        "checksums.json",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tensor_checksums.json",
    }
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text()) == {
        "eos_token_id": 3
    }
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["bos_token_id"], config["eos_token_id"]) == (None, 3)


def test_an_export_generates(tmp_path: Path) -> None:
    source = random_weights(small_model())
    export(source, tmp_path / "out", HfFormat.GRANITE, token_ids={"eos_token_id": 95})
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    ids = model.generate(TOKENS[:1, :4], max_new_tokens=6, do_sample=False, eos_token_id=None)
    for position in range(4, 10):
        logprobs = PlainModel(source).logprobs(ids[:, :position])
        assert ids[0, position] == logprobs[0, -1].argmax()


def test_a_float16_overflow_names_the_tensor(tmp_path: Path) -> None:
    source = random_weights(small_model())
    source.tensors["output_layer.weight"][5, 7] = -70_000.0
    message = r"output_layer.weight \(lm_head.weight\) .* reach 70000, which float16"
    with pytest.raises(CheckpointError, match=message):
        export(source, tmp_path / "out", HfFormat.GRANITE, dtype="float16")
    assert list(tmp_path.iterdir()) == []
    export(source, tmp_path / "out", HfFormat.GRANITE, dtype="bfloat16")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_weights_that_are_not_finite_are_refused_unless_allowed(
    tmp_path: Path, value: float
) -> None:
    source = random_weights(small_model())
    source.tensors["decoder.layers.1.mlp.linear_fc2.weight"][3, 3] = value
    with pytest.raises(CheckpointError, match=r"layers.1.mlp.down_proj.weight.* not finite"):
        export(source, tmp_path / "out", HfFormat.GRANITE)
    assert list(tmp_path.iterdir()) == []
    export(source, tmp_path / "out", HfFormat.GRANITE, allow_non_finite=True)
    found = tensors_of(tmp_path / "out")["model.layers.1.mlp.down_proj.weight"][3, 3]
    assert not found.isfinite()


class CountedWeights(MemoryWeights):
    """Weights that know how many bytes of the tensors that were read are still held."""

    live_bytes = peak_bytes = 0

    def read(self, name: str) -> Tensor:
        values = super().read(name)
        self.live_bytes += values.nbytes
        self.peak_bytes = max(self.peak_bytes, self.live_bytes)
        weakref.finalize(values, self._released, values.nbytes)
        return values

    def _released(self, count: int) -> None:
        self.live_bytes -= count


@pytest.mark.parametrize("hf_format", [HfFormat.LLAMA, HfFormat.GRANITE])
def test_one_tensor_is_in_memory_at_a_time(tmp_path: Path, hf_format: HfFormat) -> None:
    whole = random_weights(small_model(num_layers=6))
    source = CountedWeights(whole.model, whole.multipliers, whole.tensors)
    made = export(source, tmp_path / "out", hf_format, dtype="bfloat16")
    largest = max(values.nbytes for values in whole.tensors.values())
    assert made.elements * 4 > 12 * largest
    assert source.peak_bytes <= 2 * largest
    assert source.live_bytes == 0


def test_progress_ends_at_the_bytes_of_all_weights(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    made = export(
        random_weights(small_model()),
        tmp_path / "out",
        HfFormat.LLAMA,
        dtype="bfloat16",
        progress=lambda done, total: seen.append((done, total)),
    )
    assert len(seen) == made.tensors
    assert seen[-1] == (made.weight_bytes, made.weight_bytes)
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)


def test_extra_files_are_there_when_the_folder_appears(tmp_path: Path) -> None:
    def add(folder: Path) -> None:
        assert not (tmp_path / "out").exists()
        (folder / "tokenizer_config.json").write_text("{}")

    export(random_weights(small_model()), tmp_path / "out", HfFormat.LLAMA, extra_files=add)
    assert (tmp_path / "out" / "tokenizer_config.json").exists()
    assert "AutoTokenizer" in (tmp_path / "out" / "README.md").read_text()


def test_an_export_lists_the_sha256_of_its_weights_and_their_index(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    export(random_weights(small_model()), folder, HfFormat.LLAMA, max_shard_bytes=20_000)
    listed = json.loads((folder / "checksums.json").read_text())["files"]
    weights = sorted(folder.glob("model*"))
    assert len(weights) > 3
    assert listed == {
        path.name: {
            "bytes": path.stat().st_size,
            "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        }
        for path in weights
    }


def test_the_next_tensor_is_read_while_one_is_held_and_no_more() -> None:
    entries = [Entry(name, (3,)) for name in "abcd"]
    read_begun = {name: threading.Event() for name in "abcd"}
    alive: list[weakref.ref[Tensor]] = []
    counts = []

    def read(name: str) -> Tensor:
        counts.append(sum(reference() is not None for reference in alive))
        values = torch.full((3,), float(ord(name)))
        alive.append(weakref.ref(values))
        read_begun[name].set()
        return values

    for (entry, values), following in zip(_read_ahead(entries, read), "bcd.", strict=True):
        assert values[0].item() == ord(entry.name)
        assert following == "." or read_begun[following].wait(60)
        assert len(counts) == min("abcd".index(entry.name) + 2, 4)
        del values
    assert max(counts) == 1


def test_a_tensor_that_cannot_be_read_ends_the_file(tmp_path: Path) -> None:
    entries = [Entry(name, (3,)) for name in "abcd"]
    with pytest.raises(CheckpointError, match="unreadable"):
        write_file(tmp_path / "g", entries, torch.float32, unreadable)


def unreadable(name: str) -> Tensor:
    if name == "c":
        raise CheckpointError("unreadable")
    return torch.ones(3)
