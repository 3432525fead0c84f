"""The training loop: from a configuration to a trained, evaluated, saved model.

Reads top to bottom: check everything that can be checked, build, resume, step, report, and end in
one of the ways that ``exit_codes`` lists. The table has decided everything width-dependent before.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from megatron_mup.checkpoint.lease import Lease
from megatron_mup.checkpoint.load import load_checkpoint
from megatron_mup.checkpoint.resume import choose_checkpoint
from megatron_mup.checkpoint.save import CheckpointSaver
from megatron_mup.config import RunConfig
from megatron_mup.data.datasets import Samples
from megatron_mup.describe import describe_run
from megatron_mup.status import RunState, StatusWriter
from megatron_mup.training.bad_steps import BadSteps, Outcome, Verdict, save_bad_batch
from megatron_mup.training.batches import Batch, global_batch_size, micro_batches
from megatron_mup.training.exit_requests import ExitReason, ExitRequests
from megatron_mup.training.failure_notes import note_result, noted_failure
from megatron_mup.training.interval import perplexity
from megatron_mup.training.meters import BusyClock
from megatron_mup.training.metrics import Progress, Sink, console_line, open_sinks
from megatron_mup.training.outcome import TrainResult
from megatron_mup.training.peers import translate_lost_peers
from megatron_mup.training.preparation import (
    TrainData,
    check_before_work,
    configured_data,
    data_text,
    hold_save_folder,
    new_interval,
    origin_text,
)
from megatron_mup.training.processes import (
    Launch,
    detect_launch,
    is_log_rank,
    parallel_processes,
    sum_over_data_parallel,
)
from megatron_mup.training.profiler import StepProfiler, step_profiler
from megatron_mup.training.role_metrics import decay_text, decay_timescales
from megatron_mup.training.state import TrainState, build_state
from megatron_mup.training.step import StepObserver, check_observer, evaluate_batches, train_step

Print = Callable[[str], None]


def train(
    run: RunConfig,
    *,
    data: TrainData | None = None,
    launch: Launch | None = None,
    observer: StepObserver | None = None,
    echo: Print = print,
) -> TrainResult:
    """Train a model as configured.

    Args:
        run: the configuration.
        data: samples to use instead of the configured shards.
        launch: place of this process; unset means the launcher's variables.
        observer: looks on at steps; ``logging.diagnostics_interval`` needs one.
        echo: receives the log lines, on the first rank only.

    Returns:
        History and outcome, the same on every rank.

    Raises:
        MupError: before any work, if data, layout or checkpoint do not fit; later, if a rank dies.
    """
    launch = detect_launch() if launch is None else launch
    with noted_failure(launch.rank), ExitStack() as stack:
        # Signals that come while the model is built count as well.
        exits = stack.enter_context(ExitRequests(run.faults.exit_duration_in_mins))
        check_observer(run, observer)
        epochs = check_before_work(run, launch, with_shards=data is None)
        peers = stack.enter_context(translate_lost_peers(run, launch.rank))
        stack.enter_context(parallel_processes(run, launch))
        lease = hold_save_folder(run, stack)
        echo = echo if is_log_rank() else (lambda _line: None)
        if data is None:
            echo(data_text(epochs or {}))
            data = configured_data(run)
        state, tools = _start(run, stack, exits=exits, lease=lease, observer=observer, echo=echo)
        loop = _Loop(state, data, tools)
        peers.iteration = lambda: state.iteration
        return loop.run_to_end(step_profiler(run.training, state.iteration, stack))


def _start(
    run: RunConfig,
    stack: ExitStack,
    *,
    exits: ExitRequests,
    lease: Lease | None,
    observer: StepObserver | None,
    echo: Print,
) -> tuple[TrainState, _Tools]:
    """Build the state, resume it, and open what the loop reports to."""
    found = choose_checkpoint(run)
    state = build_state(run)
    if found is not None:
        load_checkpoint(state, found.folder, weights_only=run.checkpoint.finetune)
    tools = _Tools(run, stack, exits=exits, lease=lease, start=state.iteration, echo=echo)
    tools.observer = observer
    stack.enter_context(nullcontext() if observer is None else observer.opened(state))
    if run.checkpoint.save is not None:
        tools.saver = CheckpointSaver(
            run,
            resumed=found,
            echo=echo,
            published=tools.status.saved,
            owned=None if lease is None else lease.confirm,
        )
        stack.callback(tools.saver.close)
    echo(describe_run(run))
    echo(decay_text(run))
    if run.checkpoint.load is not None:
        echo(origin_text(run, found))
    return state, tools


class _Tools:
    """What the loop reports to, and what may end it."""

    def __init__(
        self,
        run: RunConfig,
        stack: ExitStack,
        *,
        exits: ExitRequests,
        lease: Lease | None,
        start: int,
        echo: Print,
    ) -> None:
        first = is_log_rank()
        save = run.checkpoint.save
        self.exits = exits
        self.lease = lease
        self.echo = echo
        self.saver: CheckpointSaver | None = None
        self.observer: StepObserver | None = None
        self.status = StatusWriter(
            Path(save) if first and save is not None else None,
            run,
            iteration=start,
            world_size=dist.get_world_size(),
            job_id=os.environ.get("SLURM_JOB_ID"),
            lost=None if lease is None else lease.lost,
        )
        stack.push(self._report_failure)
        self.sinks: list[Sink] = open_sinks(run, stack, start=start) if first else []

    def _report_failure(
        self,
        _kind: type[BaseException] | None,
        error: BaseException | None,
        _traceback: TracebackType | None,
    ) -> None:
        if error is not None:
            self.status.enter(RunState.FAILED, exit_reason=str(error) or type(error).__name__)


@dataclass(frozen=True)
class _Batch:
    """Where a step's samples are: ``size`` from number ``first`` on."""

    first: int
    size: int


