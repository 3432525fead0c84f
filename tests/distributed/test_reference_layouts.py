"""Presets under tensor and pipeline parallelism: the paper's own trajectories.

And the parts that this package adds to GPTModel, the unembedding bias and the embedding norm: one
rank's losses, gradients and values on every kind of layout, and a resume on another one.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch.distributed.checkpoint import FileSystemReader

from megatron_mup.training.processes import Launch, parallel_processes
from tests.configurations import tiny
from tests.distributed.checkpoint_worker import trajectory
from tests.distributed.reference_worker import ADDED, train_cell
from tests.distributed.spawn import run_ranks
from tests.training.trajectories import EXPECTED, Trajectory, check_against_the_paper

# The first test waits for all ranks' work, which takes long while other jobs use the machine.
pytestmark = [pytest.mark.dist, pytest.mark.timeout(900)]

RANKS = 2
TP2, PP2 = "tensor_model_parallel_size=2", "pipeline_model_parallel_size=2"

OF_THE_PAPER: dict[str, dict[str, list[str]]] = {
    "TP2": {
        # F = 341 does not divide by 2: one dead neuron more makes 342.
        name: ["ffn_multiplier=2.672"] if name == "swiglu" else []
        for name in EXPECTED
    },
    "PP2": {name: [] for name in EXPECTED},
}
"""Layout -> experiment -> options beside the layout's."""

COMMON = (
    "train_iters=6",
    "global_batch_size=8",
    "micro_batch_size=2",
    "lr_warmup_iters=2",
    "lr_warmup_init_ratio=0.1",
    "weight_decay=0.01",
    "weight_decay_mask=all",
    "clip_grad=0.5",
)
CELLS: dict[str, tuple[str, ...]] = {
    "bias": ("unembedding_bias=true", "norm_gain=vector"),
    "tied bias": (
        "unembedding_bias=true",
        "untie_embeddings_and_output_weights=false",
        "output_form=multiplier",
    ),
    "embedding norm": (
        "embedding_norm=true",
        "norm_gain=vector",
        "output_form=multiplier",
        "embedding_multiplier=2",
    ),
    "embedding norm without gain": ("embedding_norm=true",),
    "scalar embedding norm, all biases": (
        "embedding_norm=true",
        "norm_gain=scalar",
        "unembedding_bias=true",
        "add_bias_linear=true",
    ),
}
LAYOUTS: dict[str, list[str]] = {
    "TP2": [TP2],
    "TP2+SP": [TP2, "sequence_parallel=true"],
    "PP2": [PP2],
    "DP2 sharded": ["use_distributed_optimizer=true", "micro_batch_size=1"],
}
DEFECTS = {"TP2+SP": {"embedding norm": "norm gains' gradients not summed"}}

SAVED = ["unembedding_bias=true", "embedding_norm=true", "norm_gain=vector", "lr_decay_iters=6"]
CHECKPOINTS: dict[str, dict[str, Any]] = {
    "untied": {
        "common": SAVED,
        "layouts": {
            "tp2": [TP2],
            "pp2": [PP2],
            "dp2 distributed optimizer": ["use_distributed_optimizer=true"],
        },
    },
    "tied": {
        "common": [*SAVED, *CELLS["tied bias"]],
        "layouts": {"tp2": [TP2], "pp2": [PP2]},
    },
}
"""Model -> options, and the layouts that it is saved on and resumed on."""


class Results:
    """What the ranks wrote."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def ranks(self, layout: str, name: str) -> list[dict[str, Any]]:
        """Each rank's result of an experiment or a cell."""
        paths = [self.folder / f"{layout}-{name}.rank{rank}.json" for rank in range(RANKS)]
        return [json.loads(path.read_text()) for path in paths]

    def whole(self, layout: str, name: str, kind: str) -> dict[str, np.ndarray]:
        """Gradients or values of the added parameters, put together from all ranks."""
        ranks = [rank[kind] for rank in self.ranks(layout, name)]
        parts = {key: [rank[key] for rank in ranks if key in rank] for key in ADDED}
        whole = {}
        for key, found in parts.items():
            # Only the vocabulary is ever split.
            if key == "output_layer.bias" and "TP2" in layout and found:
                whole[key] = np.concatenate(found)
            elif found:
                assert found == [found[0]] * len(found)
                whole[key] = np.array(found[0])
        return whole


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    """Everything that two ranks do, in one spawn."""
    folder = tmp_path_factory.mktemp("layouts")
    layouts = {
        name: {
            "options": options,
            "experiments": OF_THE_PAPER.get(name, {}),
            "cells": {cell: [*COMMON, *model] for cell, model in CELLS.items()},
            "defects": DEFECTS.get(name, {}),
        }
        for name, options in LAYOUTS.items()
    }
    job = {"world_size": RANKS, "layouts": layouts, "checkpoints": CHECKPOINTS}
    run_ranks("tests.distributed.reference_worker", job, folder, timeout=550)
    return Results(folder)


