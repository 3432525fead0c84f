"""Muon: which parameters it trains, with which numbers, and its update in 64 bits."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from megatron_mup.training.state import TrainState
from tests.configurations import tiny
from tests.optimizer.built_runs import built, group_of
from tests.optimizer.trained_runs import train_steps

_MUON = ("optimizer.optimizer=muon", "clip_grad=0", "lr_decay_style=constant")
_WIDE = ("hidden_size=128", "num_attention_heads=8", "lr=0.015625")
_ALPHA, _QUARTER = 0.015625, 0.00390625
_HIDDEN = (
    "self_attention.linear_qkv.weight",
    "self_attention.linear_proj.weight",
    "mlp.linear_fc1.weight",
    "mlp.linear_fc2.weight",
)
# The "quintic" coefficients of https://leloykun.github.io/ponder/muon-opt-coeffs.
_QUINTIC = [
    (4.0848, -6.8946, 2.9270),
    (3.9505, -6.3029, 2.6377),
    (3.7418, -5.5913, 2.3037),
    (2.8769, -3.1427, 1.2046),
    (2.8366, -3.0525, 1.2012),
]


def orthogonalized(matrix: Tensor) -> Tensor:
    """Five Newton-Schulz steps in 64 bits, times sqrt(fan_out / fan_in)."""
    x = matrix.double()
    x = x / x.norm()
    for a, b, c in _QUINTIC:
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    rows, columns = matrix.shape
    return x * math.sqrt(rows / columns)


def second_update(state: TrainState, name: str) -> tuple[Tensor, Tensor]:
    """A hidden matrix's Nesterov gradient in its second step, and by how much it changed."""
    parameter = dict(state.model_chunks[0].named_parameters())[name]
    train_steps(state, 1)
    momentum = 0.05 * parameter.main_grad.double()
    before = parameter.detach().double().clone()
    train_steps(state, 1)
    gradient = parameter.main_grad.double()
    momentum = 0.95 * momentum + 0.05 * gradient
    return 0.05 * gradient + 0.95 * momentum, parameter.detach().double() - before


@pytest.mark.parametrize("part", ["mlp.linear_fc2", "mlp.linear_fc1", "self_attention.linear_proj"])
def test_a_step_is_the_orthogonalized_gradient_computed_in_64_bits(part: str) -> None:
    with built(tiny(*_MUON)) as state:
        nesterov, change = second_update(state, f"decoder.layers.1.{part}.weight")
    expected = -_ALPHA * orthogonalized(nesterov)
    assert change.shape == expected.shape
    assert float((change - expected).norm() / expected.norm()) < 1e-4


def test_query_key_and_value_are_orthogonalized_apart() -> None:
    # 4 query heads of 16 in 2 groups: each group holds 32 query, 16 key and 16 value rows.
    with built(tiny(*_MUON, "num_query_groups=2")) as state:
        name = "decoder.layers.0.self_attention.linear_qkv.weight"
        nesterov, change = second_update(state, name)
    for rows in (slice(0, 32), slice(32, 48), slice(48, 64)):
        expected = -_ALPHA * orthogonalized(nesterov.view(2, 64, 64)[:, rows].reshape(-1, 64))
        found = change.view(2, 64, 64)[:, rows].reshape(-1, 64)
        assert float((found - expected).norm() / expected.norm()) < 1e-4


def test_decay_is_decoupled_from_the_update() -> None:
    decay = ("weight_decay=0.25", "weight_decay_mode=independent")
    name = "decoder.layers.0.mlp.linear_fc2.weight"
    after = []
    for options in ((), decay):
        with built(tiny(*_MUON, *options)) as state:
            parameter = dict(state.model_chunks[0].named_parameters())[name]
            start = parameter.detach().double().clone()
            train_steps(state, 1)
            after.append(parameter.detach().double())
    torch.testing.assert_close(after[1] - after[0], -0.25 * start, rtol=1e-4, atol=1e-6)


def test_hidden_matrices_are_muons_and_the_rest_is_adams_with_their_own_numbers() -> None:
    options = ("norm_gain=vector", "output_form=multiplier", "weight_decay=0.1")
    run = tiny(*_MUON, *_WIDE, *options, "weight_decay_mode=independent")
    with built(run) as state:
        groups = group_of(state)
    for name, group in groups.items():
        if name.endswith(_HIDDEN):
            assert (group["max_lr"], group["wd_mult"]) == (_ALPHA, 64.0), name
            assert "momentum" in group, name
            assert "eps" not in group, name
        else:
            assert group["optimizer"] == "adam", name
            assert group["betas"] == (0.9, 0.95), name
    assert sum(name.endswith(_HIDDEN) for name in groups) == 8
    embedding, readout = groups["embedding.word_embeddings.weight"], groups["output_layer.weight"]
    assert (embedding["max_lr"], embedding["eps"], embedding["wd_mult"]) == (_ALPHA, 1e-8, 64.0)
    assert (readout["max_lr"], readout["eps"]) == (_ALPHA, pytest.approx(2.5e-9, rel=1e-12))
    gain = groups["decoder.layers.0.input_layernorm.weight"]
    assert (gain["max_lr"], gain["wd_mult"]) == (_ALPHA, 0.0)


def test_the_tied_readout_is_trained_by_adam() -> None:
    tied = ("untie_embeddings_and_output_weights=false", "output_form=multiplier")
    with built(tiny(*_MUON, *tied)) as state:
        groups = group_of(state)
    assert groups["embedding.word_embeddings.weight"]["optimizer"] == "adam"


@pytest.mark.parametrize("precision", ["bf16=false", "bf16=true"])
def test_dealing_the_matrices_out_changes_nothing_on_one_rank(precision: str) -> None:
    # Without clipping: the norm is summed in another order.
    losses = []
    for layout in ("use_distributed_optimizer=false", "use_distributed_optimizer=true"):
        with built(tiny(*_MUON, precision, layout, "norm_gain=vector")) as state:
            losses.append(train_steps(state, 4))
    assert losses[0] == losses[1]
    assert losses[0][-1] < losses[0][0]
