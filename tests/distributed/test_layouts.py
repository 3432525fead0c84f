"""TP=2, PP=2 and DP=2 over gloo: one rank's initial weights exactly, its losses to 1e-5."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_mup.training.processes import Launch
from tests.configurations import tiny
from tests.distributed.spawn import run_ranks
from tests.distributed.worker import run_cell

pytestmark = [pytest.mark.dist, pytest.mark.xdist_group("layouts")]

COMMON = [
    "num_layers=4",
    "base_num_layers=4",
    "train_iters=10",
    "global_batch_size=8",
    "lr_warmup_iters=3",
    "weight_decay=0.01",
    "clip_grad=0.5",
]
MODELS = {
    "mup": ["norm_gain=vector"],
    "tied_gqa": [
        "untie_embeddings_and_output_weights=false",
        "output_form=multiplier",
        "num_query_groups=2",
        "activation=swiglu",
    ],
    "biases_lion": ["add_bias_linear=true", "optimizer.optimizer=lion", "q_init=zero"],
}
LAYOUTS = {
    "tp2": ["tensor_model_parallel_size=2"],
    "pp2": ["pipeline_model_parallel_size=2"],
    "dp2": [],
}
CELLS = {
    f"{model}-{layout}": [*COMMON, *MODELS[model], *LAYOUTS[layout]]
    for model in MODELS
    for layout in LAYOUTS
}
Cell = tuple[dict[str, np.ndarray], dict[str, Any]]


@pytest.fixture(scope="module")
def one_rank() -> dict[str, Cell]:
    """Each model on one rank, in this process."""
    return {model: run_cell(tiny(*COMMON, *options), Launch()) for model, options in MODELS.items()}


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every cell on two ranks, all in one pair of processes."""
    folder = tmp_path_factory.mktemp("layouts")
    run_ranks("tests.distributed.worker", {"world_size": 2, "cells": CELLS}, folder)
    return folder


def shard_of(whole: np.ndarray, local: np.ndarray, place: dict[str, int]) -> np.ndarray:
    """The part of a whole tensor that a rank should hold, by comparing shapes axis by axis."""
    for axis, (full, part) in enumerate(zip(whole.shape, local.shape, strict=True)):
        if full != part:
            assert part * place["tensor_size"] == full
            return np.split(whole, place["tensor_size"], axis=axis)[place["tensor_rank"]]
    return whole


@pytest.mark.parametrize("cell", list(CELLS))
def test_layout_starts_from_the_weights_of_one_rank(
    cell: str, two_ranks: Path, one_rank: dict[str, Cell]
) -> None:
    whole, _ = one_rank[cell.split("-")[0]]
    seen = set()
    for rank in range(2):
        local = np.load(two_ranks / f"{cell}.rank{rank}.npz")
        place = json.loads((two_ranks / f"{cell}.rank{rank}.json").read_text())
        for name in local.files:
            np.testing.assert_array_equal(
                local[name], shard_of(whole[name], local[name], place), err_msg=name
            )
        seen.update(local.files)
    assert seen == set(whole)


@pytest.mark.parametrize("cell", list(CELLS))
def test_layout_gives_the_losses_and_gradient_norms_of_one_rank(
    cell: str, two_ranks: Path, one_rank: dict[str, Cell]
) -> None:
    _, expected = one_rank[cell.split("-")[0]]
    assert expected["losses"][-1] < expected["losses"][0]
    assert min(expected["norms"]) > 0
    for rank in range(2):
        found = json.loads((two_ranks / f"{cell}.rank{rank}.json").read_text())
        assert found["losses"] == pytest.approx(expected["losses"], abs=1e-5)
        assert found["norms"] == pytest.approx(expected["norms"], rel=1e-4)
