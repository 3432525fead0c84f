"""The faster rotation is upstream's function, and the tables follow the angles."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from megatron.core.models.common.embeddings.rope_utils import _apply_rotary_pos_emb_bshd
from megatron.core.transformer.attention import SelfAttention
from torch import Tensor

from megatron_mup.config import RunConfig
from megatron_mup.model.gpt import build_model
from megatron_mup.model.layer_specs import scaled_bias_dropout_add
from megatron_mup.model.rotary import CachedRotarySelfAttention, RotaryTables, rotate
from megatron_mup.training.processes import Launch, parallel_processes
from tests.configurations import tiny


def angles(length: int, width: int) -> Tensor:
    frequencies = 1.0 / 10000 ** (torch.arange(0, width, 2).float() / width)
    half = torch.outer(torch.arange(length).float(), frequencies)
    return torch.cat((half, half), dim=-1)[:, None, None, :]


@pytest.mark.parametrize(
    ("length", "heads", "head_dim", "rotated"), [(33, 3, 16, 16), (64, 2, 24, 8), (5, 1, 128, 64)]
)
def test_rotation_and_its_gradient_equal_upstreams_bit_for_bit(
    length: int, heads: int, head_dim: int, rotated: int
) -> None:
    generator = torch.Generator().manual_seed(0)
    # A slice of a fused projection, as in training: not contiguous.
    fused = torch.randn(length, 2, heads, 3 * head_dim, generator=generator)
    own, upstream = (fused.clone().requires_grad_() for _ in range(2))
    table = angles(length, rotated)
    result = rotate(own[..., :head_dim], table.cos(), table.sin())
    expected = _apply_rotary_pos_emb_bshd(upstream[..., :head_dim], table)
    assert torch.equal(result, expected)
    gradient = torch.randn(expected.shape, generator=generator)
    result.backward(gradient)
    expected.backward(gradient)
    assert torch.equal(own.grad, upstream.grad)


def test_rotation_has_the_right_derivative() -> None:
    x = torch.randn(3, 1, 2, 6, dtype=torch.float64, requires_grad=True)
    table = angles(3, 4).double()
    assert torch.autograd.gradcheck(lambda x: rotate(x, table.cos(), table.sin()), (x,))
    assert torch.autograd.gradgradcheck(lambda x: rotate(x, table.cos(), table.sin()), (x,))


def test_tables_are_computed_once_for_the_same_angles_and_anew_for_others() -> None:
    tables, short, long = RotaryTables(), angles(4, 8), angles(6, 8)
    first = tables.cos_sin(short, torch.float32)
    assert tables.cos_sin(short, torch.float32)[0] is first[0]
    assert tables.cos_sin(short, torch.bfloat16)[1].dtype == torch.bfloat16
    assert tables.cos_sin(long, torch.float32)[0].shape == (6, 1, 1, 8)
    assert torch.equal(tables.cos_sin(short, torch.float32)[1], short.sin())


def losses_and_gradient(run: RunConfig, lengths: tuple[int, ...]) -> tuple[list[Tensor], Tensor]:
    tokens = torch.randint(96, (2, 17), generator=torch.Generator().manual_seed(1))
    losses = []
    with parallel_processes(run, Launch()):
        model = build_model(run, run.table)
        for length in lengths:
            part = tokens[:, :length]
            positions = torch.arange(length).expand(2, -1)
            losses.append(model(part, positions, None, labels=tokens[:, 1 : length + 1]))
        torch.stack([loss.sum() for loss in losses]).sum().backward()
        attentions = [layer.self_attention for layer in model.decoder.layers]
    assert all(type(attention) is CachedRotarySelfAttention for attention in attentions)
    assert attentions[0].rotary_tables is attentions[1].rotary_tables
    return losses, attentions[0].linear_qkv.weight.grad


def test_a_model_computes_what_it_computes_with_upstreams_attention(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run = tiny("rotary_percent=0.5", "rotary_base=500", "num_query_groups=2")
    lengths = (16, 7, 16)
    own, own_gradient = losses_and_gradient(run, lengths)
    # The same class with upstream's two methods.
    method: Callable[..., object] = SelfAttention.forward
    monkeypatch.setattr(CachedRotarySelfAttention, "forward", method)
    upstream, upstream_gradient = losses_and_gradient(run, lengths)
    assert [torch.equal(a, b) for a, b in zip(own, upstream, strict=True)] == [True, True, True]
    assert torch.equal(own_gradient, upstream_gradient)


def test_the_unfused_backend_keeps_upstreams_attention() -> None:
    run = tiny("attention_backend=local")
    with parallel_processes(run, Launch()):
        model = build_model(run, run.table)
    assert type(model.decoder.layers[0].self_attention) is SelfAttention


def test_the_residual_multiplier_acts_on_branch_and_bias() -> None:
    add = scaled_bias_dropout_add(0.5)(True, False)
    branch, bias, residual = torch.tensor([4.0, 8.0]), torch.tensor([2.0]), torch.tensor([10.0])
    assert add((branch, bias), residual, 0.0).tolist() == [13.0, 15.0]
    assert add((branch, None), residual, 0.0).tolist() == [12.0, 14.0]
    assert residual.tolist() == [10.0]
