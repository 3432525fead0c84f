"""Environment variables of the ranks: what the libraries need so that a run ends when it hangs.

What the user's environment sets already is never replaced; where it defeats the purpose, a warning
says so. Must not import torch or megatron.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from megatron_mup.config import RunConfig
from megatron_mup.errors import ConfigError
from megatron_mup.launching.run_folder import ATTEMPT_VARIABLE, RunFolder
from megatron_mup.rank_outcomes import FOLDER_VARIABLE

_TRACE = "TORCH_NCCL_DEBUG_INFO_TEMP_FILE"
"""Beginning of the names of the traces, one a rank."""

HEARTBEAT_SECONDS = 480
"""torch 2.11's own limit for a watchdog that hangs itself; ours is not below it."""


def rank_environment(
    run: RunConfig, folder: RunFolder, attempt: int, environment: Mapping[str, str]
) -> dict[str, str]:
    """Variables for the ranks of an attempt, in a fixed order.

    Args:
        run: the run's configuration.
        folder: of the run.
        attempt: its number.
        environment: of the batch script.

    Returns:
        Name and value of what is not set yet. The attempt's own variables are always there.

    Raises:
        ConfigError: the run folder's name cannot stand in a line of shell.
    """
    if "\n" in str(folder.root):
        raise ConfigError(f"--run-dir {str(folder.root)!r} holds a line break; use another name")
    own = {
        ATTEMPT_VARIABLE: str(attempt),
        FOLDER_VARIABLE: str(folder.outcomes(attempt)),
    }
    wanted = {**_threads(environment), **_connections(run), **_watchdog(run)}
    trace = environment.get(_TRACE)
    # A script that starts the run again still has the attempt's before.
    if trace is None or trace.startswith(f"{folder.launch}/"):
        own[_TRACE] = f"{folder.outcomes(attempt)}/nccl-"
    return own | {name: value for name, value in wanted.items() if name not in environment}


def _threads(environment: Mapping[str, str]) -> dict[str, str]:
    # Output that waits in a buffer is lost when the process is killed; a trace of all threads
    # comes with a fatal signal.
    return {
        "OMP_NUM_THREADS": environment.get("SLURM_CPUS_PER_TASK") or "1",
        "PYTHONUNBUFFERED": "1",
        "PYTHONFAULTHANDLER": "1",
    }


def _connections(run: RunConfig) -> dict[str, str]:
    """megatron-core 0.19.2 relies on the launch order of kernels to overlap communication.

    Source: megatron.training.arguments asks for it with tensor or context parallelism up to
    Hopper; sequence parallelism implies the former. Blackwell no longer needs it.
    """
    parallel = run.parallel
    needed = parallel.tensor_model_parallel_size > 1 or parallel.context_parallel_size > 1
    return {"CUDA_DEVICE_MAX_CONNECTIONS": "1"} if needed else {}


def _watchdog(run: RunConfig) -> dict[str, str]:
    """Keep torch's watchdog on, have it watched itself, and make it leave a trace.

    It ends a process whose collective takes longer than the groups' timeout, which training sets.
    """
    seconds = math.ceil(60 * run.parallel.distributed_timeout_minutes)
    return {
        # 1: end the process after aborting its communicators; 0 would let it hang.
        "TORCH_NCCL_ASYNC_ERROR_HANDLING": "1",
        "TORCH_NCCL_ENABLE_MONITORING": "1",
        "TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC": str(max(HEARTBEAT_SECONDS, seconds)),
        # Which collective each rank was in, of the last 2000.
        "TORCH_FR_BUFFER_SIZE": "2000",
        "TORCH_NCCL_DUMP_ON_TIMEOUT": "1",
        "NCCL_DEBUG": "WARN",
    }


def environment_warnings(run: RunConfig, environment: Mapping[str, str]) -> list[str]:
    """Settings of the user that work against the run, in words."""
    lines = []
    for name, wanted in _connections(run).items():
        if environment.get(name, wanted) != wanted:
            lines.append(
                f"{name} is {environment[name]}, but tensor, sequence and context parallelism need "
                f"{wanted} up to Hopper to overlap communication; unset it, unless these are "
                "Blackwell GPUs"
            )
    for name in ("TORCH_NCCL_ASYNC_ERROR_HANDLING", "TORCH_NCCL_ENABLE_MONITORING"):
        if environment.get(name) == "0":
            lines.append(f"{name} is 0, so a hung rank would hold the whole job; unset it")
    if environment.get("TORCH_NCCL_BLOCKING_WAIT") == "1":
        lines.append("TORCH_NCCL_BLOCKING_WAIT is 1, which switches the watchdog off; unset it")
    limit = environment.get("TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC", "")
    seconds = 60 * run.parallel.distributed_timeout_minutes
    if limit.isdecimal() and int(limit) < seconds:
        lines.append(
            f"TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC is {limit}, below "
            f"parallel.distributed_timeout_minutes ({seconds:g} s): a slow step may be taken for a "
            "hung one; unset it"
        )
    return lines