class _Loop:
    """The loop's own variables: interval sums, progress, result."""

    def __init__(self, state: TrainState, data: TrainData, tools: _Tools) -> None:
        self.state = state
        self.data = data
        self.tools = tools
        self.run = state.run
        self.result = TrainResult(iteration=state.iteration, saves=tools.saver is not None)
        self.progress = Progress(self.run.training.train_iters, state.iteration)
        self.interval = new_interval(self.run)
        self.busy = BusyClock(state.model_chunks[0].config)
        self.bad_steps = BadSteps(self.run.faults)
        if state.health:
            self.bad_steps.load_state_dict(state.health)
        self.verdict = Verdict(Outcome.GOOD)

    def run_to_end(self, profiler: StepProfiler) -> TrainResult:
        """Step until ``train_iters``, a request to stop, or a bad step; then evaluate and save."""
        training, state, tools = self.run.training, self.state, self.tools
        if state.iteration >= training.train_iters:
            tools.echo(
                f"the checkpoint is at iteration {state.iteration} and train_iters is "
                f"{training.train_iters}: nothing left to train"
            )
        for sink in tools.sinks:
            sink.write(state.iteration, decay_timescales(self.run))
        tools.status.enter(RunState.TRAINING)
        while state.iteration < training.train_iters and not self._over():
            self._step()
            profiler.step()
            self._periodic()
        self._finish()
        self.result.iteration = state.iteration
        return self.result

    def _over(self) -> bool:
        return self.result.diverged or self.result.stopped is not None

    def _step(self) -> None:
        state, run = self.state, self.run
        batch = _Batch(
            state.consumed_samples, global_batch_size(run.training, state.consumed_samples)
        )
        self.busy.begin()
        report = train_step(
            state,
            self._batches(self.data.train, batch),
            batch.size // (run.training.micro_batch_size * _data_size()),
            judge=self._judge,
            observer=self.tools.observer,
        )
        if report.observed:
            self._record(report.observed)
        state.consumed_samples += batch.size
        state.skipped_iterations = self.bad_steps.skipped
        self.interval.add(report, batch_size=batch.size)
        if self.verdict.vetoed:
            self._report_bad_step(batch)
        last = state.iteration == run.training.train_iters
        if state.iteration % run.logging.log_interval == 0 or last:
            self._log()

    def _judge(self, loss_sum_and_tokens: Tensor, grad_norm: float) -> bool:
        """Whether the update must be left out; all ranks give the same numbers to ``judge``."""
        loss = None
        # A loss that is not finite shows in the norm; only a spike needs its value in every step.
        if self.run.faults.loss_spike_factor is not None:
            total, tokens = sum_over_data_parallel(loss_sum_and_tokens.double()).tolist()
            loss = total / tokens if tokens else None
        self.verdict = self.bad_steps.judge(loss, grad_norm)
        return self.verdict.vetoed

    def _report_bad_step(self, batch: _Batch) -> None:
        iteration, reason = self.state.iteration, self.verdict.reason
        if self.verdict.outcome is Outcome.SKIP:
            self.tools.echo(f"iteration {iteration}: {reason}; its update is left out")
            return
        self.result.diverged = True
        self._log()
        self.tools.echo(
            f"{reason} at iteration {iteration}: the run diverged and stops without saving; lower "
            "optimizer.lr, lengthen schedule.lr_warmup_iters, or leave such steps out with "
            "faults.bad_step_policy=skip and max_skipped_steps"
        )
        folder = self.run.checkpoint.save
        if folder is not None and _reads_data():
            batches = list(self._batches(self.data.train, batch))
            rank = dist.get_rank()
            save_bad_batch(Path(folder), iteration, rank=rank, batches=batches, reason=reason)

    def _batches(self, samples: Samples, batch: _Batch) -> Iterator[Batch]:
        return micro_batches(
            samples,
            first=batch.first,
            batch_size=batch.size,
            micro_batch_size=self.run.training.micro_batch_size,
            data_rank=parallel_state.get_data_parallel_rank(),
            data_size=_data_size(),
        )

    def _log(self) -> None:
        metrics = self.interval.close(
            consumed_samples=self.state.consumed_samples, busy_seconds=self.busy.take()
        )
        if metrics:
            self._emit(metrics)

    def _emit(self, metrics: dict[str, float]) -> None:
        iteration, tools = self.state.iteration, self.tools
        self._record(metrics)
        left = self.progress.seconds_left(iteration)
        tools.echo(console_line(iteration, self.run.training.train_iters, metrics, left))
        tools.status.logged(
            iteration,
            metrics,
            seconds_per_iteration=self.progress.seconds_per_iteration(iteration),
            skipped_steps=self.state.skipped_iterations,
        )

    def _record(self, metrics: dict[str, float]) -> None:
        self.result.history.append({"iteration": float(self.state.iteration), **metrics})
        for sink in self.tools.sinks:
            sink.write(self.state.iteration, metrics)

    def _periodic(self) -> None:
        """Requests to stop, evaluation and checkpoints; the last iteration is ``_finish``'s."""
        iteration, run, tools = self.state.iteration, self.run, self.tools
        if tools.saver is not None and tools.saver.in_flight:
            with self.interval.paused():
                tools.saver.poll()
        self.result.stopped = tools.exits.agreed(lease_lost=self._lease_lost())
        if iteration == run.training.train_iters or self._over():
            return
        if run.training.eval_interval and iteration % run.training.eval_interval == 0:
            self._evaluate()
        if run.checkpoint.save_interval and iteration % run.checkpoint.save_interval == 0:
            self._save()

    def _finish(self) -> None:
        """End the run in one of the ways that ``TrainResult`` knows."""
        reason, result, tools = self.result.stopped, self.result, self.tools
        if self.state.iteration == self.run.training.train_iters and not result.diverged:
            # A request to stop that comes with the last step changes nothing any more.
            result.stopped = reason if reason is ExitReason.LEASE_LOST else None
        if result.stopped is not None:
            tools.echo(f"stopping at iteration {self.state.iteration}: {result.stopped.words}")
        saves = result.stopped is None or result.stopped.saves
        # Before the evaluation, which may be long, so that nothing in it can cost the last steps.
        if tools.saver is not None and saves:
            if not result.diverged and self.state.iteration > result.iteration:
                self._save()
            tools.saver.wait()
            result.save_failed = tools.saver.failed
        if result.stopped is None and not result.diverged:
            self._evaluate()
        # Asked once more: another job may have come while the last checkpoint was written.
        asks = tools.saver is not None and saves
        if asks and tools.exits.agreed(lease_lost=self._lease_lost()) is ExitReason.LEASE_LOST:
            result.stopped = ExitReason.LEASE_LOST
        self._report_end()

    def _lease_lost(self) -> bool:
        return self.tools.lease is not None and self.tools.lease.lost()

    def _report_end(self) -> None:
        result, status = self.result, self.tools.status
        note_result(result)
        if result.diverged:
            status.enter(RunState.DIVERGED, exit_reason=self.verdict.reason)
        elif result.save_failed is not None:
            status.enter(RunState.FAILED, exit_reason=result.save_failed)
        elif result.stopped is None:
            status.enter(RunState.FINISHED)
        elif result.stopped is not ExitReason.LEASE_LOST:
            status.enter(RunState.STOPPED, exit_reason=result.stopped.words)

    def _save(self) -> None:
        saver, status = self.tools.saver, self.tools.status
        if saver is None:
            return
        # The time of saving belongs to no iteration.
        with self.interval.paused():
            status.enter(RunState.SAVING)
            self.state.health = self.bad_steps.state_dict()
            saver.start(self.state)
            status.enter(RunState.TRAINING)

    def _evaluate(self) -> None:
        training = self.run.training
        if self.data.valid is None or training.eval_iters == 0:
            return
        batch = _Batch(0, training.eval_iters * training.global_batch_size)
        count = batch.size // (training.micro_batch_size * _data_size())
        with self.interval.paused():
            self.tools.status.enter(RunState.EVALUATING)
            report = evaluate_batches(self.state, self._batches(self.data.valid, batch), count)
            loss_sum, tokens = sum_over_data_parallel(report.double()).tolist()
            self.tools.status.enter(RunState.TRAINING)
        loss = loss_sum / tokens if tokens else math.nan
        self.result.validation_loss = loss
        self._emit({"lm loss validation": loss, "lm loss validation ppl": perplexity(loss)})


def _data_size() -> int:
    return int(parallel_state.get_data_parallel_world_size())


def _reads_data() -> bool:
    """One rank of each data-parallel replica."""
    return bool(
        parallel_state.get_tensor_model_parallel_rank() == 0
        and parallel_state.get_context_parallel_rank() == 0
        and parallel_state.is_pipeline_first_stage()
    )
