"""Runs of a few steps on random tokens that several tests start from."""

from __future__ import annotations

from pathlib import Path

from megatron_mup.config import RunConfig
from megatron_mup.training.loop import TrainData, TrainResult, train
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
