"""The code that lies beside exported weights computes what the model in training computes.

Megatron's model gets the weights of ``memory_weights`` by the layout of its fused parameters, which
is written out here: [G, (H/G + 2) * D, M] for QKV, gate over up.
"""

from __future__ import annotations

import ast
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from megatron_mup.config import Activation, ModelConfig
from megatron_mup.convert import remote_code
from megatron_mup.convert.remote_code import remote_model
from megatron_mup.model.gpt import construct, transformer_config
from megatron_mup.parameterization.roles import NormGain
from megatron_mup.training.processes import Launch, parallel_processes
from tests.configurations import tiny
from tests.convert.memory_weights import MemoryWeights, random_weights, small_model

FILES = Path(remote_code.__file__).parent
TOKENS = torch.randint(0, 90, (2, 24), generator=torch.Generator().manual_seed(5))

PLAIN: dict[str, Any] = {"activation": Activation.RELU, "norm_gain": NormGain.NONE}
MODELS: dict[str, dict[str, Any]] = {
    "paper": {**PLAIN, "num_query_groups": None, "ffn_hidden_size": None},
    "squared relu, one key head": {
        "activation": Activation.SQUARED_RELU,
        "norm_gain": NormGain.SCALAR,
        "num_query_groups": 1,
    },
    "gelu, biases": {
        "activation": Activation.GELU,
        "add_bias_linear": True,
        "unembedding_bias": True,
        "norm_gain": NormGain.SCALAR,
        "embedding_norm": True,
    },
    "swiglu, biases": {"add_bias_linear": True},
    "swiglu, wide heads": {"kv_channels": 12},
    "tied": {"untie_embeddings_and_output_weights": False, "unembedding_bias": True},
    "embedding norm": {**PLAIN, "embedding_norm": True, "norm_epsilon": 1e-2},
    "vector embedding norm": {"embedding_norm": True},
    "half rotated": {"rotary_percent": 0.5},
    # int(0.7 * 8) = 5 makes three pairs.
    "odd rotation": {"rotary_percent": 0.7},
}


def fused(weights: MemoryWeights, parameter: str) -> Tensor:
    """One parameter of Megatron from logical tensors."""
    tensors, shape = weights.tensors, weights.model.shape
    if parameter in tensors:
        return tensors[parameter]
    if "linear_fc1" in parameter:
        return torch.cat([tensors[f"{parameter}.{part}"] for part in ("gate", "up")])
    groups = []
    for group in range(shape.num_query_groups):
        for part in ("query", "key", "value"):
            rows = tensors[f"{parameter}.{part}"].chunk(shape.num_query_groups)
            groups.append(rows[group])
    return torch.cat(groups)


@contextmanager
def megatron_model(weights: MemoryWeights, dtype: torch.dtype) -> Iterator[torch.nn.Module]:
    """Megatron's model with these weights and multipliers."""
    bf16 = dtype is torch.bfloat16
    # Only precision and layout count here; SP has a rule for every model.
    run = replace(tiny("name=sp", f"bf16={bf16}"), model=weights.model)
    with parallel_processes(run, Launch()), torch.no_grad():
        config = transformer_config(run, weights.multipliers)
        model = construct(weights.model, config, weights.multipliers).to(dtype).eval()
        for name, parameter in model.named_parameters():
            parameter.copy_(fused(weights, name))
        yield model


def megatron_logits(weights: MemoryWeights, tokens: Tensor, dtype: torch.dtype) -> Tensor:
    """Logits [B, S, V] of Megatron's model."""
    positions = torch.arange(tokens.shape[1]).expand(tokens.shape[0], -1)
    with megatron_model(weights, dtype) as model:
        return model(tokens, positions, None)


def difference(logits: Tensor, reference: Tensor) -> float:
    """Largest difference relative to the logits' root mean square."""
    return float((logits - reference).abs().max() / reference.double().square().mean().sqrt())


