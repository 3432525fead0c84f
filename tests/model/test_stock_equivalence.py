"""At the base shape this package is stock Megatron-Core, bit for bit, and only there."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from megatron_mup.config import RunConfig
from megatron_mup.model.layer_specs import SdpaCoreAttention
from megatron_mup.training.batches import micro_batches
from megatron_mup.training.processes import Launch, parallel_processes
from megatron_mup.training.state import TrainState, build_state
from megatron_mup.training.step import train_step
from tests.configurations import tiny
from tests.random_samples import RandomSamples
from tests.stock_gpt import StockShape, StockTraining, stock_model, stock_step, stock_training

_LR, _DECAY, _STEPS = 0.01, 0.1, 5
# Megatron's default; below the first norms of these runs (about 3), so that clipping bites.
_CLIP = 1.0
_AT_BASE = (
    "base_hidden_size=64",
    "base_ffn_hidden_size=256",
    "base_kv_channels=16",
    "base_num_layers=2",
    "init=sigma",
    "attention_scale=base_head_dim",
    "norm_gain=vector",
    "attention_backend=local",
    f"lr={_LR}",
    f"weight_decay={_DECAY}",
    "weight_decay_mode=coupled",
    "weight_decay_mask=matrices",
    f"train_iters={_STEPS}",
    f"clip_grad={_CLIP}",
)
VARIANTS: dict[str, tuple[StockShape, tuple[str, ...]]] = {
    "folded": (StockShape(), ()),
    "multiplier": (StockShape(), ("output_form=multiplier",)),
    "sp": (StockShape(), ("name=sp", "attention_scale=inverse_sqrt")),
    "abs_mup_init": (StockShape(), ("name=abs_mup", f"lr={_LR}")),
    "grouped_queries": (
        StockShape(num_query_groups=2, biases=True),
        ("num_query_groups=2", "add_bias_linear=true"),
    ),
    "swiglu": (
        StockShape(gated=True, ffn_hidden_size=170),
        ("activation=swiglu", "ffn_hidden_size=170", "base_ffn_hidden_size=170"),
    ),
    "tied": (
        StockShape(tied=True),
        ("untie_embeddings_and_output_weights=false", "output_form=multiplier"),
    ),
}
TRAINED = [name for name in VARIANTS if name != "abs_mup_init"]


def at_base(variant: str, *overrides: str) -> tuple[RunConfig, StockShape]:
    shape, own = VARIANTS[variant]
    return tiny(*_AT_BASE, *own, *overrides), shape


def batches_of(step: int) -> list[dict[str, torch.Tensor]]:
    samples = RandomSamples(96, 16)
    return list(micro_batches(samples, first=4 * step, batch_size=4, micro_batch_size=2))


def parameters(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in model.named_parameters()}


def gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.main_grad.clone() for name, value in model.named_parameters()}


def group_numbers(model: torch.nn.Module, optimizer: Any) -> dict[str, tuple[float, ...]]:
    """Per parameter: LR, decay and eps that the optimizer holds."""
    groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    keys = ("lr", "weight_decay", "eps", "max_lr")
    return {name: tuple(groups[id(p)][key] for key in keys) for name, p in model.named_parameters()}


@torch.no_grad()
def copy_weights(source: torch.nn.Module, target: torch.nn.Module) -> None:
    values = parameters(source)
    assert values.keys() == dict(target.named_parameters()).keys()
    for name, parameter in target.named_parameters():
        parameter.copy_(values[name])


def assert_same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> None:
    assert left.keys() == right.keys()
    assert [name for name in left if not torch.equal(left[name], right[name])] == []


def train_stock(model: torch.nn.Module, clip_grad: float = _CLIP) -> StockTraining:
    return stock_training(model, lr=_LR, weight_decay=_DECAY, steps=_STEPS, clip_grad=clip_grad)


def logits(model: torch.nn.Module) -> torch.Tensor:
    batch = batches_of(0)[0]
    with torch.no_grad():
        return model(batch["tokens"], batch["position_ids"], None)


def assert_trains_like_stock(state: TrainState, stock_gpt: Any) -> None:
    """Five steps of both from the stock weights: every number equal, bit for bit."""
    copy_weights(stock_gpt, state.model_chunks[0])
    stock = train_stock(stock_gpt)
    assert torch.equal(logits(state.model_chunks[0]), logits(stock_gpt))
    for step in range(_STEPS):
        batches = batches_of(step)
        stock_numbers = group_numbers(stock_gpt, stock.optimizer)
        report = train_step(state, iter(batches), len(batches))
        assert group_numbers(state.model_chunks[0], state.optimizer) == stock_numbers
        assert float(report.loss_sum_and_tokens[0]) == stock_step(stock, batches)
        assert_same(gradients(state.model_chunks[0]), gradients(stock_gpt))
        assert_same(parameters(state.model_chunks[0]), parameters(stock_gpt))


@pytest.mark.parametrize("variant", TRAINED)
def test_the_base_model_trains_bit_for_bit_like_stock_megatron(variant: str) -> None:
    run, shape = at_base(variant)
    with parallel_processes(run, Launch()):
        state = build_state(run)
        assert_trains_like_stock(state, stock_model(shape))


@pytest.mark.parametrize("variant", ["folded", "grouped_queries"])
def test_the_fused_attention_is_the_only_change_that_sdpa_makes(variant: str) -> None:
    run, shape = at_base(variant, "attention_backend=sdpa")
    with parallel_processes(run, Launch()):
        state = build_state(run)
        assert_trains_like_stock(state, stock_model(shape, core_attention=SdpaCoreAttention))


@pytest.mark.parametrize("variant", list(VARIANTS))
def test_initial_weights_have_the_spread_of_stock_megatron(variant: str) -> None:
    run, shape = at_base(variant)
    with parallel_processes(run, Launch()):
        own = parameters(build_state(run).model_chunks[0])
        stock = parameters(stock_model(shape))
    assert own.keys() == stock.keys()
    for name, weight in stock.items():
        if weight.dim() == 1:
            assert torch.equal(own[name], weight), name
            continue
        # The sample std of n normal values has a relative error of 1/sqrt(2n); five of them.
        tolerance = 5 * (1.0 / weight.numel()) ** 0.5
        ratio = (own[name].std() / weight.std()).item()
        assert ratio == pytest.approx(1.0, abs=tolerance), name
        assert own[name].mean().abs() < 5 * weight.std() / weight.numel() ** 0.5, name
        assert not torch.equal(own[name], weight), name


def test_clipping_bites_in_these_runs() -> None:
    run, _ = at_base("folded")
    with parallel_processes(run, Launch()):
        report = train_step(build_state(run), iter(batches_of(0)), 2)
    assert report.grad_norm > 1.5 * _CLIP


def test_a_wider_model_is_not_stock_megatron() -> None:
    run, shape = at_base("folded", "base_hidden_size=32", "base_ffn_hidden_size=128")
    with parallel_processes(run, Launch()):
        state = build_state(run)
        stock_gpt = stock_model(shape)
        copy_weights(stock_gpt, state.model_chunks[0])
        stock = train_stock(stock_gpt)
        train_step(state, iter(batches_of(0)), 2)
        stock_step(stock, batches_of(0))
        own, other = parameters(state.model_chunks[0]), parameters(stock_gpt)
    qkv = "decoder.layers.0.self_attention.linear_qkv.weight"
    assert not torch.equal(own[qkv], other[qkv])
    # Embeddings keep the base LR at every width.
    embedding = "embedding.word_embeddings.weight"
    assert torch.equal(own[embedding], other[embedding])


@pytest.mark.parametrize("name", ["mup", "sp"])
def test_the_attention_scale_of_the_base_is_stock_at_every_head_dim(name: str) -> None:
    scale = "base_head_dim" if name == "mup" else "inverse_sqrt"
    for head_dim in (2, 6, 16, 32, 48, 64, 80, 96, 112, 128, 192, 256):
        run = tiny(
            f"name={name}",
            f"attention_scale={scale}",
            f"kv_channels={head_dim}",
            f"base_kv_channels={head_dim}",
            "base_num_attention_heads=4",
        )
        # As DotProductAttention of megatron-core 0.19.2 computes it.
        assert run.table.multipliers.attention == 1.0 / math.sqrt(head_dim), head_dim
