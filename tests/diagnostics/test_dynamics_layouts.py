"""Update dynamics over gloo: every layout measures what one rank measures."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import pytest

from megatron_mup.diagnostics.dynamics_records import Measured, read_dynamics
from megatron_mup.training.processes import Launch
from tests.diagnostics.dynamics_worker import measure
from tests.distributed.spawn import run_ranks

pytestmark = [pytest.mark.dist, pytest.mark.timeout(600)]

COMMON = (
    "train_iters=4",
    "diagnostics_interval=2",
    "global_batch_size=8",
    "weight_decay=0.01",
    "num_layers=4",
    "base_num_layers=4",
    # An Adam step hardly depends on a gradient's size: elements near zero would amplify rounding.
    "adam_eps=1e-3",
)
MODELS: dict[str, tuple[str, ...]] = {
    "gqa": (
        "num_query_groups=2",
        "activation=swiglu",
        "add_bias_linear=true",
        "norm_gain=vector",
        "output_form=multiplier",
    ),
    "tied": (
        "untie_embeddings_and_output_weights=false",
        "norm_gain=scalar",
        "output_form=multiplier",
    ),
    "bf16": ("bf16=true",),
    "muon": ("optimizer.optimizer=muon",),
}
TP2, PP2 = "tensor_model_parallel_size=2", "pipeline_model_parallel_size=2"
SHARDED = "use_distributed_optimizer=true"


@dataclass(frozen=True)
class Layout:
    """A model on two ranks, and what a worker changes for it."""

    model: str
    overrides: tuple[str, ...]
    patches: tuple[str, ...] = ()


LAYOUTS = {
    "TP2": Layout("gqa", (TP2,)),
    "TP2 and sequence parallel": Layout("gqa", (TP2, "sequence_parallel=true")),
    "PP2": Layout("gqa", (PP2,)),
    "PP2 virtual, tied": Layout("tied", (PP2, "virtual_pipeline_model_parallel_size=2")),
    "DP2": Layout("gqa", ()),
    "DP2 sharded": Layout("gqa", (SHARDED,)),
    "DP2 sharded overlap": Layout(
        "tied",
        (SHARDED, "overlap_grad_reduce=true", "overlap_param_gather=true"),
        ("small buckets",),
    ),
    "DP2 sharded bf16": Layout("bf16", (SHARDED,)),
    "DP2 layer-wise Muon": Layout("muon", (SHARDED,)),
    "CP2": Layout("gqa", ("context_parallel_size=2",), ("context parallelism on the CPU",)),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the ranks of all layouts wrote."""
    output = tmp_path_factory.mktemp("dynamics")
    cells = {
        name: {**asdict(layout), "overrides": [*COMMON, *MODELS[layout.model], *layout.overrides]}
        for name, layout in LAYOUTS.items()
    }
    job = {"world_size": 2, "cells": cells}
    run_ranks("tests.diagnostics.dynamics_worker", job, output, timeout=500)
    for name, options in MODELS.items():
        measure([*COMMON, *options], output / f"one rank {name}.jsonl", Launch())
    return output


def by_name(measured: list[Measured]) -> dict[str, float]:
    """All values of one iteration."""
    return {
        f"{quantity} of {item.tensor}": value
        for item in measured
        for quantity, value in item.values.items()
    }


@pytest.mark.parametrize("name", LAYOUTS)
def test_layout_measures_what_one_rank_measures(name: str, folder: Path) -> None:
    layout = LAYOUTS[name]
    expected = read_dynamics(folder / f"one rank {layout.model}.jsonl")
    found = read_dynamics(folder / f"{name}.jsonl")

    assert list(found) == list(expected) == [2, 4]
    # One rounding of a bf16 activation that falls the other way moves more than fp32's.
    tolerance = 1e-3 if layout.model == "bf16" else 1e-5
    for iteration, measured in expected.items():
        wanted = by_name(measured)
        assert by_name(found[iteration]) == pytest.approx(wanted, rel=tolerance, nan_ok=True)


@pytest.mark.parametrize("name", LAYOUTS)
def test_all_ranks_report_the_same_means(name: str, folder: Path) -> None:
    first, second = (json.loads((folder / f"means.rank{rank}.json").read_text()) for rank in (0, 1))

    assert first[name] == second[name]
    assert [row["iteration"] for row in first[name]] == [2, 4]
