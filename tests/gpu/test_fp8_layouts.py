"""What only GPUs can run: FP8 recipes, context parallelism, sharded layouts of TransformerEngine.

One spawned job per number of GPUs; layouts that need more GPUs than the machine has are not
collected.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.distributed.spawn import run_ranks
from tests.gpu.conftest import Measured

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(900)]

# Widths and tokens are multiples of 128, the largest block of a recipe.
COMMON = (
    "transformer_impl=transformer_engine",
    "bf16=true",
    "num_layers=4",
    "base_num_layers=4",
    "hidden_size=256",
    "vocab_size=512",
    "seq_length=128",
    "train_iters=10",
    "global_batch_size=8",
    "lr_warmup_iters=3",
    "weight_decay=0.01",
    "clip_grad=0.1",
)
FP8 = ("fp8_format=hybrid",)
TP2, CP2 = "tensor_model_parallel_size=2", "context_parallel_size=2"
SHARDED = (
    "use_distributed_optimizer=true",
    "overlap_grad_reduce=true",
    "overlap_param_gather=true",
)
Layouts = dict[str, tuple[int, tuple[str, ...]]]
LAYOUTS: Layouts = {
    "FP8 delayed": (1, (*FP8, "fp8_recipe=delayed", "fp8_amax_history_len=16")),
    "FP8 tensorwise": (1, (*FP8, "fp8_recipe=tensorwise")),
    "FP8 blockwise": (1, (*FP8, "fp8_recipe=blockwise")),
    "FP8 ends in bf16": (1, (*FP8, "fp8_recipe=tensorwise", "first_last_layers_bf16=true")),
    "FP8 weights": (
        1,
        (*FP8, "fp8_recipe=tensorwise", *SHARDED, "fp8_param_gather=true"),
    ),
    "recompute full": (
        1,
        ("recompute_granularity=full", "recompute_method=uniform", "recompute_num_layers=1"),
    ),
    "recompute selective": (1, ("recompute_granularity=selective",)),
    "TP2+SP": (2, (TP2, "sequence_parallel=true")),
    "CP2": (2, (CP2,)),
    "DP2 sharded overlap": (2, (*SHARDED, "micro_batch_size=1")),
    "PP2 virtual": (
        2,
        ("pipeline_model_parallel_size=2", "virtual_pipeline_model_parallel_size=2"),
    ),
    "TP2+SP FP8": (2, (TP2, "sequence_parallel=true", *FP8, "fp8_recipe=tensorwise")),
    "DP2 FP8 weights": (
        2,
        (*SHARDED, *FP8, "fp8_recipe=tensorwise", "fp8_param_gather=true", "micro_batch_size=1"),
    ),
    "CP2xTP2+SP FP8": (4, (CP2, TP2, "sequence_parallel=true", *FP8, "fp8_recipe=delayed")),
}
DETERMINISTIC = ("deterministic run", "deterministic run again")
FITTING = [
    name for name, (ranks, _) in LAYOUTS.items() if ranks <= max(1, torch.cuda.device_count())
]


def _cells(ranks: int) -> dict[str, tuple[str, ...]]:
    cells = {name: LAYOUTS[name][1] for name in FITTING if LAYOUTS[name][0] == ranks}
    if ranks == 1:
        cells |= {"reference": ()} | dict.fromkeys(DETERMINISTIC, ("deterministic_mode=true",))
    return cells


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    """Each cell's reports, one for each rank."""
    found = {}
    for ranks in sorted({LAYOUTS[name][0] for name in FITTING}):
        folder: Path = tmp_path_factory.mktemp(f"gpus{ranks}")
        layouts = [
            {
                "patches": [],
                "cells": [
                    {
                        "name": name.replace(" ", "_"),
                        "overrides": [*COMMON, *options],
                        "mutation": [],
                        "masked": True,
                    }
                ],
            }
            for name, options in _cells(ranks).items()
        ]
        job = {"world_size": ranks, "layouts": layouts}
        run_ranks("tests.distributed.worker", job, folder, timeout=800)
        for name in _cells(ranks):
            stem = name.replace(" ", "_")
            found[name] = [
                json.loads((folder / f"{stem}.rank{rank}.json").read_text())
                for rank in range(ranks)
            ]
    return found


@pytest.mark.parametrize("layout", FITTING)
def test_layout_follows_the_bf16_run_of_one_gpu(
    layout: str, reports: dict[str, list[dict[str, Any]]], measured: Measured
) -> None:
    (expected,) = reports["reference"]
    # On a CPU, bf16 is at most 0.0004 nats and 0.07% of a norm from fp32 in these ten steps; E4M3
    # rounds 16 times as coarsely. About five times as much is allowed, and ten to the norms.
    tolerance = 0.03 if "FP8" in layout else 0.003
    assert expected["losses"][-1] < expected["losses"][0] - 5 * tolerance
    for report in reports[layout]:
        difference = np.array(report["losses"]) - np.array(expected["losses"])
        norms = np.array(report["norms"]) / np.array(expected["norms"]) - 1
        measured("largest difference of losses, nats", float(np.abs(difference).max()))
        measured("largest relative difference of norms", float(np.abs(norms).max()))
        assert np.abs(difference).max() < tolerance
        assert report["norms"] == pytest.approx(expected["norms"], rel=4 * tolerance)


def test_fp8_changes_the_computation(reports: dict[str, list[dict[str, Any]]]) -> None:
    (expected,) = reports["reference"]
    recipes = [name for name in FITTING if LAYOUTS[name][0] == 1 and "FP8" in name]

    assert all(reports[name][0]["losses"] != expected["losses"] for name in recipes)


def test_deterministic_runs_are_equal_bit_for_bit(
    reports: dict[str, list[dict[str, Any]]],
) -> None:
    first, again = (reports[name][0] for name in DETERMINISTIC)

    assert (first["losses"], first["norms"]) == (again["losses"], again["norms"])
