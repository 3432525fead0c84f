"""Which launcher started the process, and whether its ranks fill the layout."""

from __future__ import annotations

import pytest

from megatron_mup.errors import ConfigError
from megatron_mup.training.processes import Launch, check_layout, detect_launch
from tests.configurations import tiny

SRUN = {
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
    "SLURM_JOB_ID": "123456",
    "SLURM_LAUNCH_NODE_IPADDR": "10.0.0.7",
}


def test_plain_python_is_one_process_without_network() -> None:
    assert detect_launch({}) == Launch(rank=0, world_size=1, local_rank=0, address=None, port=0)


def test_torchrun_variables_are_taken_as_they_are() -> None:
    environment = {
        "RANK": "5",
        "WORLD_SIZE": "8",
        "LOCAL_RANK": "1",
        "MASTER_ADDR": "node3",
        "MASTER_PORT": "4242",
    }

    assert detect_launch(environment) == Launch(5, 8, 1, "node3", 4242)


def test_rank_without_address_joins_this_machine() -> None:
    assert detect_launch({"RANK": "1", "WORLD_SIZE": "2"}) == Launch(1, 2, 0, "127.0.0.1", 29500)


def test_srun_step_takes_rank_and_port_from_slurm() -> None:
    # Port 10000 + 123456 mod 50000: jobs on one host do not collide.
    assert detect_launch(SRUN) == Launch(3, 4, 1, "10.0.0.7", 33456)


def test_master_address_and_port_win_over_slurms() -> None:
    environment = {**SRUN, "MASTER_ADDR": "head", "MASTER_PORT": "5000"}

    assert detect_launch(environment) == Launch(3, 4, 1, "head", 5000)


def test_torchrun_inside_an_srun_step_wins() -> None:
    environment = {**SRUN, "RANK": "0", "WORLD_SIZE": "2"}

    assert detect_launch(environment).world_size == 2


def test_batch_script_itself_is_one_process() -> None:
    batch_script = {key: value for key, value in SRUN.items() if key != "SLURM_STEP_ID"}

    assert detect_launch(batch_script) == Launch()


def test_srun_step_of_one_task_needs_no_network() -> None:
    assert detect_launch({**SRUN, "SLURM_STEP_NUM_TASKS": "1"}) == Launch()


def test_srun_step_without_first_host_names_the_variable_to_export() -> None:
    environment = {key: value for key, value in SRUN.items() if "IPADDR" not in key}

    with pytest.raises(ConfigError, match=r"srun started 4 tasks .* export MASTER_ADDR"):
        detect_launch(environment)


@pytest.mark.parametrize(
    ("overrides", "world_size", "data_parallel"),
    [
        ((), 1, 1),
        ((), 2, 2),
        (("tensor_model_parallel_size=2",), 2, 1),
        (("tensor_model_parallel_size=2",), 4, 2),
        (("tensor_model_parallel_size=2", "pipeline_model_parallel_size=2"), 4, 1),
        (("tensor_model_parallel_size=2", "pipeline_model_parallel_size=2"), 8, 2),
        (("global_batch_size=8", "rampup_batch_size=[4,4,16]"), 2, 2),
    ],
)
def test_data_parallelism_takes_the_ranks_that_are_left(
    overrides: tuple[str, ...], world_size: int, data_parallel: int
) -> None:
    assert check_layout(tiny(*overrides), world_size) == data_parallel


@pytest.mark.parametrize(
    ("overrides", "world_size", "words"),
    [
        (("tensor_model_parallel_size=2",), 1, "start a multiple of 2, e.g. torchrun"),
        (("tensor_model_parallel_size=2",), 3, r"3 process\(es\) cannot hold"),
        (
            ("tensor_model_parallel_size=2", "pipeline_model_parallel_size=2"),
            6,
            "--nproc-per-node 4",
        ),
        ((), 4, "global_batch_size 4 is not divisible .* data-parallel size 4 = 8"),
        (
            ("global_batch_size=8", "rampup_batch_size=[6,2,16]"),
            2,
            "rampup start 6 is not divisible",
        ),
        (
            ("global_batch_size=8", "rampup_batch_size=[4,2,16]"),
            2,
            "rampup increment 2 is not divisible",
        ),
    ],
)
def test_ranks_that_do_not_fill_the_layout_are_refused(
    overrides: tuple[str, ...], world_size: int, words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        check_layout(tiny(*overrides), world_size)
