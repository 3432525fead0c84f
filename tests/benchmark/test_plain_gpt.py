"""The plain GPT is a fair yardstick: it computes what stock Megatron-Core computes."""

from __future__ import annotations

import pytest
import torch

from megatron_mup.benchmark.contestants import random_batches, stock_model
from megatron_mup.benchmark.plain_gpt import PlainGPT
from megatron_mup.config import RunConfig
from megatron_mup.errors import ConfigError
from megatron_mup.training.processes import Launch, parallel_processes
from tests.configurations import tiny


@torch.no_grad()
def copy_weights(gpt: torch.nn.Module, plain: PlainGPT, run: RunConfig) -> None:
    """Megatron interleaves query, key and value by head; the plain model stacks them."""
    weights = dict(gpt.named_parameters())
    head_dim, hidden = run.model.head_dim, run.model.hidden_size
    plain.embedding.weight.copy_(weights["embedding.word_embeddings.weight"])
    if run.model.untie_embeddings_and_output_weights:
        plain.output.weight.copy_(weights["output_layer.weight"])
    for index, block in enumerate(plain.blocks):
        prefix = f"decoder.layers.{index}"
        qkv = weights[f"{prefix}.self_attention.linear_qkv.weight"]
        by_head = qkv.view(-1, 3, head_dim, hidden)
        block.qkv.weight.copy_(by_head.transpose(0, 1).reshape(-1, hidden))
        block.attention_out.weight.copy_(weights[f"{prefix}.self_attention.linear_proj.weight"])
        block.ffn_in.weight.copy_(weights[f"{prefix}.mlp.linear_fc1.weight"])
        block.ffn_out.weight.copy_(weights[f"{prefix}.mlp.linear_fc2.weight"])


@pytest.mark.parametrize("untied", ["true", "false"])
def test_plain_and_stock_models_have_the_same_loss_and_gradients(untied: str) -> None:
    run = tiny("name=sp", f"untie_embeddings_and_output_weights={untied}", "lr=0.1")
    batch = random_batches(run, 1)[0]
    with parallel_processes(run, Launch()):
        gpt = stock_model(run)
        plain = PlainGPT(run.model)
        copy_weights(gpt, plain, run)
        losses = gpt(batch["tokens"], batch["position_ids"], None, labels=batch["labels"])
        losses.mean().backward()
        loss = plain(batch["tokens"], batch["labels"])
        loss.backward()
        gradient = gpt.embedding.word_embeddings.weight.grad
    # Uniform over 96 tokens is 4.564 nats, which small weights come close to.
    assert loss.item() == pytest.approx(4.564, abs=0.1)
    assert losses.mean().item() == pytest.approx(loss.item(), abs=1e-6)
    torch.testing.assert_close(plain.embedding.weight.grad, gradient, rtol=1e-4, atol=1e-7)
    assert sum(p.numel() for p in plain.parameters()) == sum(p.numel() for p in gpt.parameters())


@pytest.mark.parametrize(
    ("override", "name"),
    [
        ("num_query_groups=2", "num_query_groups 2"),
        ("activation=swiglu", "activation swiglu"),
        ("norm_gain=vector", "norm_gain vector"),
        ("rotary_percent=0.5", "rotary_percent 0.5"),
        ("add_bias_linear=true", "add_bias_linear"),
    ],
)
def test_an_architecture_that_the_plain_model_lacks_is_refused(override: str, name: str) -> None:
    with pytest.raises(ConfigError, match=f"has no {name}; compare a model with GELU"):
        PlainGPT(tiny("name=sp", override).model)