@torch.no_grad()
def logits_of(model: Any, tokens: Tensor, **options: Any) -> Tensor:
    return model(tokens, **options).logits


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-13)], ids=["fp32", "fp64"]
)
def test_logits_are_those_of_the_model_in_training(
    name: str, dtype: torch.dtype, tolerance: float
) -> None:
    weights = random_weights(small_model(**MODELS[name]))
    logits = logits_of(remote_model(weights, dtype=dtype), TOKENS)
    reference = megatron_logits(weights, TOKENS, dtype)
    assert logits.shape == (2, 24, 96)
    assert difference(logits, reference) < tolerance


@pytest.mark.parametrize("name", ["paper", "swiglu, biases"])
def test_bf16_is_as_near_to_fp32_as_the_model_in_training_is(name: str) -> None:
    weights = random_weights(small_model(**MODELS[name]))
    exact = megatron_logits(weights, TOKENS, torch.float64)
    own = megatron_logits(weights, TOKENS, torch.bfloat16).double()
    logits = logits_of(remote_model(weights, dtype=torch.bfloat16), TOKENS).double()
    assert difference(logits, exact) < 1.5 * difference(own, exact)


@pytest.mark.parametrize("name", ["paper", "squared relu, one key head", "swiglu, biases"])
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_cache_and_implementation_of_attention_change_nothing(
    name: str, implementation: str
) -> None:
    model = remote_model(random_weights(small_model(**MODELS[name])), dtype=torch.float64)
    assert model.config._attn_implementation == "sdpa"
    whole = logits_of(model, TOKENS)
    model.set_attn_implementation(implementation)
    assert difference(logits_of(model, TOKENS), whole) < 1e-13
    cache, parts = None, []
    for start, stop in ((0, 9), (9, 10), (10, 11), (11, 24)):
        with torch.no_grad():
            output = model(TOKENS[:, start:stop], past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        parts.append(output.logits)
    assert difference(torch.cat(parts, dim=1), whole) < 1e-13
    assert difference(logits_of(model, TOKENS, logits_to_keep=1), whole[:, -1:]) < 1e-13


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_padding_on_the_left_changes_nothing(implementation: str) -> None:
    model = remote_model(random_weights(small_model()), dtype=torch.float64)
    model.set_attn_implementation(implementation)
    padded, mask = TOKENS.clone(), torch.ones_like(TOKENS)
    padded[1, :7], mask[1, :7] = 3, 0
    logits = logits_of(model, padded, attention_mask=mask)
    # Rotary positions are relative; what remains is that of angles in fp32.
    assert difference(logits[1:, 7:], logits_of(model, TOKENS[1:, 7:])) < 1e-5
    assert difference(logits[:1], logits_of(model, TOKENS[:1])) < 1e-13
    greedy = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 3}
    batch = model.generate(padded, attention_mask=mask, **greedy)
    alone = model.generate(TOKENS[1:, 7:], attention_mask=mask[1:, 7:], **greedy)
    assert batch[1, 24:].tolist() == alone[0, 17:].tolist()


def test_greedy_generation_takes_the_largest_logit_of_each_whole_forward_pass() -> None:
    weights = random_weights(small_model(**MODELS["gelu, biases"]))
    model = remote_model(weights)
    expected = TOKENS[:1, :4]
    for _ in range(12):
        logits = megatron_logits(weights, expected, torch.float32)
        expected = torch.cat([expected, logits[:, -1:].argmax(-1)], dim=1)
    made = model.generate(TOKENS[:1, :4], max_new_tokens=12, do_sample=False, pad_token_id=0)
    assert made.tolist() == expected.tolist()


