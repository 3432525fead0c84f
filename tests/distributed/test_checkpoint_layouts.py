"""A checkpoint of any layout is resumed on any other: the same losses to 1e-5."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_mup.training.processes import Launch
from tests.distributed.checkpoint_worker import losses_of
from tests.distributed.spawn import run_ranks

pytestmark = [pytest.mark.dist]

COMMON = [
    "num_layers=4",
    "base_num_layers=4",
    "norm_gain=vector",
    "lr_decay_iters=6",
    "lr_warmup_iters=2",
    "weight_decay=0.01",
    "clip_grad=0.5",
]
LAYOUTS = {
    "tp2": ["tensor_model_parallel_size=2"],
    "pp2": ["pipeline_model_parallel_size=2"],
    "pp2 virtual": [
        "pipeline_model_parallel_size=2",
        "virtual_pipeline_model_parallel_size=2",
    ],
    "dp2": [],
    "dp2 distributed optimizer": ["use_distributed_optimizer=true"],
}

Losses = dict[str, dict[str, list[float]]]


@pytest.fixture(scope="module")
def uninterrupted() -> list[float]:
    """Six steps of one rank."""
    return losses_of([*COMMON, "train_iters=6"], Launch())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Everything that two ranks save, and what they find on resuming it."""
    path = tmp_path_factory.mktemp("checkpoints")
    job = {"world_size": 2, "layouts": LAYOUTS, "common": COMMON}
    run_ranks("tests.distributed.checkpoint_worker", job, path)
    return path


@pytest.fixture(scope="module")
def found(folder: Path) -> Losses:
    """Losses by layout of the save and of the resume."""
    losses: Losses = json.loads((folder / "losses.json").read_text())
    return losses


@pytest.mark.parametrize("reader", list(LAYOUTS))
@pytest.mark.parametrize("saver", list(LAYOUTS))
def test_a_resume_on_another_layout_gives_the_uninterrupted_losses(
    saver: str, reader: str, found: Losses, uninterrupted: list[float]
) -> None:
    assert len(found[saver][reader]) == 3
    assert found[saver][reader] == pytest.approx(uninterrupted[3:], abs=1e-5)


@pytest.mark.parametrize("options", [[], ["use_distributed_optimizer=true"]])
@pytest.mark.parametrize("saver", list(LAYOUTS))
def test_one_rank_resumes_what_two_have_saved(
    saver: str, options: list[str], folder: Path, uninterrupted: list[float]
) -> None:
    resumed = [*COMMON, *options, "train_iters=6", f"load={folder / saver}"]
    assert losses_of(resumed, Launch()) == pytest.approx(uninterrupted[3:], abs=1e-5)
