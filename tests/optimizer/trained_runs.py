"""Training a few steps, and saving and loading as little as tests of the optimizer need."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing, parallel_state
from torch.distributed import checkpoint
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from megatron_mup.checkpoint.optimizer_state import load_optimizer_tree, optimizer_tree
from megatron_mup.training.batches import micro_batches
from megatron_mup.training.processes import sum_over_data_parallel
from megatron_mup.training.state import TrainState
from megatron_mup.training.step import train_step
from tests.random_samples import RandomSamples


def train_steps(state: TrainState, steps: int) -> list[float]:
    """The losses of so many steps on random tokens, from ``state.iteration`` on."""
    model, training = state.run.model, state.run.training
    samples = RandomSamples(model.vocab_size, model.seq_length)
    ranks = parallel_state.get_data_parallel_world_size()
    count = training.global_batch_size // training.micro_batch_size // ranks
    losses = []
    for _ in range(steps):
        batches = micro_batches(
            samples,
            first=state.iteration * training.global_batch_size,
            batch_size=training.global_batch_size,
            micro_batch_size=training.micro_batch_size,
            data_rank=parallel_state.get_data_parallel_rank(),
            data_size=ranks,
        )
        report = train_step(state, batches, count)
        total, tokens = sum_over_data_parallel(report.loss_sum_and_tokens.double()).tolist()
        losses.append(total / tokens)
    return losses


def model_tree(state: TrainState) -> dict[str, Any]:
    """Sharded state dict of every chunk."""
    group = parallel_state.get_data_parallel_group(with_context_parallel=True)
    chunks: list[Any] = state.model_chunks
    return {
        f"model{index}": chunk.sharded_state_dict(metadata={"dp_cp_group": group})
        for index, chunk in enumerate(chunks)
    }


def save_state(state: TrainState, folder: Path) -> None:
    """Weights, optimizer and iteration into a new folder; every rank must call it."""
    if parallel_state.get_data_parallel_rank() == 0:
        folder.mkdir(parents=True, exist_ok=True)
    optimizer = optimizer_tree(state, model_tree(state), loading=False)
    tree = {"model": model_tree(state), "optimizer": optimizer, "iteration": state.iteration}
    dist_checkpointing.save(tree, str(folder))


def load_state(state: TrainState, folder: Path) -> None:
    """What ``save_state`` saved; every rank must call it."""
    optimizer = optimizer_tree(state, model_tree(state), loading=True)
    tree = {"model": model_tree(state), "optimizer": optimizer}
    loaded = dist_checkpointing.load(tree, str(folder))
    for index, chunk in enumerate(state.model_chunks):
        chunk.load_state_dict(loaded["model"][f"model{index}"])
    load_optimizer_tree(state, loaded["optimizer"])
    state.iteration = loaded["iteration"]


def stored_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint, whole, by key; needs no process group."""
    reader = checkpoint.FileSystemReader(str(folder))
    tensors = {
        key: torch.empty(stored.size, dtype=stored.properties.dtype)
        for key, stored in reader.read_metadata().state_dict_metadata.items()
        if isinstance(stored, TensorStorageMetadata)
    }
    checkpoint.load(tensors, storage_reader=reader, no_dist=True)
    return tensors
