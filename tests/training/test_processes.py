"""How a process was started, whether the ranks fill the layout, and the options of its groups."""

from __future__ import annotations

import gc
from datetime import timedelta
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from megatron.core import parallel_state

from megatron_mup.errors import ConfigError
from megatron_mup.training.processes import (
    Launch,
    check_layout,
    detect_launch,
    parallel_processes,
)
from tests.configurations import tiny

ENGINE = ("transformer_impl=transformer_engine", "bf16=true")
VIRTUAL = (
    "pipeline_model_parallel_size=2",
    "num_layers=4",
    "virtual_pipeline_model_parallel_size=2",
)
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
        ((*ENGINE, "context_parallel_size=2"), 4, 2),
        ((*ENGINE, "context_parallel_size=2", "tensor_model_parallel_size=2"), 4, 1),
        # Two microbatches for two stages.
        (VIRTUAL, 2, 1),
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
        (
            (*ENGINE, "context_parallel_size=2"),
            3,
            "pipeline_model_parallel_size 1 x context_parallel_size 2; start a multiple of 2",
        ),
        (
            (*VIRTUAL, "global_batch_size=6"),
            2,
            "global_batch_size 6 makes 3 microbatches per rank.* divisible by pipeline_model_.* 2",
        ),
        (
            (*VIRTUAL, "global_batch_size=8", "rampup_batch_size=[4,2,16]"),
            2,
            "rampup increment 2 makes 1 microbatches per rank",
        ),
    ],
)
def test_ranks_that_do_not_fill_the_layout_are_refused(
    overrides: tuple[str, ...], world_size: int, words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        check_layout(tiny(*overrides), world_size)


def test_every_group_gives_up_after_the_configured_time() -> None:
    run = tiny("distributed_timeout_minutes=2.5")
    with patch.object(dist, "new_group", wraps=dist.new_group) as new_group:  # noqa: SIM117
        with patch.object(dist, "init_process_group", wraps=dist.init_process_group) as init:
            with parallel_processes(run, Launch()):
                pass

    assert init.call_args.kwargs["timeout"] == timedelta(seconds=150)
    # Upstream forgets the experts' gloo group (0.19.2), which a dense model never uses.
    used = [call.kwargs for call in new_group.call_args_list]
    others = {group["group_desc"]: group["timeout"] for group in used}
    assert others.pop("EXPERT_DATA_PARALLEL_GROUP_GLOO") is None
    assert len(others) > 10
    assert set(others.values()) == {timedelta(seconds=150)}


def test_deterministic_mode_holds_while_the_processes_run() -> None:
    with parallel_processes(tiny("deterministic_mode=true"), Launch()):
        assert torch.are_deterministic_algorithms_enabled()
    assert not torch.are_deterministic_algorithms_enabled()

    with parallel_processes(tiny(), Launch()):
        assert not torch.are_deterministic_algorithms_enabled()


def test_groups_are_gone_after_a_failure_inside() -> None:
    with pytest.raises(ZeroDivisionError), parallel_processes(tiny(), Launch()):
        raise ZeroDivisionError

    assert not parallel_state.model_parallel_is_initialized()
    assert not dist.is_initialized()


def test_a_hosts_process_group_stays_and_the_runs_groups_and_threads_go() -> None:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    gc.collect()
    before = _threads()
    try:
        with parallel_processes(tiny(), Launch()):
            group = parallel_state.get_tensor_model_parallel_group()
            during = _threads()
        assert dist.is_initialized()
        with pytest.raises(ValueError, match="Invalid process group"):
            dist.destroy_process_group(group)
        del group
        gc.collect()
        # Some twenty groups of two threads or more, which would wake 100 times a second each.
        assert during - before > 40
        assert _threads() - before < 10
    finally:
        dist.destroy_process_group()


def _threads() -> int:
    return len(list(Path("/proc/self/task").iterdir()))
