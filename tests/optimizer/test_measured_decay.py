"""Weight decay as it happens: weights of a built model under zero gradients.

With zero gradients AdamW and Lion move nothing but decay, so one step shrinks every weight by its
group's LR times weight decay. Schedule of the runs: warmup of 2 from 0.5, then linear to 0 at 6.
"""

from __future__ import annotations

import itertools

import pytest
import torch

from megatron_mup.optimizer.build import apply_schedule
from megatron_mup.optimizer.schedule import run_factor
from megatron_mup.training.state import TrainState
from tests.configurations import tiny
from tests.optimizer.built_runs import built, group_of

_FACTORS = [0.5, 0.75, 1.0, 0.75, 0.5, 0.25]
_OPTIONS = (
    "norm_gain=vector",
    "add_bias_linear=true",
    "weight_decay=0.01",
    "lr_warmup_iters=2",
    "lr_warmup_init_ratio=0.5",
    "train_iters=6",
)


def shrinkage(state: TrainState) -> dict[str, list[float]]:
    """Fraction of every parameter that each of the six steps removes."""
    removed: dict[str, list[float]] = {name: [] for name in group_of(state)}
    for step in range(6):
        # From ones, so that the fraction is the difference, to fp32's last bits.
        for parameter in state.model_chunks[0].parameters():
            parameter.data.fill_(1.0)
        apply_schedule(state.optimizer, run_factor(state.run, step), weight_decay=0.01)
        state.wrapped_chunks[0].zero_grad_buffer()
        state.optimizer.zero_grad()
        state.optimizer.step()
        for name, parameter in state.model_chunks[0].named_parameters():
            values = 1.0 - parameter.detach().double()
            assert torch.equal(values, values.flatten()[0].expand_as(values))
            removed[name].append(values.flatten()[0].item())
    return removed


@pytest.mark.parametrize(
    ("optimizer", "name", "form", "lr"),
    [
        ("adam", "mup", "folded", 0.015625),
        ("adam", "mup", "multiplier", 0.125),
        ("adam", "abs_mup", "folded", 1.0),
        ("adam", "sp", "folded", 0.125),
        ("lion", "mup", "folded", 0.015625),
        ("lion", "abs_mup", "folded", 0.125),
        ("lion", "mup", "multiplier", 0.125),
    ],
)
def test_independent_decay_removes_lambda_times_the_schedule_from_every_weight(
    optimizer: str, name: str, form: str, lr: float
) -> None:
    run = tiny(
        *_OPTIONS,
        f"optimizer.optimizer={optimizer}",
        f"name={name}",
        f"output_form={form}",
        f"lr={lr}",
        "weight_decay_mask=all",
        "weight_decay_mode=independent",
    )
    expected = [0.005, 0.0075, 0.01, 0.0075, 0.005, 0.0025]
    with built(run) as state:
        removed = shrinkage(state)
    assert len(removed) == 23
    for parameter, fractions in removed.items():
        # fp32 resolves 1 - 0.01 to 6e-8.
        assert fractions == pytest.approx(expected, abs=2e-7), parameter


def test_masked_vectors_keep_their_values() -> None:
    run = tiny(*_OPTIONS, "weight_decay_mode=independent", "weight_decay_mask=matrices")
    with built(run) as state:
        removed = shrinkage(state)
    kept = {name for name, fractions in removed.items() if fractions == [0.0] * 6}
    assert kept == {name for name in removed if name.endswith(".bias") or "norm" in name}
    assert len(kept) == 13


@pytest.mark.parametrize(
    ("mode", "hidden", "embedding"),
    [
        # 0.01 * alpha, with alpha 0.5 on the embedding and 0.25 on hidden matrices.
        ("coupled", 0.0025, 0.005),
        ("constant_product", 0.005, 0.005),
        ("independent", 0.01, 0.01),
    ],
)
@pytest.mark.parametrize("optimizer", ["adam", "lion"])
def test_each_mode_removes_its_own_share(
    mode: str, hidden: float, embedding: float, optimizer: str
) -> None:
    run = tiny(*_OPTIONS, "lr=0.5", f"weight_decay_mode={mode}", f"optimizer.optimizer={optimizer}")
    with built(run) as state:
        removed = shrinkage(state)
    for parameter, peak in (
        ("embedding.word_embeddings.weight", embedding),
        ("decoder.layers.0.self_attention.linear_qkv.weight", hidden),
        ("decoder.layers.1.mlp.linear_fc2.weight", hidden),
        ("output_layer.weight", hidden),
    ):
        expected = [peak * factor for factor in _FACTORS]
        assert removed[parameter] == pytest.approx(expected, abs=2e-7), parameter


@pytest.mark.parametrize("mode", ["coupled", "constant_product", "independent"])
@pytest.mark.parametrize("form", ["folded", "multiplier"])
def test_the_products_of_rate_and_decay_hold_their_ratios_over_the_whole_schedule(
    mode: str, form: str
) -> None:
    run = tiny(*_OPTIONS, f"weight_decay_mode={mode}", f"output_form={form}")
    products, rates = [], []
    with built(run) as state:
        for factor in (run_factor(run, step) for step in range(6)):
            apply_schedule(state.optimizer, factor, weight_decay=0.01)
            groups = state.optimizer.param_groups
            products.append([group["lr"] * group["weight_decay"] / factor for group in groups])
            rates.append([group["lr"] / factor for group in groups])
    for first, second in itertools.pairwise(products):
        assert second == pytest.approx(first, rel=1e-12)
    for first, second in itertools.pairwise(rates):
        assert second == pytest.approx(first, rel=1e-12)


def test_groups_that_differ_only_in_their_learning_rate_decay_alike_when_independent() -> None:
    run = tiny("weight_decay=0.02", "weight_decay_mode=independent", "lr=0.25")
    with built(run) as state:
        apply_schedule(state.optimizer, 1.0, weight_decay=0.02)
        groups = sorted(state.optimizer.param_groups, key=lambda group: group["lr"])
        assert [group["lr"] for group in groups] == [0.125, 0.25]
        assert [group["weight_decay"] for group in groups] == pytest.approx([0.16, 0.08])
        assert [group["lr"] * group["weight_decay"] for group in groups] == pytest.approx(
            [0.02, 0.02], rel=1e-12
        )


def test_no_decay_is_no_decay_in_every_mode() -> None:
    for mode in ("coupled", "constant_product", "independent"):
        with built(tiny("weight_decay=0.0", f"weight_decay_mode={mode}")) as state:
            apply_schedule(state.optimizer, 1.0, weight_decay=0.0)
            assert {group["weight_decay"] for group in state.optimizer.param_groups} == {0.0}
