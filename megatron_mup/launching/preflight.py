"""``launch preflight``: may this node train, and do the ranks reach each other.

One process per rank. The first of each node checks the machine; then all ranks meet, compare their
clocks and add up known numbers. Every step is reported before the next one begins, and a timer ends
the process, so a node that hangs is known by how far it came.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from megatron_mup import exit_codes, platform
from megatron_mup.config_io import load_config
from megatron_mup.launching.machine_checks import check_device, check_machine
from megatron_mup.launching.preflight_report import PreflightReport, Stage, write_report
from megatron_mup.launching.run_folder import RunFolder
from megatron_mup.os_processes import end_now
from megatron_mup.rank_outcomes import node_name
from megatron_mup.training.peers import is_lost_peer
from megatron_mup.training.ranks import Launch, detect_launch, join_process_group

CLOCK_LIMIT_SECONDS = 2.0
"""Clocks may differ by so much (ours, a guess): leases and time limits are longer by far."""

_ELEMENTS = {"cuda": 64 * 1024 * 1024, "cpu": 1024 * 1024}
"""fp32 numbers of the measured all-reduce (assumption: enough to hide the latency)."""
_REPEATS = 3

Say = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class PreflightLimits:
    """What the preflight may take and asks for.

    Attributes:
        seconds: longest duration of all checks together.
        free_gb: free space for checkpoints in 10^9 bytes; None: two checkpoints of this model.
    """

    seconds: float
    free_gb: float | None = None


class _Reporter:
    """This rank's report, rewritten at every change."""

    def __init__(self, folder: RunFolder, attempt: int, launch: Launch) -> None:
        self._folder = folder.preflight(attempt)
        self.report = PreflightReport(
            rank=launch.rank, local_rank=launch.local_rank, node=node_name()
        )
        self.update()

    def update(self, **changes: Any) -> None:
        self.report = replace(self.report, **changes)
        write_report(self._folder, self.report)

    def failed(self, check: str, text: str) -> None:
        self.update(failures={**self.report.failures, check: text})


def preflight(folder: RunFolder, attempt: int, limits: PreflightLimits, say: Say) -> int:
    """Check this rank.

    Args:
        folder: of the run.
        attempt: its number.
        limits: what the checks may take.
        say: receives the result, on rank 0.

    Returns:
        Exit code: 0, or ``BAD_NODES`` if a check of this rank failed.

    Raises:
        MupError: the configuration of the attempt cannot be read.
    """
    launch = detect_launch()
    reporter = _Reporter(folder, attempt, launch)
    timer = threading.Timer(limits.seconds, _give_up, (reporter, limits.seconds, say))
    timer.daemon = True
    timer.start()
    run = load_config(folder.config)
    if launch.local_rank == 0:
        found = check_machine(run, free_gb=limits.free_gb)
        reporter.update(failures=found.failures, versions=found.versions, data=found.data)
    gpu = check_device(launch)
    reporter.update(device=gpu.name, stage=Stage.CHECKED)
    if gpu.failure is not None:
        # Without its GPU this rank cannot meet the others, who need not wait for it.
        reporter.failed("GPU", gpu.failure)
        return exit_codes.BAD_NODES
    code = exit_codes.FINISHED
    try:
        _meet(launch, reporter, limits)
    # torch's errors of the network and of the GPU.
    except RuntimeError as error:
        code = _trouble(error, reporter, say)
    timer.cancel()
    if launch.rank == 0 and reporter.report.stage is Stage.DONE:
        say(f"preflight: {_words(reporter.report)}")
    return exit_codes.BAD_NODES if reporter.report.failures else code


def _trouble(error: RuntimeError, reporter: _Reporter, say: Say) -> int:
    """Tell a fault of this rank from the loss of another one; the exit code."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    say(f"preflight: rank {reporter.report.rank} on {reporter.report.node}: {lines[0]}")
    if not is_lost_peer(error):
        reporter.failed("all-reduce", lines[0])
    return exit_codes.LOST_PEERS


def _give_up(reporter: _Reporter, seconds: float, say: Say) -> None:
    report = reporter.report
    # The stage stays in the report: it tells where this rank hangs.
    say(
        f"preflight: rank {report.rank} on {report.node} is not done after {seconds:g} s, at stage "
        f"'{report.stage.name.lower()}': ending"
    )
    end_now(exit_codes.LOST_PEERS)


def _meet(launch: Launch, reporter: _Reporter, limits: PreflightLimits) -> None:
    """Meet all ranks, compare clocks, add known numbers."""
    # Clocks go over gloo: its barrier ends on the host, a GPU's only when someone looks.
    backend = "cpu:gloo,cuda:nccl" if platform.has_cuda() else "gloo"
    join_process_group(launch, timedelta(seconds=limits.seconds), backend=backend)
    try:
        reporter.update(stage=Stage.JOINED)
        offset = _clock_offset()
        if abs(offset) > CLOCK_LIMIT_SECONDS:
            reporter.failed("clock", f"off by {offset:+.1f} s from the middle of all ranks")
        wrong, speed = _known_sum()
        if wrong is not None:
            reporter.failed("all-reduce", wrong)
        notes = {} if speed is None else {"all-reduce": f"{speed:.3g} GB/s"}
        reporter.update(stage=Stage.DONE, notes={**notes, "clock": f"{offset:+.2f} s"})
        dist.barrier()
    finally:
        dist.destroy_process_group()


def _clock_offset() -> float:
    """Seconds by which this machine's clock is ahead of the median of all ranks."""
    dist.all_reduce(torch.zeros(1))
    # All ranks leave the reduction within the latency of the network.
    mine = torch.tensor([time.time()], dtype=torch.float64)
    clocks = [torch.zeros_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(clocks, mine)
    values = sorted(float(clock) for clock in clocks)
    return float(mine) - values[len(values) // 2]


def _known_sum() -> tuple[str | None, float | None]:
    """Add up the ranks' numbers, measured; what is wrong with the sum, and the bus bandwidth.

    Returns:
        Words or None, and 10^9 bytes per second as NCCL's tests count them: 2 (n - 1) / n of the
        buffer pass each rank's links. None for one rank.
    """
    device, size = platform.device(), dist.get_world_size()
    buffer = torch.empty(_ELEMENTS[device.type], device=device)
    expected, seconds = size * (size + 1) / 2, []
    for _ in range(_REPEATS):
        buffer.fill_(dist.get_rank() + 1)
        _finish(device)
        start = time.perf_counter()
        dist.all_reduce(buffer)
        _finish(device)
        seconds.append(time.perf_counter() - start)
        found = float(buffer.min()), float(buffer.max())
        if found != (expected, expected):
            return f"the sum over the ranks is {found[0]:g} to {found[1]:g}, not {expected:g}", None
    if size == 1:
        return None, None
    moved = 2 * (size - 1) / size * buffer.numel() * buffer.element_size()
    return None, moved / min(seconds) / 1e9


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def _words(report: PreflightReport) -> str:
    lines = [f"{name} {text}" for name, text in report.notes.items()]
    lines += [f"{check} failed: {text}" for check, text in report.failures.items()]
    return ", ".join(lines)
