"""What a checkpoint holds of a ``TrainState``, as Megatron's sharded state dict.

Every tensor is described by its place in the whole model, so any layout can read what any other
has written. Owns the keys; writes and reads nothing.
"""

from __future__ import annotations

from typing import Any

from megatron.core import parallel_state

from megatron_mup.checkpoint.optimizer_state import load_optimizer_tree, optimizer_tree
from megatron_mup.checkpoint.upstream_args import upstream_args
from megatron_mup.training.state import TrainState

CHECKPOINT_VERSION = 3.0
"""Megatron-LM's version of the query-key-value row order that 0.19.2 writes."""


def model_tree(state: TrainState) -> dict[str, Any]:
    """Sharded weights of this rank's model chunks, under Megatron-LM's names for chunks."""
    metadata = {"dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True)}
    chunks: list[Any] = list(state.model_chunks)
    return {
        name: chunk.sharded_state_dict(metadata=metadata)
        for name, chunk in zip(chunk_names(len(chunks)), chunks, strict=True)
    }


def chunk_names(count: int) -> list[str]:
    """Megatron-LM's names for the model chunks of a rank, in the order of the chunks."""
    return ["model"] if count == 1 else [f"model{index}" for index in range(count)]


def saved_tree(state: TrainState) -> dict[str, Any]:
    """Everything that is saved."""
    tree = model_tree(state)
    tree["optimizer"] = optimizer_tree(state, tree, loading=False)
    tree["checkpoint_version"] = CHECKPOINT_VERSION
    tree["iteration"] = state.iteration
    tree["consumed_train_samples"] = state.consumed_samples
    tree["skipped_iterations"] = state.skipped_iterations
    tree["health"] = dict(state.health)
    # For upstream's loader alone; nothing of this package reads them.
    tree["args"] = upstream_args(state.run, consumed_train_samples=state.consumed_samples)
    return tree


def wanted_tree(state: TrainState, *, weights_only: bool) -> dict[str, Any]:
    """What is asked of a checkpoint; plain values come along without being asked for."""
    tree = model_tree(state)
    if not weights_only:
        tree["optimizer"] = optimizer_tree(state, tree, loading=True)
    return tree


def take_over(state: TrainState, loaded: dict[str, Any], *, weights_only: bool) -> None:
    """Put what was read into a state.

    Args:
        state: changed in place.
        loaded: the answer to ``wanted_tree``.
        weights_only: leave optimizer and counters as they are.
    """
    names = chunk_names(len(state.model_chunks))
    for name, chunk in zip(names, state.model_chunks, strict=True):
        chunk.load_state_dict(loaded[name])
    if weights_only:
        # bf16 runs keep fp32 main weights that were copied before loading.
        state.optimizer.reload_model_params()
        return
    load_optimizer_tree(state, loaded["optimizer"])
    state.iteration = int(loaded["iteration"])
    state.consumed_samples = int(loaded["consumed_train_samples"])
    # Checkpoints of format 1 know neither.
    state.skipped_iterations = int(loaded.get("skipped_iterations", 0))
    state.health = dict(loaded.get("health", {}))
