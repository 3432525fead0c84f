"""Built models with their optimizer, for tests of what the optimizer really holds."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from megatron_mup.config import RunConfig
from megatron_mup.training.processes import Launch, parallel_processes
from megatron_mup.training.state import TrainState, build_state


@contextmanager
def built(run: RunConfig) -> Iterator[TrainState]:
    """The run's state inside one process's parallel groups."""
    with parallel_processes(run, Launch()):
        yield build_state(run)


def group_of(state: TrainState) -> dict[str, dict[str, Any]]:
    """The optimizer group of every parameter, by Megatron's name."""
    groups: dict[int, dict[str, Any]] = {}
    for group in state.optimizer.param_groups:
        for parameter in group["params"]:
            assert id(parameter) not in groups
            groups[id(parameter)] = group
    return {name: groups[id(p)] for name, p in state.model_chunks[0].named_parameters()}
