"""Runs of a few steps on random tokens that several tests start from."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megatron_mup.config import RunConfig
from megatron_mup.training.batches import micro_batches
from megatron_mup.training.loop import TrainData, TrainResult, train
from megatron_mup.training.processes import Launch, parallel_processes
from megatron_mup.training.state import TrainState, build_state
from megatron_mup.training.step import train_step
from tests.random_samples import RandomSamples


def run_training(run: RunConfig) -> TrainResult:
    """Train on random tokens without printing."""
    samples = RandomSamples(run.model.vocab_size, run.model.seq_length)
    return train(run, data=TrainData(samples, samples), echo=lambda _line: None)


def losses(result: TrainResult) -> list[float]:
    """Training losses by iteration."""
    return [row["lm loss"] for row in result.history if "lm loss" in row]


def folders(path: Path, *, load: bool = False) -> list[str]:
    """Overrides that save to a folder and, if asked, resume from it."""
    return [f"save={path}", *([f"load={path}"] if load else [])]


def names(folder: Path) -> set[str]:
    """What a folder holds of checkpoints; a run leaves other things there as well."""
    return {path.name for path in folder.iterdir() if "iter" in path.name}


def step(state: TrainState) -> None:
    """One training step on random tokens."""
    run = state.run
    batches = micro_batches(
        RandomSamples(run.model.vocab_size, run.model.seq_length),
        first=state.consumed_samples,
        batch_size=4,
        micro_batch_size=2,
        data_rank=0,
        data_size=1,
    )
    train_step(state, batches, 2)
    state.consumed_samples += 4


@contextmanager
def trained(run: RunConfig, steps: int) -> Iterator[TrainState]:
    """A state after some steps."""
    with parallel_processes(run, Launch()):
        state = build_state(run)
        for _ in range(steps):
            step(state)
        yield state
