"""What a run's options set on Megatron's gradient buffers and schedules."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest

from megatron_mup.training.processes import Launch, parallel_processes
from megatron_mup.training.state import TrainState, build_state
from tests.configurations import tiny


def built(*overrides: str, read: Callable[[TrainState], Any]) -> Any:
    """What ``read`` finds on a state of one rank."""
    run = tiny(*overrides)
    with parallel_processes(run, Launch()):
        return read(build_state(run))


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ((), (False, False, False)),
        (("use_distributed_optimizer=true",), (True, False, False)),
        (("overlap_grad_reduce=true",), (False, True, False)),
        (
            (
                "use_distributed_optimizer=true",
                "overlap_grad_reduce=true",
                "overlap_param_gather=true",
            ),
            (True, True, True),
        ),
    ],
)
def test_options_reach_the_gradient_buffers(
    overrides: tuple[str, ...], expected: tuple[bool, ...]
) -> None:
    buffers = built(*overrides, read=lambda state: state.wrapped_chunks[0].ddp_config)

    assert buffers.grad_reduce_in_fp32
    assert (
        buffers.use_distributed_optimizer,
        buffers.overlap_grad_reduce,
        buffers.overlap_param_gather,
    ) == expected


def test_schedule_starts_overlapped_reductions_itself() -> None:
    def sync(state: TrainState) -> Any:
        return state.model_chunks[0].config.grad_sync_func

    assert built(read=sync) is None
    assert built("overlap_grad_reduce=true", read=sync).__name__ == "start_grad_sync"


@pytest.mark.parametrize("sharded", ["true", "false"])
def test_a_finished_run_leaves_nothing_in_memory(sharded: str) -> None:
    run = tiny(f"use_distributed_optimizer={sharded}")
    with parallel_processes(run, Launch()):
        state = build_state(run)
        left = [weakref.ref(part) for part in (*state.wrapped_chunks, state.optimizer)]
        del state
    gc.collect()
    assert [part() for part in left] == [None, None]
