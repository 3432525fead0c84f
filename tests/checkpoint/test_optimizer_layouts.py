"""Optimizer states over two ranks: all layouts store and read the same tensors; Muon as well."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_mup.training.processes import Launch
from tests.checkpoint.optimizer_worker import trained
from tests.configurations import tiny
from tests.distributed.spawn import run_ranks
from tests.optimizer.trained_runs import stored_tensors

pytestmark = [pytest.mark.dist]

COMMON = [
    "activation=swiglu",
    "norm_gain=vector",
    "add_bias_linear=true",
    "num_query_groups=2",
    "train_iters=10",
    "global_batch_size=8",
    "lr_warmup_iters=3",
    "weight_decay=0.01",
    "clip_grad=0.5",
]
TIED = ["untie_embeddings_and_output_weights=false", "output_form=multiplier"]
LAYOUTS = {
    "data": [],
    "sharded": ["use_distributed_optimizer=true"],
    "tensor": ["tensor_model_parallel_size=2"],
    # Each stage is alone in its data-parallel group, and has the tied matrix in it.
    "pipeline": ["pipeline_model_parallel_size=2", "use_distributed_optimizer=true"],
}
FAMILIES = {
    "adam": [*TIED],
    "bf16": ["bf16=true"],
    "lion": ["optimizer.optimizer=lion"],
    "muon": ["optimizer.optimizer=muon", *TIED],
}
CELLS = {
    f"{family}-{layout}": [*COMMON, *FAMILIES[family], *LAYOUTS[layout]]
    for family in FAMILIES
    for layout in LAYOUTS
}
CELLS["distributed-tensor"] = [*CELLS["muon-tensor"], "muon_tp_mode=distributed"]
MOVES = [
    (f"{family}-{source}", f"{family}-{target}")
    for family, pairs in {
        "adam": "data>sharded sharded>data sharded>tensor tensor>pipeline pipeline>sharded",
        "bf16": "sharded>sharded data>sharded sharded>tensor",
        "lion": "sharded>tensor tensor>sharded",
        "muon": "sharded>sharded sharded>pipeline tensor>sharded pipeline>tensor",
    }.items()
    for source, target in (pair.split(">") for pair in pairs.split())
]
MUON = [*(f"muon-{layout}" for layout in LAYOUTS), "distributed-tensor"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Everything on two ranks, in one pair of processes."""
    path = tmp_path_factory.mktemp("optimizer_layouts")
    saved = sorted({cell for move in MOVES for cell in move})
    job = {"world_size": 2, "cells": CELLS, "trained": MUON, "saved": saved, "moved": MOVES}
    run_ranks("tests.checkpoint.optimizer_worker", job, path, timeout=400)
    return path


@pytest.fixture(scope="module")
def ranks(folder: Path) -> list[dict[str, Any]]:
    """What the two ranks report."""
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize(("source", "target"), MOVES)
def test_another_layout_reads_the_state_and_writes_it_again_to_the_last_bit(
    source: str, target: str, folder: Path
) -> None:
    first, again = stored_tensors(folder / source), stored_tensors(folder / f"{source}>{target}")
    assert set(first) == set(again)
    assert any(key.startswith("optimizer.state.") for key in first)
    for key, tensor in first.items():
        assert torch.equal(tensor, again[key]), key


@pytest.mark.parametrize(("source", "target"), MOVES)
def test_a_moved_run_goes_on_with_the_losses_of_one_that_stayed(
    source: str, target: str, ranks: list[dict[str, Any]]
) -> None:
    # bf16 adds up over layouts: there the tensors are compared, and the same layout's losses.
    expected = ranks[0]["saved"][target]["losses"]
    tolerance = 2e-2 if source.startswith("bf16") and source != target else 1e-5
    for rank in ranks:
        found = rank["moved"][f"{source}>{target}"]["losses"]
        assert found == pytest.approx(expected, abs=tolerance)
        if source == target:
            assert found == expected


@pytest.mark.parametrize("family", ["adam", "bf16"])
def test_each_rank_of_the_distributed_optimizer_writes_its_share_and_no_more(
    family: str, ranks: list[dict[str, Any]]
) -> None:
    whole = ranks[0]["saved"][f"{family}-data"]["held"]
    shares = [rank["saved"][f"{family}-sharded"]["held"] for rank in ranks]
    assert sum(shares) == whole
    # Buckets are padded: not exactly half.
    assert min(shares) > 0.4 * whole


@pytest.mark.parametrize("cell", MUON)
def test_muon_gives_the_losses_of_one_rank_on_every_layout(
    cell: str, ranks: list[dict[str, Any]]
) -> None:
    expected = trained(tiny(*COMMON, *FAMILIES["muon"]), Launch())
    assert expected[-1] < expected[0]
    for rank in ranks:
        assert rank["trained"][cell] == pytest.approx(expected, abs=1e-5)
