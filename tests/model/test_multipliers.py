"""The four forward multipliers, observed in the built model rather than in its configuration.

Small model: M = 64, 4 heads of 16, 2 layers; each test watches activations between modules.
"""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.transformer.dot_product_attention import DotProductAttention
from torch import Tensor
from torch.nn import functional

from megatron_mup.config import RunConfig
from megatron_mup.errors import InstallationError, ParameterizationError
from megatron_mup.model.gpt import build_model, check_attention_scale
from megatron_mup.model.layer_specs import SdpaCoreAttention, layer_spec, scaled_bias_dropout_add
from megatron_mup.training.processes import Launch, parallel_processes
from tests.configurations import tiny
from tests.random_samples import RandomSamples

_TOKENS = torch.stack([RandomSamples(96, 16)[index]["tokens"] for index in range(2)])
_POSITIONS = torch.arange(16).expand(2, -1)


def watch(model: torch.nn.Module, *names: str) -> dict[str, tuple[Any, Any]]:
    """Record (inputs, output) of modules; earlier hooks' changes are seen, as by the module."""
    seen: dict[str, tuple[Any, Any]] = {}

    def record(name: str) -> Any:
        def hook(_module: torch.nn.Module, inputs: Any, output: Any) -> None:
            seen[name] = (inputs, output)

        return hook

    for name in names:
        model.get_submodule(name).register_forward_hook(record(name))
    return seen


def forward(run: RunConfig, *names: str) -> tuple[torch.nn.Module, dict[str, Any], Tensor]:
    """Build, watch and run the model; logits are [B, S, V]."""
    with parallel_processes(run, Launch()):
        model = build_model(run, run.table)
        seen = watch(model, *names)
        logits = model(_TOKENS, _POSITIONS, None)
    return model, seen, logits


def autograd_nodes(tensor: Tensor) -> int:
    """Number of operations behind a tensor."""
    waiting, seen = [tensor.grad_fn], set()
    while waiting:
        node = waiting.pop()
        if node is not None and node not in seen:
            seen.add(node)
            waiting.extend(parent for parent, _ in node.next_functions)
    return len(seen)


def test_the_embedding_multiplier_acts_on_what_the_first_layer_reads() -> None:
    run = tiny("embedding_multiplier=3.0")
    _, seen, _ = forward(run, "embedding.word_embeddings", "decoder.layers.0.input_layernorm")
    looked_up_BSM = seen["embedding.word_embeddings"][1]
    read_SBM = seen["decoder.layers.0.input_layernorm"][0][0]
    torch.testing.assert_close(read_SBM, 3.0 * looked_up_BSM.transpose(0, 1))


@pytest.mark.parametrize("bias", ["false", "true"])
def test_the_residual_multiplier_acts_on_both_branches_and_their_biases(bias: str) -> None:
    # 0.5 * (2 layers / 1 base layer)^-1 = 0.25.
    run = tiny(
        "residual_multiplier=0.5",
        "residual_depth_exponent=1.0",
        "base_num_layers=1",
        f"add_bias_linear={bias}",
    )
    layer = "decoder.layers.1"
    names = [f"{layer}.{name}" for name in ("self_attention", "pre_mlp_layernorm", "mlp")]
    with parallel_processes(run, Launch()):
        model = build_model(run, run.table)
        for name, parameter in model.named_parameters():
            if name.endswith(".bias"):
                parameter.data.fill_(0.75)
        seen = watch(model, f"{layer}.input_layernorm", *names, layer)
        model(_TOKENS, _POSITIONS, None)
    stream = seen[f"{layer}.input_layernorm"][0][0]
    for branch, after in (
        ("self_attention", seen[f"{layer}.pre_mlp_layernorm"][0][0]),
        ("mlp", seen[layer][1][0]),
    ):
        output, output_bias = seen[f"{layer}.{branch}"][1]
        assert (output_bias is not None) == (bias == "true")
        added = output if output_bias is None else output + output_bias
        torch.testing.assert_close(after, stream + 0.25 * added)
        assert not torch.allclose(after, stream + added, rtol=1e-3)
        stream = after


def test_the_logit_multiplier_acts_on_the_hidden_state_and_not_on_the_logits() -> None:
    # Width 64 over 32: 1/2 by the rule, times 3.
    run = tiny("output_form=multiplier", "logit_multiplier=3.0")
    model, seen, logits = forward(run, "decoder.final_layernorm", "output_layer")
    normed_SBM = seen["decoder.final_layernorm"][1]
    read_SBM = seen["output_layer"][0][0]
    assert read_SBM.shape == (16, 2, 64)
    torch.testing.assert_close(read_SBM, 1.5 * normed_SBM)
    expected = 1.5 * normed_SBM @ model.output_layer.weight.T
    torch.testing.assert_close(logits, expected.transpose(0, 1))


def test_a_tied_readout_is_scaled_while_its_embedding_is_not() -> None:
    run = tiny("untie_embeddings_and_output_weights=false", "output_form=multiplier", "init=sigma")
    model, seen, logits = forward(
        run, "decoder.final_layernorm", "embedding.word_embeddings", "embedding"
    )
    weight = model.embedding.word_embeddings.weight
    expected = 0.5 * seen["decoder.final_layernorm"][1] @ weight.T
    torch.testing.assert_close(logits, expected.transpose(0, 1))
    torch.testing.assert_close(seen["embedding"][1], weight[_TOKENS].transpose(0, 1))


