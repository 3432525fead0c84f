"""A checkpoint of any layout is resumed on any other: the same losses to 1e-5.

On the layout that has saved it they are the same to the last bit.
"""

from __future__ import annotations

import json
from itertools import permutations, product

import pytest

from megatron_mup.training.processes import Launch
from tests.distributed.checkpoint_worker import Found, Trajectory, continue_all, save_all
from tests.distributed.spawn import run_ranks

# The first test waits for all runs, which take long while other jobs use the machine.
pytestmark = [pytest.mark.dist, pytest.mark.timeout(900)]

COMMON = [
    "num_layers=4",
    "base_num_layers=4",
    "norm_gain=vector",
    "lr_decay_iters=6",
    "lr_warmup_iters=2",
    "weight_decay=0.01",
    "clip_grad=0.5",
]
TP2, PP2 = "tensor_model_parallel_size=2", "pipeline_model_parallel_size=2"
SHARDED = "use_distributed_optimizer=true"
ONE_RANK = {"one rank": [], "one rank sharded": [SHARDED]}
TWO_RANKS = {
    "tp2": [TP2],
    "pp2": [PP2],
    "pp2 virtual": [PP2, "virtual_pipeline_model_parallel_size=2"],
    "dp2": [],
    "dp2 sharded": [SHARDED],
    "dp2 sharded overlap": [SHARDED, "overlap_grad_reduce=true", "overlap_param_gather=true"],
}
FOUR_RANKS = {"tp2 pp2 sharded": [TP2, PP2, SHARDED]}
LAYOUTS = ONE_RANK | TWO_RANKS | FOUR_RANKS
SAVED_BY_ONE = ["one rank"]
PAIRS = [
    *permutations(ONE_RANK, 2),
    *permutations(TWO_RANKS, 2),
    *product(SAVED_BY_ONE, [*TWO_RANKS, *FOUR_RANKS]),
    *product([*TWO_RANKS, *FOUR_RANKS], ONE_RANK),
]
"""Layout that saves, layout that resumes."""


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Found:
    """All runs, by what was resumed and the layout that resumed it."""
    root = tmp_path_factory.mktemp("checkpoints")
    one = {"common": COMMON, "layouts": ONE_RANK, "output": str(root)}
    folders = save_all(one, Launch())
    found: Found = {}
    read_by_all = {name: folders[name] for name in SAVED_BY_ONE}
    for ranks, layouts in ((2, TWO_RANKS), (4, FOUR_RANKS)):
        output = root / f"{ranks}"
        output.mkdir()
        places = {"world_size": ranks, "layouts": layouts}
        job = {"common": COMMON, "folders": read_by_all, **places}
        run_ranks("tests.distributed.checkpoint_worker", job, output, timeout=400)
        add(found, json.loads((output / "found.json").read_text()))
        folders |= {name: str(output / name) for name in layouts}
    add(found, continue_all(one, folders, Launch()))
    return found


def add(found: Found, more: Found) -> None:
    """Add the runs on other layouts."""
    for saver, by_reader in more.items():
        found.setdefault(saver, {}).update(by_reader)


def last_three(run: Trajectory) -> Trajectory:
    """The steps after the resume, of a run that was not interrupted."""
    assert {len(values) for values in run.values()} == {6}
    return {key: values[3:] for key, values in run.items()}


@pytest.mark.parametrize(("saver", "reader"), PAIRS)
def test_a_resume_on_another_layout_gives_the_uninterrupted_losses(
    saver: str, reader: str, found: Found
) -> None:
    expected, resumed = last_three(found["nothing"]["one rank"]), found[saver][reader]
    assert resumed["lm loss"] == pytest.approx(expected["lm loss"], abs=1e-5)
    assert resumed["grad-norm"] == pytest.approx(expected["grad-norm"], rel=1e-5)


@pytest.mark.parametrize("layout", list(LAYOUTS))
def test_a_resume_on_the_same_layout_gives_its_losses_to_the_last_bit(
    layout: str, found: Found
) -> None:
    assert found[layout][layout] == last_three(found["nothing"][layout])
