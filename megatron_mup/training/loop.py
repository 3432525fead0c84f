"""The training loop: from a configuration to a trained, evaluated, saved model.

Reads top to bottom: check everything that can be checked, build, resume, step, report. Everything
model- or width-dependent was decided by the table before this file is reached.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import torch
from megatron.core import parallel_state

from megatron_mup import platform
from megatron_mup.checkpoint.save_load import (
    check_resumable,
    check_save_folder,
    checkpoint_folder,
    load_checkpoint,
    save_checkpoint,
)
from megatron_mup.config import RunConfig
from megatron_mup.data.checks import check_training_data
from megatron_mup.data.datasets import Samples, build_datasets
from megatron_mup.describe import describe_text
from megatron_mup.model.layer_specs import check_implementation
from megatron_mup.training.batches import Batch, global_batch_size, micro_batches, samples_after
from megatron_mup.training.metrics import Progress, Sink, console_line, open_sinks
from megatron_mup.training.outputs import check_outputs
from megatron_mup.training.processes import (
    Launch,
    check_layout,
    detect_launch,
    is_log_rank,
    parallel_processes,
    sum_over_data_parallel,
)
from megatron_mup.training.profiler import step_profiler
from megatron_mup.training.state import TrainState, build_state
from megatron_mup.training.step import evaluate_batches, train_step

Print = Callable[[str], None]


@dataclass(frozen=True)
class TrainData:
    """Samples to train on and, optionally, held-out samples."""

    train: Samples
    valid: Samples | None = None


@dataclass
class TrainResult:
    """What a run did.

    Attributes:
        iteration: last finished iteration.
        history: metrics of every logged iteration, by Megatron's names plus ``iteration``.
        validation_loss: last held-out loss in nats per token; None without evaluation.
        diverged: the loss stopped being finite, and so did the run.
    """

    iteration: int = 0
    history: list[dict[str, float]] = field(default_factory=list)
    validation_loss: float | None = None
    diverged: bool = False


def train(
    run: RunConfig,
    *,
    data: TrainData | None = None,
    launch: Launch | None = None,
    echo: Print = print,
) -> TrainResult:
    """Train a model as configured.

    Args:
        run: the configuration.
        data: samples to use instead of the configured shards.
        launch: place of this process; unset means the launcher's variables.
        echo: receives the log lines, on the first rank only.

    Returns:
        History and outcome, the same on every rank.

    Raises:
        MupError: before any work, if data, layout or checkpoint do not fit the configuration.
    """
    launch = detect_launch() if launch is None else launch
    resume = _check_before_work(run, launch, with_shards=data is None)
    with ExitStack() as stack:
        stack.enter_context(parallel_processes(run, launch))
        data = _configured_data(run) if data is None else data
        state = build_state(run)
        if resume is not None and run.checkpoint.load is not None:
            folder = checkpoint_folder(Path(run.checkpoint.load), resume)
            load_checkpoint(state, folder, weights_only=run.checkpoint.finetune)
        first = is_log_rank()
        sinks = open_sinks(run, stack) if first else []
        loop = _Loop(state, data, sinks, echo if first else _silent)
        loop.echo(describe_text(run.table))
        if run.checkpoint.load is not None:
            loop.echo(_origin(run, resume))
        return loop.run_to_end(stack)


def _check_before_work(run: RunConfig, launch: Launch, *, with_shards: bool) -> int | None:
    """Every check that needs no model; returns the iteration to resume from."""
    check_layout(run, launch.world_size)
    check_implementation(run.model)
    check_outputs(run)
    resume = check_resumable(run)
    check_save_folder(run)
    if with_shards:
        check_training_data(run)
    return resume


def _origin(run: RunConfig, resume: int | None) -> str:
    """Where the weights come from, in words."""
    load = run.checkpoint.load
    if resume is None:
        return f"'{load}' holds no checkpoint: starting from scratch"
    what = "weights of" if run.checkpoint.finetune else "resuming from"
    return f"{what} '{load}' at iteration {resume}"


def _silent(_line: str) -> None:
    """Log nothing: this is not the first rank."""


def _configured_data(run: RunConfig) -> TrainData:
    """Datasets of the configured shards, sized for the whole run.

    Megatron's shuffle depends on the number of epochs that are asked for. The planned length
    fixes it, so a run that stops early and is resumed reads what the uninterrupted one reads.
    """
    train_samples = samples_after(run.training, run.planned_iters)
    valid_samples = run.training.eval_iters * run.training.global_batch_size
    train_set, valid_set = build_datasets(
        run, train_samples=train_samples, valid_samples=valid_samples
    )
    return TrainData(train_set, valid_set)


class _Loop:
    """The loop's own variables: interval sums, progress, result."""

    def __init__(self, state: TrainState, data: TrainData, sinks: list[Sink], echo: Print) -> None:
        self.state = state
        self.data = data
        self.sinks = sinks
        self.echo = echo
        self.run = state.run
        self.result = TrainResult(iteration=state.iteration)
        self.progress = Progress(self.run.training.train_iters, state.iteration)
        self._reset_interval()

    def _reset_interval(self) -> None:
        # float64 so that the mean over a long interval does not depend on its length.
        self._loss_and_tokens = torch.zeros(2, dtype=torch.float64, device=platform.device())
        self._steps = self._clipped = self._samples = 0

    def run_to_end(self, stack: ExitStack) -> TrainResult:
        """Step until ``train_iters`` or divergence, then evaluate and save."""
        training, state = self.run.training, self.state
        profiler = step_profiler(training, state.iteration, stack)
        if state.iteration >= training.train_iters:
            self.echo(
                f"the checkpoint is at iteration {state.iteration} and train_iters is "
                f"{training.train_iters}: nothing left to train"
            )
        while state.iteration < training.train_iters and not self.result.diverged:
            self._step()
            profiler.step()
            self._periodic()
        if not self.result.diverged:
            self._finish()
        self.result.iteration = state.iteration
        return self.result

    def _step(self) -> None:
        state, run = self.state, self.run
        batch_size = global_batch_size(run.training, state.consumed_samples)
        report = train_step(
            state,
            self._batches(self.data.train, state.consumed_samples, batch_size),
            batch_size // (run.training.micro_batch_size * _data_size()),
        )
        state.consumed_samples += batch_size
        self._samples += batch_size
        self._loss_and_tokens += report.loss_sum_and_tokens
        self._steps += 1
        clip = run.optimizer.clip_grad
        self._clipped += int(clip > 0 and report.grad_norm > clip)
        last = state.iteration == run.training.train_iters
        # The norm is the same on every rank, so all of them stop at the step that went wrong and
        # no checkpoint of it is ever saved, whatever the log interval.
        failed = not math.isfinite(report.grad_norm)
        if state.iteration % run.logging.log_interval == 0 or last or failed:
            self._log(report.factor, report.grad_norm, batch_size)
        if failed and not self.result.diverged:
            self._stop(f"gradient norm is {report.grad_norm}")

    def _batches(self, samples: Samples, first: int, batch_size: int) -> Iterator[Batch]:
        return micro_batches(
            samples,
            first=first,
            batch_size=batch_size,
            micro_batch_size=self.run.training.micro_batch_size,
            data_rank=parallel_state.get_data_parallel_rank(),
            data_size=_data_size(),
        )

    def _log(self, factor: float, grad_norm: float, batch_size: int) -> None:
        loss_sum, tokens = sum_over_data_parallel(self._loss_and_tokens).tolist()
        seconds = self.progress.lap()
        positions = self._samples * self.run.model.seq_length
        metrics = {
            "lm loss": loss_sum / tokens if tokens else math.nan,
            "learning-rate": factor * self.run.optimizer.lr,
            "grad-norm": grad_norm,
            "batch-size": float(batch_size),
            "iteration-time": seconds / self._steps,
            "tokens/sec": positions / seconds,
            "clipped-fraction": self._clipped / self._steps,
        }
        self._emit(metrics)
        self._reset_interval()
        if not math.isfinite(metrics["lm loss"]):
            self._stop(f"loss is {metrics['lm loss']}")

    def _stop(self, what: str) -> None:
        """End a run that diverged; nothing is saved any more."""
        self.result.diverged = True
        self.echo(
            f"{what} at iteration {self.state.iteration}: the run diverged and stops without "
            "saving; lower optimizer.lr or lengthen schedule.lr_warmup_iters"
        )

    def _emit(self, metrics: dict[str, float]) -> None:
        iteration = self.state.iteration
        self.result.history.append({"iteration": float(iteration), **metrics})
        for sink in self.sinks:
            sink.write(iteration, metrics)
        left = self.progress.seconds_left(iteration)
        self.echo(console_line(iteration, self.run.training.train_iters, metrics, left))

    def _periodic(self) -> None:
        """Evaluation and checkpoints inside the run; the last iteration is ``_finish``'s."""
        iteration, run = self.state.iteration, self.run
        if iteration == run.training.train_iters or self.result.diverged:
            return
        if run.training.eval_interval and iteration % run.training.eval_interval == 0:
            self._evaluate()
        if run.checkpoint.save_interval and iteration % run.checkpoint.save_interval == 0:
            self._save()

    def _finish(self) -> None:
        self._evaluate()
        if self.state.iteration > self.result.iteration:
            self._save()

    def _save(self) -> None:
        if self.run.checkpoint.save is not None:
            folder = save_checkpoint(self.state, Path(self.run.checkpoint.save))
            self.echo(f"saved checkpoint {folder}")
            # The time of saving belongs to no iteration.
            self.progress.lap()

    def _evaluate(self) -> None:
        training = self.run.training
        if self.data.valid is None or training.eval_iters == 0:
            return
        batch = training.eval_iters * training.global_batch_size
        count = batch // (training.micro_batch_size * _data_size())
        report = evaluate_batches(self.state, self._batches(self.data.valid, 0, batch), count)
        loss_sum, tokens = sum_over_data_parallel(report.double()).tolist()
        loss = loss_sum / tokens if tokens else math.nan
        self.result.validation_loss = loss
        perplexity = math.exp(min(loss, 20.0))
        self._emit({"lm loss validation": loss, "lm loss validation ppl": perplexity})
        self.progress.lap()


def _data_size() -> int:
    return int(parallel_state.get_data_parallel_world_size())