@pytest.fixture(scope="module")
def one_rank() -> dict[str, dict[str, Any]]:
    """Every cell in this process."""
    found = {}
    for cell, model in CELLS.items():
        run = tiny(*COMMON, *model)
        with parallel_processes(run, Launch()):
            found[cell] = train_cell(run, Launch())
    return found


@pytest.fixture(scope="module")
def uninterrupted() -> dict[str, list[float]]:
    """Six steps of one rank for each model that is saved."""
    return {
        name: trajectory([*model["common"], "train_iters=6"], Launch())["lm loss"]
        for name, model in CHECKPOINTS.items()
    }


@pytest.mark.parametrize(
    ("layout", "experiment"),
    [(layout, name) for layout, names in OF_THE_PAPER.items() for name in names],
)
def test_preset_on_two_ranks_reproduces_the_papers_own_trajectory(
    layout: str, experiment: str, results: Results
) -> None:
    ranks = [Trajectory(**rank) for rank in results.ranks(layout, experiment)]
    check_against_the_paper(experiment, ranks)


@pytest.mark.parametrize("cell", list(CELLS))
@pytest.mark.parametrize("layout", list(LAYOUTS))
def test_added_parts_train_as_on_one_rank(
    layout: str, cell: str, results: Results, one_rank: dict[str, dict[str, Any]]
) -> None:
    expected = one_rank[cell]
    for rank in results.ranks(layout, cell):
        assert rank["losses"] == pytest.approx(expected["losses"], abs=1e-5)
        assert rank["norms"] == pytest.approx(expected["norms"], rel=1e-4)
    values = results.whole(layout, cell, "values")
    assert set(values) == set(expected["values"])
    for name, value in values.items():
        np.testing.assert_allclose(value, expected["values"][name], rtol=0, atol=2e-5)


@pytest.mark.parametrize("cell", [name for name in CELLS if "without gain" not in name])
@pytest.mark.parametrize("layout", [name for name in LAYOUTS if "sharded" not in name])
def test_gradients_of_added_parts_are_those_of_one_rank(
    layout: str, cell: str, results: Results, one_rank: dict[str, dict[str, Any]]
) -> None:
    expected = one_rank[cell]["gradients"]
    gradients = results.whole(layout, cell, "gradients")
    assert set(gradients) == set(expected)
    for name, gradient in gradients.items():
        assert np.abs(gradient).max() > 1e-4
        np.testing.assert_allclose(gradient, expected[name], rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("cell", ["bias", "tied bias", "scalar embedding norm, all biases"])
def test_readout_biases_leave_zero_by_steps_of_the_base_rate(
    cell: str, one_rank: dict[str, dict[str, Any]]
) -> None:
    bias = np.array(one_rank[cell]["values"]["output_layer.bias"])
    # The schedule's factors are .1, .55, 1, .75, .5, .25: 3.15 AdamW steps of 2^-6, in one
    # direction for some ids. A hidden tensor's rate would take them half as far.
    assert bias.shape == (96,)
    assert (bias != 0).all()
    assert 2.5 * 2**-6 < np.abs(bias).max() < 3.5 * 2**-6


@pytest.mark.parametrize(("layout", "cells"), DEFECTS.items())
def test_a_gain_whose_gradient_is_not_summed_is_seen(
    layout: str, cells: dict[str, str], results: Results, one_rank: dict[str, dict[str, Any]]
) -> None:
    for cell, defect in cells.items():
        expected = np.array(one_rank[cell]["gradients"]["embedding.norm.weight"])
        for rank in results.ranks(layout, defect):
            found = np.array(rank["gradients"]["embedding.norm.weight"])
            assert np.abs(found - expected).max() > 0.1 * np.abs(expected).max()


@pytest.mark.parametrize(
    ("model", "saver", "reader"),
    [
        (model, saver, reader)
        for model, job in CHECKPOINTS.items()
        for saver in job["layouts"]
        for reader in job["layouts"]
    ],
)
def test_a_resume_on_another_layout_keeps_the_added_parts(
    model: str, saver: str, reader: str, results: Results, uninterrupted: dict[str, list[float]]
) -> None:
    resumed = json.loads((results.folder / "resumed.json").read_text())[model][saver][reader]
    found = resumed["lm loss"]
    assert len(found) == 3
    assert found == pytest.approx(uninterrupted[model][3:], abs=1e-5)


@pytest.mark.parametrize("model", list(CHECKPOINTS))
def test_added_parts_are_saved_whole_under_their_names(model: str, results: Results) -> None:
    for saver in CHECKPOINTS[model]["layouts"]:
        reader = FileSystemReader(results.folder / model / saver / "iter_0000003")
        stored = reader.read_metadata().state_dict_metadata
        assert tuple(stored["output_layer.bias"].size) == (96,)
        assert tuple(stored["embedding.norm.weight"].size) == (64,)
        assert ("output_layer.weight" in stored) is (model == "untied")
