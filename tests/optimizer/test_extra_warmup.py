"""Extra warmups (arXiv:2510.19093): their values, whose rate they multiply, and resuming inside."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from megatron_mup.config import RunConfig
from megatron_mup.config_io import config_from_dict
from megatron_mup.errors import CheckpointError
from megatron_mup.optimizer.build import apply_schedule
from megatron_mup.optimizer.schedule import extra_warmup, run_factor
from megatron_mup.parameterization.presets import preset_settings
from megatron_mup.training.role_metrics import learning_rates
from megatron_mup.training.state import TrainState
from tests.checkpoint.short_runs import folders, losses, run_training
from tests.configurations import tiny
from tests.distributed.spawn import run_ranks
from tests.optimizer.built_runs import built, group_of

IMPLIED = ("extra_warmup=implied_mup", "weight_decay=0.1", "weight_decay_mode=coupled")
EXPONENTIAL = ("extra_warmup=exponential", "extra_warmup_iters=4")
# Rates that nothing divides: embedding and matrices share a group but for the warmup.
SP = ("name=sp",)
DIVIDED = ("linear_qkv", "linear_proj", "linear_fc1", "linear_fc2", "output_layer")


def factor(run: RunConfig, step: int, ratio: float, decay_per_step: float) -> float:
    extra = extra_warmup(run, step)
    assert extra is not None
    return extra(ratio, decay_per_step)


def test_the_implied_warmup_is_equation_11() -> None:
    run = tiny(*IMPLIED)
    # m = 4 and a = 1/2: 1/4, 1/sqrt(19/4), 1/sqrt(31/16).
    literals = [0.25, 0.45883146774112354, 0.7184212081070996]
    assert [factor(run, step, 4.0, 0.5) for step in range(3)] == pytest.approx(literals)


@pytest.mark.parametrize(("ratio", "decay"), [(2.0, 0.01), (16.0, 0.0015625), (64.0, 0.2)])
def test_the_implied_warmup_follows_a_norm_that_decays_to_its_equilibrium(
    ratio: float, decay: float
) -> None:
    # Its square against the equilibrium's, step by step: x <- a^2 x + (1 - a^2), from m^2.
    run, square, kept = tiny(*IMPLIED), ratio**2, 1.0 - decay
    for step in range(200):
        assert factor(run, step, ratio, decay) == pytest.approx(square**-0.5)
        square = kept**2 * square + (1.0 - kept**2)


def test_a_group_without_decay_rises_with_the_base_rates_decay() -> None:
    # lambda alpha = 0.1 / 64.
    run = tiny(*IMPLIED)
    assert factor(run, 100, 4.0, 0.0) == factor(run, 100, 4.0, 0.0015625)
    # Independent: lambda itself.
    free = tiny("extra_warmup=implied_mup", "weight_decay=0.001", "weight_decay_mode=independent")
    assert factor(free, 100, 4.0, 0.0) == factor(free, 100, 4.0, 0.001)


def test_the_exponential_warmup_doubles_in_equal_times() -> None:
    run = tiny("extra_warmup=exponential", "extra_warmup_iters=8")
    values = [factor(run, step, 16.0, 0.3) for step in (0, 2, 4, 6, 8, 100)]
    assert values == pytest.approx([0.0625, 0.125, 0.25, 0.5, 1.0, 1.0])


def test_without_an_extra_warmup_there_is_no_factor() -> None:
    assert extra_warmup(tiny(), 0) is None


def preset(name: str) -> RunConfig:
    return config_from_dict(preset_settings(name, width=512), ["num_layers=1"])


@pytest.mark.parametrize("name", ["kosson_none_implied", "kosson_none_exponential"])
def test_undivided_rates_with_an_extra_warmup_start_as_mup_and_end_undivided(name: str) -> None:
    run = preset(name)
    # alpha = 2^-6, m = 4.
    started = learning_rates(run, 1.0, extra_warmup(run, 0))
    ended = learning_rates(run, 1.0, extra_warmup(run, 50_000))
    mup = learning_rates(preset("kosson_standard"), 1.0)
    for role in ("query", "key", "value", "attention_out", "ffn_in", "ffn_out"):
        assert started[f"learning-rate/{role}"] == pytest.approx(0.00390625)
        assert mup[f"learning-rate/{role}"] == pytest.approx(0.00390625)
        assert ended[f"learning-rate/{role}"] == pytest.approx(0.015625)
    for rates in (started, ended, mup):
        assert rates["learning-rate/embedding"] == 0.015625


@contextmanager
def at_step(run: RunConfig, step: int) -> Iterator[TrainState]:
    """A built run whose groups are set for one step."""
    with built(run) as state:
        decay = run.optimizer_numbers.weight_decay
        extra = extra_warmup(run, step)
        apply_schedule(state.optimizer, run_factor(run, step), weight_decay=decay, extra=extra)
        yield state


@pytest.mark.parametrize("optimizer", ["adam", "lion", "muon"])
@pytest.mark.parametrize("everything", [False, True])
def test_the_optimizer_multiplies_the_rates_of_the_chosen_roles(
    optimizer: str, everything: bool
) -> None:
    run = tiny(
        *SP,
        *EXPONENTIAL,
        f"extra_warmup_roles={'all' if everything else 'divided'}",
        f"optimizer.optimizer={optimizer}",
        "lr_decay_style=constant",
        "norm_gain=vector",
        "add_bias_linear=true",
    )
    # m = 2: 2^(t/4 - 1).
    for step, expected in ((0, 0.5), (2, 0.7071067811865476), (4, 1.0), (9, 1.0)):
        with at_step(run, step) as state:
            groups = group_of(state)
            for name, group in groups.items():
                matrix = name.endswith("weight") and any(part in name for part in DIVIDED)
                # Norm gains are fused under none of these names.
                matrix = matrix and "layer_norm" not in name
                wanted = expected if matrix or everything else 1.0
                assert group["lr"] == pytest.approx(0.015625 * wanted), name
            assert sum("linear_qkv.weight" in name for name in groups) == 2


def test_the_implied_warmup_of_a_group_uses_the_groups_own_decay() -> None:
    # mup, m = 2: coupled decay takes 0.1 alpha/2 from a matrix; 0.0015625 / 2 a step.
    run = tiny(*IMPLIED, "lr_decay_style=constant")
    with at_step(run, 300) as state:
        groups = group_of(state)
        kept = (1 - 0.00078125) ** 600
        wanted = 0.0078125 / (1 + 3 * kept) ** 0.5
        assert groups["decoder.layers.0.mlp.linear_fc1.weight"]["lr"] == pytest.approx(wanted)
        assert groups["embedding.word_embeddings.weight"]["lr"] == 0.015625


def elements(state: TrainState) -> dict[float, int]:
    """Elements trained at each fraction of the peak rate."""
    counts: dict[float, int] = {}
    for group in state.optimizer.param_groups:
        fraction = round(group["lr"] / group["max_lr"], 12)
        counts[fraction] = counts.get(fraction, 0) + sum(p.numel() for p in group["params"])
    return counts


@pytest.mark.parametrize("optimizer", ["adam", "lion"])
def test_the_distributed_optimizer_splits_the_groups_alike(optimizer: str) -> None:
    options = (*SP, *EXPONENTIAL, "lr_decay_style=constant", f"optimizer.optimizer={optimizer}")
    # Two layers of 12 M^2 and a readout of V M; the embedding's V M is left alone.
    expected = {0.5: 2 * 12 * 64**2 + 96 * 64, 1.0: 96 * 64}
    for sharded in ("false", "true"):
        with at_step(tiny(*options, f"use_distributed_optimizer={sharded}"), 0) as state:
            assert elements(state) == expected


RESUMED = {
    "implied": IMPLIED,
    "implied, all roles, sp": (*SP, *IMPLIED, "extra_warmup_roles=all"),
    "exponential, lion": ("extra_warmup=exponential", "extra_warmup_iters=8", "lr=0.001"),
    "exponential, sp, sharded": (
        *SP,
        "extra_warmup=exponential",
        "extra_warmup_iters=8",
        "use_distributed_optimizer=true",
    ),
}


@pytest.mark.parametrize("case", RESUMED)
def test_a_run_resumed_inside_the_warmup_equals_the_whole_one(case: str, tmp_path: Path) -> None:
    lion = ["optimizer.optimizer=lion"] if "lion" in case else []
    options = [*RESUMED[case], *lion, "lr_decay_iters=10", "lr_warmup_iters=2"]
    whole = run_training(tiny(*options, "train_iters=10"))
    first = run_training(tiny(*options, "train_iters=5", *folders(tmp_path)))
    second = run_training(tiny(*options, "train_iters=10", *folders(tmp_path, load=True)))
    assert losses(first) + losses(second) == losses(whole)
    assert len(losses(second)) == 5


def test_an_extra_warmup_changes_a_run() -> None:
    # The rate of its first step is 0: the second step still sees the initial weights.
    plain, warmed = (
        losses(run_training(tiny(*options, "lr_warmup_iters=1", "train_iters=3")))
        for options in ((), EXPONENTIAL)
    )
    assert plain[:2] == warmed[:2]
    assert plain[2] != warmed[2]


def test_resuming_with_another_extra_warmup_is_refused(tmp_path: Path) -> None:
    options = ["lr_decay_iters=8", "train_iters=2", "weight_decay=0.1"]
    run_training(tiny(*options, "train_iters=1", *folders(tmp_path)))
    with pytest.raises(CheckpointError, match="extra_warmup was none, now implied_mup"):
        run_training(tiny(*options, "extra_warmup=implied_mup", *folders(tmp_path, load=True)))


LAYOUTS = {
    "data": [],
    "sharded": ["use_distributed_optimizer=true"],
    "tensor": ["tensor_model_parallel_size=2"],
}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What two ranks report of every layout, saved after three steps and moved on."""
    path = tmp_path_factory.mktemp("extra_warmup")
    common = [*SP, *EXPONENTIAL, "train_iters=10", "global_batch_size=8", "weight_decay=0.01"]
    cells = {
        f"{optimizer}-{layout}": [*common, f"optimizer.optimizer={optimizer}", *options]
        for optimizer in ("adam", "lion")
        for layout, options in LAYOUTS.items()
    }
    moves = [(f"{kind}-sharded", f"{kind}-tensor") for kind in ("adam", "lion")]
    job = {"world_size": 2, "cells": cells, "trained": [], "saved": list(cells), "moved": moves}
    run_ranks("tests.checkpoint.optimizer_worker", job, path)
    return [json.loads((path / f"rank{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.dist
@pytest.mark.parametrize("kind", ["adam", "lion"])
def test_every_layout_takes_the_same_warmup(kind: str, ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        saved = {layout: rank["saved"][f"{kind}-{layout}"]["losses"] for layout in LAYOUTS}
        assert saved["sharded"] == pytest.approx(saved["data"], abs=2e-5)
        assert saved["tensor"] == pytest.approx(saved["data"], abs=2e-5)
        moved = rank["moved"][f"{kind}-sharded>{kind}-tensor"]["losses"]
        assert moved == pytest.approx(saved["tensor"], abs=2e-5)