def write_folder(weights: MemoryWeights, folder: Path) -> None:
    """What an export writes, with transformers' and safetensors' own means."""
    model = remote_model(weights)
    model.config.auto_map = {
        "AutoConfig": "configuration_megatron_mup.MegatronMupConfig",
        "AutoModelForCausalLM": "modeling_megatron_mup.MegatronMupForCausalLM",
    }
    folder.mkdir()
    values = {name: value.contiguous() for name, value in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        del values["lm_head.weight"]
    save_file(values, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(model.config.to_dict(), default=str))
    for path in FILES.glob("*_megatron_mup.py"):
        (folder / path.name).write_bytes(path.read_bytes())


@pytest.mark.usefixtures("own_modules")
@pytest.mark.parametrize("name", ["tied", "squared relu, one key head"])
def test_a_folder_loads_generates_and_is_saved_again_by_transformers(
    name: str, tmp_path: Path
) -> None:
    weights = random_weights(small_model(**MODELS[name]))
    write_folder(weights, tmp_path / "first")
    first = AutoModelForCausalLM.from_pretrained(tmp_path / "first", trust_remote_code=True)
    assert type(first).__module__.startswith("transformers_modules.")
    assert difference(logits_of(first, TOKENS), logits_of(remote_model(weights), TOKENS)) < 1e-6
    first.save_pretrained(tmp_path / "second")
    kept = {path.name for path in (tmp_path / "second").iterdir()}
    assert {"configuration_megatron_mup.py", "modeling_megatron_mup.py"} <= kept
    second = AutoModelForCausalLM.from_pretrained(tmp_path / "second", trust_remote_code=True)
    assert torch.equal(logits_of(second, TOKENS), logits_of(first, TOKENS))
    config = AutoConfig.from_pretrained(tmp_path / "second", trust_remote_code=True)
    assert config.logit_multiplier == 0.3
    assert config.tie_word_embeddings == (name == "tied")
    made = second.generate(TOKENS[:, :4], max_new_tokens=3, do_sample=False, pad_token_id=0)
    assert made.shape == (2, 7)


def test_a_configuration_without_an_attention_multiplier_is_refused() -> None:
    from megatron_mup.convert.remote_code.configuration_megatron_mup import MegatronMupConfig
    from megatron_mup.convert.remote_code.modeling_megatron_mup import MegatronMupForCausalLM

    with pytest.raises(ValueError, match="no attention_multiplier"):
        MegatronMupForCausalLM(MegatronMupConfig(num_hidden_layers=1))


def test_labels_give_the_mean_negative_log_probability_of_the_next_tokens() -> None:
    model = remote_model(random_weights(small_model()), dtype=torch.float64)
    with torch.no_grad():
        output = model(TOKENS, labels=TOKENS, output_hidden_states=True)
    chances = output.logits[:, :-1].log_softmax(-1).gather(-1, TOKENS[:, 1:, None])
    assert float(output.loss) == pytest.approx(-float(chances.mean()), rel=1e-6)
    assert len(output.hidden_states) == 3
    embedded = model.model.embed_tokens(TOKENS)
    torch.testing.assert_close(output.hidden_states[0], 3.1 * embedded)
    with torch.no_grad():
        assert torch.equal(model(inputs_embeds=embedded).logits, output.logits)


def test_the_files_beside_the_weights_need_only_torch_transformers_and_each_other() -> None:
    imported = set()
    for path in FILES.glob("*_megatron_mup.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                imported |= {alias.name.partition(".")[0] for alias in node.names}
            if isinstance(node, ast.ImportFrom):
                module = node.module or ""
                imported.add("." * node.level + (module if node.level else module.split(".")[0]))
    assert imported == {"torch", "transformers", "typing", ".configuration_megatron_mup"}


def parameter_count(model: ModelConfig) -> int:
    weights = random_weights(model)
    return sum(tensor.numel() for tensor in weights.tensors.values())


@pytest.mark.parametrize("name", MODELS)
def test_the_model_has_the_weights_of_the_source_and_no_others(name: str) -> None:
    model = remote_model(random_weights(small_model(**MODELS[name])))
    held = sum(parameter.numel() for parameter in model.parameters())
    assert held == parameter_count(small_model(**MODELS[name]))
    assert not list(model.buffers())
