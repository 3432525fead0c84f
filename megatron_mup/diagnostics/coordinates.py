"""Coordinate check: train a few steps at several widths and record what moves.

Owns the loop over widths and seeds; ``coordinate_fit`` judges what it returns. The model, hooks,
groups and optimizer are those of ``train``, at constant peak learning rate.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from megatron.core import parallel_state
from torch import Tensor

from megatron_mup.checkpoint.resume import from_first_rank
from megatron_mup.config import RunConfig
from megatron_mup.data.checks import check_training_data
from megatron_mup.data.datasets import Samples, build_datasets
from megatron_mup.diagnostics.recorder import ActivationRecorder, recorded_modules
from megatron_mup.errors import ConfigError
from megatron_mup.model.layer_specs import check_implementation
from megatron_mup.training.batches import Batch, micro_batches
from megatron_mup.training.processes import Launch, check_layout, is_log_rank, parallel_processes
from megatron_mup.training.state import TrainState, build_state, release_chunks
from megatron_mup.training.step import evaluate_batches, train_step

Print = Callable[[str], None]

_STREAM = 20240405
"""Seed of the random tokens: one stream for all widths and seeds of the weights."""


@dataclass(frozen=True)
class Coordinate:
    """One measured module of one run.

    Attributes:
        width: hidden size.
        seed: seed of the initial weights.
        step: optimizer steps taken.
        module: its name in ``recorder.recorded_modules``.
        rms: root mean square of its activations on the probe batch; nan or inf if it diverged.
        change: root mean square of their change since step 0.
    """

    width: int
    seed: int
    step: int
    module: str
    rms: float
    change: float


class RandomTokens:
    """Samples of random tokens, some more frequent than others, the same in every process."""

    def __init__(self, vocab_size: int, seq_length: int, count: int) -> None:
        # Squared uniform ranks: a first step that all samples agree on, as on text.
        ranks = np.random.default_rng(_STREAM).random((count, seq_length + 1)) ** 2
        self._tokens = torch.from_numpy((ranks * vocab_size).astype(np.int64))

    def __len__(self) -> int:
        """Number of samples."""
        return len(self._tokens)

    def __getitem__(self, index: int) -> Mapping[str, Tensor]:
        """The sample with this number; every label counts."""
        row = self._tokens[index]
        return {
            "tokens": row[:-1],
            "labels": row[1:],
            "loss_mask": torch.ones(len(row) - 1),
            "position_ids": torch.arange(len(row) - 1),
        }


@dataclass(frozen=True, kw_only=True)
class CheckPlan:
    """What a coordinate check runs.

    Attributes:
        runs: width -> configuration.
        steps: optimizer steps of each run.
        seeds: how many seeds of the initial weights, counted up from ``training.seed``.
        with_data: read the configured shards instead of random tokens.
    """

    runs: Mapping[int, RunConfig]
    steps: int = 4
    seeds: int = 3
    with_data: bool = False

    def __post_init__(self) -> None:
        """Refuse plans that measure nothing.

        Raises:
            ConfigError: no step, no seed, or a layout that the recorder cannot measure.
        """
        if self.steps < 1 or self.seeds < 1:
            raise ConfigError(
                f"--steps is {self.steps} and --seeds is {self.seeds}; both must be at least 1"
            )
        size = self.any_run.parallel.context_parallel_size
        if size > 1:
            raise ConfigError(
                f"parallel.context_parallel_size is {size}: no rank then holds a whole row of "
                "attention scores; check with 1, which trains the same model"
            )

    @property
    def any_run(self) -> RunConfig:
        """The smallest run; layout and data are those of every one."""
        return self.runs[min(self.runs)]


def measure(
    plan: CheckPlan,
    launch: Launch,
    *,
    echo: Print = print,
    prepare: Callable[[], None] | None = None,
) -> list[Coordinate]:
    """Train every width and seed of a plan and record its activations.

    Args:
        plan: what to run.
        launch: this process's place among the ranks.
        echo: receives a line per run, on the first rank.
        prepare: called on the first rank before anything is built; its MupError ends every rank.

    Returns:
        One coordinate per width, seed, step (0 included) and module; the same on every rank.

    Raises:
        MupError: layout, kernels or data do not fit, before anything is built; or of ``prepare``.
    """
    for run in plan.runs.values():
        check_layout(run, launch.world_size)
        check_implementation(run.model)
        if plan.with_data:
            check_training_data(run)
    coordinates = []
    # Megatron's groups depend on the layout alone, so all runs share them.
    with parallel_processes(plan.any_run, launch):
        if prepare is not None:
            from_first_rank(prepare)
        samples = _samples(plan)
        for width, run in plan.runs.items():
            for number in range(plan.seeds):
                seed = run.training.seed + number
                found = _measure_run(_seeded(run, seed), samples, plan.steps)
                coordinates += found
                if is_log_rank():
                    echo(_progress(width, seed, found))
    return coordinates


def _seeded(run: RunConfig, seed: int) -> RunConfig:
    return replace(run, training=replace(run.training, seed=seed))


def _samples(plan: CheckPlan) -> Samples:
    run = plan.any_run
    count = plan.steps * run.training.global_batch_size
    if plan.with_data:
        return build_datasets(run, train_samples=count, valid_samples=0)[0]
    return RandomTokens(run.model.vocab_size, run.model.seq_length, count)


def _progress(width: int, seed: int, found: Sequence[Coordinate]) -> str:
    last = found[-1]
    return f"width {width} seed {seed}: {last.module} changed by {last.change:.4g}"


def _measure_run(run: RunConfig, samples: Samples, steps: int) -> list[Coordinate]:
    """Train one model; probe before the first step and after each."""
    state = build_state(run)
    recorder = ActivationRecorder(recorded_modules(run.model))
    found = _probe(state, recorder, samples)
    batch = run.training.global_batch_size
    for step in range(steps):
        batches = _step_batches(run, samples, first=step * batch)
        train_step(state, iter(batches), len(batches))
        found += _probe(state, recorder, samples)
    # The groups outlive this run, and with them what is to be released when they are left.
    release_chunks(state.wrapped_chunks)
    state.wrapped_chunks.clear()
    del state, recorder
    gc.collect()
    return found


def _probe(state: TrainState, recorder: ActivationRecorder, samples: Samples) -> list[Coordinate]:
    """Record the first batch of the stream, without training."""
    batches = _step_batches(state.run, samples, first=0)
    with recorder.recording(state.model_chunks):
        evaluate_batches(state, iter(batches), len(batches))
    run = state.run
    return [
        Coordinate(run.model.hidden_size, run.training.seed, state.iteration, name, rms, change)
        for name, (rms, change) in recorder.sizes().items()
    ]


def _step_batches(run: RunConfig, samples: Samples, *, first: int) -> list[Batch]:
    """This rank's microbatches of the step that starts at a sample."""
    return list(
        micro_batches(
            samples,
            first=first,
            batch_size=run.training.global_batch_size,
            micro_batch_size=run.training.micro_batch_size,
            data_rank=parallel_state.get_data_parallel_rank(),
            data_size=parallel_state.get_data_parallel_world_size(),
        )
    )
