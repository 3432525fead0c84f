"""The optimizer's state is one thing for every optimizer layout; on one rank here.

What two ranks exchange is in test_optimizer_layouts.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_mup.checkpoint.optimizer_state import boxes, load_optimizer_tree, optimizer_tree
from megatron_mup.config import RunConfig
from megatron_mup.errors import CheckpointError
from tests.configurations import tiny
from tests.optimizer.built_runs import built
from tests.optimizer.trained_runs import (
    load_state,
    model_tree,
    save_state,
    stored_tensors,
    train_steps,
)

# A gated FFN is stored as two tensors; gains and biases have one axis.
COMMON = (
    "activation=swiglu",
    "norm_gain=vector",
    "add_bias_linear=true",
    "lr_decay_iters=20",
    "lr_warmup_iters=2",
    "weight_decay=0.01",
    # The optimizers sum the gradient norm in different orders, and bf16 makes the last bit visible.
    "clip_grad=0",
)
LAYOUTS = {"plain": "false", "distributed": "true"}
FAMILIES = list(itertools.product(["adam", "lion", "muon"], ["false", "true"]))
Saved = Callable[[str, str, str], tuple[Path, list[float]]]


def run_of(optimizer: str, bf16: str, layout: str, *more: str) -> RunConfig:
    choice = (f"optimizer.optimizer={optimizer}", f"bf16={bf16}")
    return tiny(*COMMON, *choice, f"use_distributed_optimizer={LAYOUTS[layout]}", *more)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Saved:
    """State after three steps, and the losses of six steps without a stop."""

    @cache
    def make(optimizer: str, bf16: str, layout: str) -> tuple[Path, list[float]]:
        folder = tmp_path_factory.mktemp(f"{optimizer}-{bf16}-{layout}")
        with built(run_of(optimizer, bf16, layout)) as state:
            losses = train_steps(state, 3)
            save_state(state, folder)
            return folder, losses + train_steps(state, 3)

    return make


def inner_optimizers(optimizer: Any) -> list[Any]:
    """The torch optimizers inside a Megatron one."""
    parts = getattr(optimizer, "chained_optimizers", None)
    if parts is None:
        return [optimizer.optimizer]
    return [inner for part in parts for inner in inner_optimizers(part)]


def steps_of(optimizer: Any) -> list[torch.Tensor]:
    states = [s for inner in inner_optimizers(optimizer) for s in inner.state.values()]
    return [moments["step"] for moments in states if "step" in moments]


@pytest.mark.parametrize(("source", "target"), list(itertools.product(LAYOUTS, LAYOUTS)))
@pytest.mark.parametrize(("optimizer", "bf16"), FAMILIES)
def test_any_optimizer_goes_on_from_what_any_other_one_saved(
    optimizer: str, bf16: str, source: str, target: str, saved: Saved
) -> None:
    folder, _ = saved(optimizer, bf16, source)
    _, whole = saved(optimizer, bf16, target)
    with built(run_of(optimizer, bf16, target)) as state:
        load_state(state, folder)
        rest = train_steps(state, 3)
    if source == target:
        assert rest == whole[3:]
    assert rest == pytest.approx(whole[3:], abs=1e-6)


@pytest.mark.parametrize("layout", list(LAYOUTS))
def test_every_parameter_counts_its_steps_in_a_tensor_of_its_own(layout: str, saved: Saved) -> None:
    folder, _ = saved("adam", "false", "plain")
    with built(run_of("adam", "false", layout)) as state:
        load_state(state, folder)
        steps = steps_of(state.optimizer)
        assert [step.item() for step in steps] == [3.0] * len(steps)
        assert len({step.data_ptr() for step in steps}) == len(steps) == 23
        train_steps(state, 1)
        assert {step.item() for step in steps_of(state.optimizer)} == {4.0}


@pytest.mark.parametrize("layout", list(LAYOUTS))
@pytest.mark.parametrize("optimizer", ["adam", "lion", "muon"])
def test_a_state_saved_before_the_first_step_starts_as_from_scratch(
    optimizer: str, layout: str, tmp_path: Path
) -> None:
    with built(run_of(optimizer, "true", "plain")) as state:
        save_state(state, tmp_path)
        # Saving makes the moments: going on must not notice.
        after_saving = train_steps(state, 2)
    with built(run_of(optimizer, "true", layout)) as state:
        scratch = train_steps(state, 2)
    with built(run_of(optimizer, "true", layout)) as state:
        load_state(state, tmp_path)
        assert train_steps(state, 2) == scratch
    assert after_saving == scratch


def test_plain_and_distributed_store_the_same_tensors_under_the_models_keys(
    saved: Saved,
) -> None:
    stored = {}
    for layout in LAYOUTS:
        folder, _ = saved("adam", "true", layout)
        stored[layout] = stored_tensors(folder)
    plain, distributed = stored["plain"], stored["distributed"]
    moments = {key for key in plain if key.startswith("optimizer.state.")}
    assert set(distributed) == set(plain)
    weights = {key for key, value in plain.items() if key not in moments and value.numel()}
    kinds = ("exp_avg", "exp_avg_sq", "fp32_param")
    assert moments == {f"optimizer.state.{kind}.{key}" for kind in kinds for key in weights}
    shape = plain["optimizer.state.exp_avg.decoder.layers.mlp.linear_fc1.weight"].shape
    assert shape == (2, 2 * 256, 64)
    for key in moments:
        assert plain[key].dtype == torch.float32
        assert torch.equal(plain[key], distributed[key]), key


def test_fp32_weights_are_stored_once(saved: Saved) -> None:
    folder, _ = saved("adam", "false", "distributed")
    keys = stored_tensors(folder)
    assert not [key for key in keys if "fp32_param" in key]


def test_frozen_gains_have_no_state(tmp_path: Path) -> None:
    with built(tiny()) as state:
        train_steps(state, 1)
        save_state(state, tmp_path)
    keys = stored_tensors(tmp_path)
    assert not [key for key in keys if key.startswith("optimizer.") and "norm" in key]


def test_a_tied_matrix_is_stored_once(tmp_path: Path) -> None:
    tied = ("untie_embeddings_and_output_weights=false", "output_form=multiplier")
    with built(tiny(*tied, "use_distributed_optimizer=true")) as state:
        train_steps(state, 1)
        save_state(state, tmp_path)
    keys = [key for key in stored_tensors(tmp_path) if "exp_avg." in key]
    assert "optimizer.state.exp_avg.embedding.word_embeddings.weight" in keys
    assert len(keys) == 5


def test_learning_rates_and_decays_are_the_configurations_and_not_the_checkpoints(
    saved: Saved,
) -> None:
    folder, _ = saved("adam", "false", "plain")
    other = ("lr=0.5", "adam_eps=1e-3", "adam_beta2=0.5", "weight_decay=0.25")
    for layout in LAYOUTS:
        with built(run_of("adam", "false", layout, *other)) as state:
            groups = [dict(group, params=None) for group in state.optimizer.param_groups]
            load_state(state, folder)
            assert [dict(g, params=None) for g in state.optimizer.param_groups] == groups
            assert {group["betas"] for group in state.optimizer.param_groups} == {(0.9, 0.5)}


class CountsInItsGroups(torch.optim.Optimizer):
    """Keeps its step where the fused Adam of TransformerEngine and apex do."""

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1


def test_a_step_that_is_counted_in_the_groups_is_saved_and_restored(saved: Saved) -> None:
    with built(run_of("adam", "false", "plain")) as state:
        (part,) = state.optimizer.chained_optimizers
        part.optimizer = CountsInItsGroups(part.optimizer.param_groups, {})
        for _ in range(5):
            part.optimizer.step()
        tree = optimizer_tree(state, model_tree(state), loading=False)
        assert tree["step"] == 5
        folder, _ = saved("adam", "false", "plain")
        load_state(state, folder)
        assert {group["step"] for group in part.optimizer.param_groups} == {3}
        assert all(set(s) == {"exp_avg", "exp_avg_sq"} for s in part.optimizer.state.values())


def test_a_state_without_a_step_count_is_refused() -> None:
    with built(tiny()) as state:
        tree = optimizer_tree(state, model_tree(state), loading=True)
        with pytest.raises(CheckpointError, match=r"no step count \(found None\).*finetune=true"):
            load_optimizer_tree(state, tree)


def test_the_optimizers_memory_is_what_the_tree_holds() -> None:
    # Reading goes straight into it, and saving copies nothing.
    with built(run_of("adam", "true", "distributed")) as state:
        tree = optimizer_tree(state, model_tree(state), loading=True)
        name = "0.decoder.layers.0.mlp.linear_fc2.weight"
        (piece,) = tree["tensors"][name]["exp_avg"].values()
        assert piece.global_offset == (0, 0, 0)
        assert piece.global_shape == (2, 64, 256)
        inner = state.optimizer.chained_optimizers[0].optimizer
        memory = {moments["exp_avg"].data_ptr() for moments in inner.state.values()}
        assert piece.data.data_ptr() in memory
        assert "step" not in tree


@pytest.mark.parametrize(
    ("shape", "start", "stop", "expected"),
    [
        ((10,), 3, 7, [((3,), (4,))]),
        ((4, 5), 0, 20, [((0, 0), (4, 5))]),
        ((4, 5), 5, 15, [((1, 0), (2, 5))]),
        ((4, 5), 6, 9, [((1, 1), (1, 3))]),
        ((4, 5), 3, 18, [((0, 3), (1, 2)), ((1, 0), (2, 5)), ((3, 0), (1, 3))]),
        ((4, 5), 3, 7, [((0, 3), (1, 2)), ((1, 0), (1, 2))]),
        ((4, 5), 7, 7, []),
        ((4, 5), 9, 3, []),
    ],
)
def test_a_range_of_a_matrix_is_cut_into_a_head_whole_rows_and_a_tail(
    shape: tuple[int, ...], start: int, stop: int, expected: list[Any]
) -> None:
    assert boxes(shape, start, stop) == expected


@pytest.mark.parametrize("shape", [(7,), (3, 4), (2, 3, 4)])
def test_boxes_hold_the_elements_of_their_range_in_order(shape: tuple[int, ...]) -> None:
    whole = torch.arange(torch.Size(shape).numel()).view(shape)
    for start, stop in itertools.combinations(range(whole.numel() + 1), 2):
        held: list[int] = []
        for offset, size in boxes(shape, start, stop):
            cut = tuple(slice(o, o + s) for o, s in zip(offset, size, strict=True))
            held += whole[cut].flatten().tolist()
        assert held == list(range(start, stop))