def causal_attention(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """Reference attention; all [S, B, H, D] with as many key as query heads."""
    scores = torch.einsum("sbhd,tbhd->bhst", query, key) * scale
    later = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
    weights = scores.masked_fill(later, float("-inf")).softmax(-1)
    return torch.einsum("bhst,tbhd->sbhd", weights, value).flatten(2)


@pytest.mark.parametrize("backend", ["sdpa", "local"])
@pytest.mark.parametrize("groups", [4, 2, 1])
@pytest.mark.parametrize(
    ("overrides", "scale"),
    [
        ((), 0.0625),
        (("attention_scale=base_head_dim", "base_kv_channels=4"), 0.125),
        (("name=sp",), 0.25),
    ],
)
def test_the_attention_scale_is_what_the_core_attention_computes_with(
    backend: str, groups: int, overrides: tuple[str, ...], scale: float
) -> None:
    run = tiny(
        "num_layers=1", f"attention_backend={backend}", f"num_query_groups={groups}", *overrides
    )
    name = "decoder.layers.0.self_attention.core_attention"
    model, seen, _ = forward(run, name, "decoder.layers.0.self_attention.linear_proj")
    core = model.get_submodule(name)
    assert isinstance(core, SdpaCoreAttention if backend == "sdpa" else DotProductAttention)
    (query, key, value, *_), context = seen[name]
    key, value = (t.repeat_interleave(4 // groups, dim=2) for t in (key, value))
    torch.testing.assert_close(context, causal_attention(query, key, value, scale))
    wrong = causal_attention(query, key, value, 2 * scale)
    assert not torch.allclose(context, wrong, rtol=1e-3, atol=1e-4)


def test_bf16_scores_are_computed_in_fp32_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    attend = functional.scaled_dot_product_attention
    computed = []

    def watched(query: Tensor, *rest: Tensor, **options: object) -> Tensor:
        computed.append({t.dtype for t in (query, *rest)})
        return attend(query, *rest, **options)

    monkeypatch.setattr(functional, "scaled_dot_product_attention", watched)
    run = tiny("num_layers=1", "bf16=true", "attention_backend=sdpa")
    name = "decoder.layers.0.self_attention.core_attention"
    _, seen, _ = forward(run, name)
    (query, key, value, *_), context = seen[name]
    assert computed == [{torch.float32}]
    assert {t.dtype for t in (query, key, value, context)} == {torch.bfloat16}
    # D = 16, so that the scale is 1/16.
    expected = causal_attention(query.float(), key.float(), value.float(), 1 / 16)
    torch.testing.assert_close(context, expected.bfloat16())


@pytest.mark.parametrize("output_form", ["folded", "multiplier"])
def test_multipliers_of_one_add_no_operation(output_form: str) -> None:
    at_base = ("base_hidden_size=64", "base_ffn_hidden_size=256", f"output_form={output_form}")
    model, _, logits = forward(tiny(*at_base, "init=sigma"))
    assert not model.embedding._forward_hooks
    assert not model.output_layer._forward_pre_hooks
    for layer in model.decoder.layers:
        assert layer.self_attn_bda is get_bias_dropout_add
        assert layer.mlp_bda is get_bias_dropout_add
    plain = autograd_nodes(logits)
    for option in ("embedding_multiplier=2.0", "logit_multiplier=2.0"):
        _, _, scaled = forward(tiny(*at_base, "init=sigma", option))
        assert autograd_nodes(scaled) == plain + 1, option
    model, _, _ = forward(tiny(*at_base, "init=sigma", "residual_multiplier=2.0"))
    assert model.decoder.layers[0].mlp_bda is not get_bias_dropout_add


def test_the_bias_dropout_add_of_one_is_megatrons_own() -> None:
    assert scaled_bias_dropout_add(1.0) is get_bias_dropout_add
    spec = layer_spec(tiny().model, 1.0).submodules
    assert spec.self_attn_bda is spec.mlp_bda is get_bias_dropout_add


@pytest.mark.parametrize("multiplier", [1.0, 0.5])
def test_the_transformer_engine_spec_names_the_missing_package(
    multiplier: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Absent here even where it is installed.
    monkeypatch.setitem(sys.modules, "transformer_engine", None)
    model = tiny("transformer_impl=transformer_engine").model
    with pytest.raises(InstallationError, match=r"pip install 'megatron_mup\[gpu\]'"):
        layer_spec(model, multiplier)


@pytest.mark.parametrize(
    ("gain", "values"), [("none", None), ("scalar", [3.0]), ("vector", [3.0] * 64)]
)
def test_norms_divide_by_the_root_mean_square_and_apply_their_gain(
    gain: str, values: list[float] | None
) -> None:
    run = tiny(f"norm_gain={gain}", "norm_epsilon=0.001")
    name = "decoder.final_layernorm"
    with parallel_processes(run, Launch()):
        model = build_model(run, run.table)
        norm = model.get_submodule(name)
        learned = [value.numel() for value in norm.parameters()]
        if values is not None:
            norm.weight.data.copy_(torch.tensor(values))
        seen = watch(model, name)
        model(_TOKENS, _POSITIONS, None)
    (hidden,), normed = seen[name]
    expected = hidden * (hidden.pow(2).mean(-1, keepdim=True) + 0.001).rsqrt()
    torch.testing.assert_close(normed, expected * (1.0 if values is None else 3.0))
    assert learned == ([] if values is None else [len(values)])


def test_a_backend_with_its_own_attention_scale_is_refused() -> None:
    run = tiny()
    with parallel_processes(run, Launch()):
        model = build_model(run, run.table)
        check_attention_scale(model, 1 / 16)
        core = model.get_submodule("decoder.layers.1.self_attention.core_attention")
        core.softmax_scale = 0.25
        with pytest.raises(ParameterizationError, match=r"layers\.1\.self_attention.*0\.25"):
            check_attention_scale(model, 1 / 16)
