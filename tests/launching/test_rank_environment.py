"""The ranks' variables: for the layout, for the watchdog, and never in place of the user's own."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_mup.errors import ConfigError
from megatron_mup.launching.rank_environment import environment_warnings, rank_environment
from megatron_mup.launching.run_folder import RunFolder
from tests.configurations import tiny

FOLDER = RunFolder(Path("/runs/my run"))


def test_a_plain_layout_gets_the_watchdog_and_one_thread() -> None:
    assert rank_environment(tiny(), FOLDER, 3, {}) == {
        "MEGATRON_MUP_ATTEMPT": "3",
        "MEGATRON_MUP_OUTCOMES": "/runs/my run/launch/outcomes/0003",
        "OMP_NUM_THREADS": "1",
        "PYTHONUNBUFFERED": "1",
        "PYTHONFAULTHANDLER": "1",
        "TORCH_NCCL_ASYNC_ERROR_HANDLING": "1",
        "TORCH_NCCL_ENABLE_MONITORING": "1",
        # parallel.distributed_timeout_minutes is 10.
        "TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC": "600",
        "TORCH_FR_BUFFER_SIZE": "2000",
        "TORCH_NCCL_DUMP_ON_TIMEOUT": "1",
        "TORCH_NCCL_DEBUG_INFO_TEMP_FILE": "/runs/my run/launch/outcomes/0003/nccl-",
        "NCCL_DEBUG": "WARN",
    }


@pytest.mark.parametrize(
    ("overrides", "needed"),
    [
        (("tensor_model_parallel_size=2",), True),
        (("tensor_model_parallel_size=2", "sequence_parallel=true"), True),
        (("context_parallel_size=2", "transformer_impl=transformer_engine", "bf16=true"), True),
        (("pipeline_model_parallel_size=2",), False),
    ],
)
def test_layouts_that_split_layers_or_sequences_need_one_connection(
    overrides: tuple[str, ...], needed: bool
) -> None:
    found = rank_environment(tiny(*overrides), FOLDER, 1, {})
    assert found.get("CUDA_DEVICE_MAX_CONNECTIONS") == ("1" if needed else None)


@pytest.mark.parametrize(("minutes", "seconds"), [("1", "480"), ("8.5", "510"), ("30", "1800")])
def test_the_watchdog_s_own_limit_follows_the_time_limit_but_not_below_torch_s(
    minutes: str, seconds: str
) -> None:
    run = tiny(f"distributed_timeout_minutes={minutes}", "lease_timeout_seconds=10")
    found = rank_environment(run, FOLDER, 1, {})
    assert found["TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC"] == seconds


def test_what_the_user_set_is_left_alone() -> None:
    trace = "TORCH_NCCL_DEBUG_INFO_TEMP_FILE"
    mine = {"OMP_NUM_THREADS": "7", "NCCL_DEBUG": "INFO", "MEGATRON_MUP_ATTEMPT": "1"}
    assert trace not in rank_environment(tiny(), FOLDER, 2, {trace: "/tmp/mine-"})
    mine[trace] = "/runs/my run/launch/outcomes/0001/nccl-"
    found = rank_environment(tiny(), FOLDER, 2, mine)
    assert "OMP_NUM_THREADS" not in found
    assert "NCCL_DEBUG" not in found
    # But the attempt's own number, which an earlier round left behind, is always this one's.
    assert found["MEGATRON_MUP_ATTEMPT"] == "2"
    assert found[trace] == "/runs/my run/launch/outcomes/0002/nccl-"


def test_threads_follow_the_cpus_of_a_task() -> None:
    found = rank_environment(tiny(), FOLDER, 1, {"SLURM_CPUS_PER_TASK": "12"})
    assert found["OMP_NUM_THREADS"] == "12"


def test_a_folder_name_that_breaks_the_lines_is_refused() -> None:
    with pytest.raises(ConfigError, match="holds a line break"):
        rank_environment(tiny(), RunFolder(Path("/a\nPATH=/evil")), 1, {})


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"CUDA_DEVICE_MAX_CONNECTIONS": "8"}, "CUDA_DEVICE_MAX_CONNECTIONS is 8"),
        ({"TORCH_NCCL_ASYNC_ERROR_HANDLING": "0"}, "a hung rank would hold the whole job"),
        ({"TORCH_NCCL_ENABLE_MONITORING": "0"}, "a hung rank would hold the whole job"),
        ({"TORCH_NCCL_BLOCKING_WAIT": "1"}, "switches the watchdog off"),
        ({"TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC": "599"}, "is 599, below"),
    ],
)
def test_settings_that_defeat_the_purpose_are_told(
    environment: dict[str, str], message: str
) -> None:
    run = tiny("tensor_model_parallel_size=2")
    (line,) = environment_warnings(run, environment)
    assert message in line
    assert environment_warnings(run, {"CUDA_DEVICE_MAX_CONNECTIONS": "1"}) == []
    assert environment_warnings(run, {"TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC": "600"}) == []
