"""Save checkpoints: staged at once, written in the background, published whole or not at all.

Files are written under ``iter_0000100.tmp/``. When every rank's files are on the disk, rank 0 adds
metadata, record and checksums and gives the folder its name; then the tracker and the deletion of
old checkpoints. A save that fails anywhere is given up by all ranks alike: its folder is removed,
the reason is told, and training goes on.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config

from megatron_mup import platform
from megatron_mup.checkpoint.contents import saved_tree
from megatron_mup.checkpoint.folders import METADATA, RECORD, REPLACED, write_tracker
from megatron_mup.checkpoint.integrity import (
    checkpoint_folder,
    digest_files,
    whole_iterations,
    write_checksums,
)
from megatron_mup.checkpoint.provenance import provenance
from megatron_mup.checkpoint.record import make_record
from megatron_mup.checkpoint.resume import FoundCheckpoint, from_first_rank
from megatron_mup.checkpoint.retention import (
    TEMPORARY,
    Remover,
    iterations_to_delete,
)
from megatron_mup.checkpoint.writing import ForkedWriter, Plan, SlowWait, Written, plan_writing
from megatron_mup.config import RunConfig
from megatron_mup.data.publication import sync_folder
from megatron_mup.errors import CheckpointError
from megatron_mup.training.state import TrainState
from megatron_mup.training.step import gathered_parameters

logger = logging.getLogger(__name__)

ABANDONED = ".abandoned"
"""Ending of a checkpoint from which no run continues: the run went back behind it."""
_POLL_SECONDS = 0.02
_REMOVAL_SECONDS = 60.0
"""How long the end of a run waits for deleted checkpoints to go: well below the minutes that a
scheduler's warning signal leaves (assumption)."""


@dataclass(frozen=True)
class _Flight:
    """A save that is being written."""

    iteration: int
    plan: Plan
    writer: ForkedWriter


class CheckpointSaver:
    """Saves the checkpoints of a run; at most one is being written.

    Every rank makes one and calls its methods at the same steps.

    Args:
        run: the run's configuration; ``checkpoint.save`` names the folder.
        resumed: what the run continues; None for a new one.
        echo: receives a line for each saved checkpoint, on every rank.
        published: receives the iteration of each saved checkpoint, on every rank.
        owned: asked on rank 0 before anything is renamed or deleted: whether the folder is still
            this run's.
        clock: seconds that never go back, for the warnings of a long wait.

    Attributes:
        failed: why the last save failed, in words; None if it did not, the same on every rank.
    """

    def __init__(
        self,
        run: RunConfig,
        *,
        resumed: FoundCheckpoint | None = None,
        echo: Callable[[str], None] = logger.info,
        published: Callable[[int], None] | None = None,
        owned: Callable[[], bool] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        if run.checkpoint.save is None:
            raise CheckpointError("checkpoint.save is not set; give the folder to save to")
        self.failed: str | None = None
        self._root = Path(run.checkpoint.save)
        self._run, self._echo, self._published = run, echo, published
        self._owned, self._clock = owned, clock
        self._remover = Remover()
        self._flight: _Flight | None = None
        history = [] if resumed is None else resumed.history(run)
        origin = from_first_rank(partial(provenance, run, world_size=dist.get_world_size()))
        self._record = make_record(run, provenance=origin, history=history)

    @property
    def in_flight(self) -> bool:
        """Whether a checkpoint is being written."""
        return self._flight is not None

    def start(self, state: TrainState) -> None:
        """Save the state as it is now; with ``checkpoint.async_save`` only stage it.

        Waits for the save before. A failure is told by ``failed``, never raised.
        """
        self._await_writers()
        iteration = state.iteration
        temporary = _temporary(self._root, iteration)
        problem = from_first_rank(partial(self._make_room, temporary))
        if problem is not None:
            self._give_up(iteration, problem)
            return
        with gathered_parameters(state):
            plan = plan_writing(saved_tree(state), temporary)
            self._flight = _Flight(iteration, plan, ForkedWriter(plan))
        if not self._run.checkpoint.async_save:
            self._await_writers()

    def poll(self) -> None:
        """Publish the checkpoint that is being written, if all ranks are done; never waits long.

        Costs nothing while no save is under way, else one tiny all-reduce.
        """
        if self._flight is not None and _on_all_ranks(self._flight.writer.done()):
            self._finish(self._flight)

    def wait(self) -> None:
        """Stay until no checkpoint is being written or, for up to a minute, deleted."""
        self._await_writers()
        # The other ranks are ahead then, and wait for rank 0 no longer than their time limit.
        limit = 60 * self._run.parallel.distributed_timeout_minutes
        self._remover.wait(min(_REMOVAL_SECONDS, limit / 2))

    def close(self) -> None:
        """Give up a save that is under way, without asking the other ranks; for failed runs.

        Deletion goes on as long as the process does, and the next start completes it.
        """
        if self._flight is not None:
            self._flight.writer.stop()
            self._flight = None
        self._remover.close()

    def _await_writers(self) -> None:
        # Asking again and again outlasts the collectives' time limit, a blocking wait would not.
        slow = SlowWait(self._clock)
        while self._flight is not None:
            self.poll()
            if self._flight is not None:
                seconds = slow.due()
                if seconds is not None and dist.get_rank() == 0:
                    _warn_of_wait(self._flight, seconds)
                time.sleep(_POLL_SECONDS)

    def _finish(self, flight: _Flight) -> None:
        self._flight = None
        outcome = flight.writer.outcome()
        first = dist.get_rank() == 0
        gathered: list[Any] = [None] * dist.get_world_size()
        dist.gather_object(outcome, gathered if first else None, dst=0)
        problem = from_first_rank(partial(self._publish, flight, gathered))
        if problem is not None:
            self._give_up(flight.iteration, problem)
            return
        self.failed = None
        self._echo(f"saved checkpoint {checkpoint_folder(self._root, flight.iteration)}")
        if self._published is not None:
            self._published(flight.iteration)
        if first:
            self._tidy(flight.iteration)

    def _publish(self, flight: _Flight, outcomes: Sequence[Written | str]) -> str | None:
        """Rank 0: complete the folder and give it its name; why not, in words."""
        problems = [outcome for outcome in outcomes if isinstance(outcome, str)]
        if problems:
            return "; ".join(problems)
        written = [outcome for outcome in outcomes if isinstance(outcome, Written)]
        try:
            _complete(flight.plan, written, self._record)
            if self._taken_over():
                return f"another job has taken {self._root} over"
            final = checkpoint_folder(self._root, flight.iteration)
            _give_name(flight.plan.folder, final, self._remover)
        # CheckpointError: what another rank wrote is not seen from here.
        except (OSError, RuntimeError, CheckpointError) as error:
            return f"{flight.plan.folder}: {error}"
        return None

    def _give_up(self, iteration: int, problem: str) -> None:
        self.failed = problem
        if dist.get_rank() == 0:
            if self._taken_over():
                logger.error("iteration %d is not saved: %s", iteration, problem)
                return
            self._remover.remove(_temporary(self._root, iteration))
            newest = next(iter(whole_iterations(self._root)), None)
            kept = "there is none yet" if newest is None else f"the newest is iteration {newest}"
            logger.error(
                "could not save iteration %d: %s. Checkpoints saved before are intact (%s)",
                iteration,
                problem,
                kept,
            )

    def _make_room(self, temporary: Path) -> str | None:
        """Rank 0: an empty folder to write to; why not, in words."""
        if self._taken_over():
            return f"another job has taken {self._root} over"
        self._remover.remove(temporary)
        try:
            temporary.mkdir(parents=True)
        except OSError as error:
            return f"{temporary}: {error.strerror or error}"
        return None

    def _taken_over(self) -> bool:
        return self._owned is not None and not self._owned()

    def _tidy(self, iteration: int) -> None:
        """Rank 0: what follows a publication; nothing here can undo it."""
        options = self._run.checkpoint
        try:
            write_tracker(self._root, iteration)
            for newer in whole_iterations(self._root):
                if newer > iteration:
                    _set_aside(checkpoint_folder(self._root, newer), self._remover)
        except OSError as error:
            logger.warning("after saving iteration %d: %s", iteration, error)
        for old in iterations_to_delete(
            # One that could not be set aside must not cost the new one its place.
            [saved for saved in whole_iterations(self._root) if saved <= iteration],
            keep_last=options.keep_last,
            retain_interval=options.save_retain_interval,
        ):
            self._remover.remove(checkpoint_folder(self._root, old))


def _temporary(root: Path, iteration: int) -> Path:
    final = checkpoint_folder(root, iteration)
    return final.with_name(final.name + TEMPORARY)


def _warn_of_wait(flight: _Flight, seconds: float) -> None:
    done = flight.writer.done()
    logger.warning(
        "training has waited %.0f s for %s to be written; %s. Neither "
        "parallel.distributed_timeout_minutes nor faults.exit_duration_in_mins ends this wait: if "
        "the file system hangs, end the job. Checkpoints saved before are intact",
        seconds,
        flight.plan.folder,
        "another rank's part is not done" if done else "the first rank's part is not done",
    )


def _on_all_ranks(flag: bool) -> bool:
    if dist.get_world_size() == 1:
        return flag
    box = torch.tensor([int(flag)], dtype=torch.int32, device=platform.device())
    dist.all_reduce(box, op=dist.ReduceOp.MIN)
    return bool(box.item())


def _complete(plan: Plan, written: list[Written], record: dict[str, Any]) -> None:
    """Add what concerns the whole checkpoint: metadata, record, checksums."""
    plan.writer.finish(plan.metadata, [part.results for part in written])
    save_config(CheckpointingConfig("torch_dist", 1), str(plan.folder))
    (plan.folder / RECORD).write_text(json.dumps(record, indent=1), encoding="utf-8")
    digests = digest_files(plan.folder, [".metadata", METADATA, RECORD])
    for part in written:
        digests.update(part.digests)
    for name, digest in digests.items():
        found = (plan.folder / name).stat().st_size
        if found != digest.bytes:
            raise OSError(f"{name} has {found} bytes here, its rank wrote {digest.bytes}")
    write_checksums(plan.folder, digests)
    sync_folder(plan.folder)


def _give_name(temporary: Path, final: Path, remover: Remover) -> None:
    """Give a complete checkpoint its name.

    A folder of that name (the same iteration, saved before) is moved aside first and deleted last;
    if the run is killed in between, ``retention.remove_leftovers`` does the second rename.
    """
    aside = final.with_name(final.name + REPLACED)
    if final.exists():
        remover.remove(aside)
        final.rename(aside)
    try:
        temporary.rename(final)
    except OSError:
        if aside.exists():
            aside.rename(final)
        raise
    sync_folder(final.parent)
    remover.remove(aside)


def _set_aside(folder: Path, remover: Remover) -> None:
    """Take a checkpoint that this run went back behind out of the way of the next start."""
    target = folder.with_name(folder.name + ABANDONED)
    remover.remove(target)
    folder.rename(target)
    logger.warning(
        "%s is newer than what was just saved, so this run does not continue it; it is now %s",
        folder,
        target,
    )


def save_checkpoint(state: TrainState, root: Path) -> Path:
    """Save one checkpoint and wait for it; every rank must call it.

    Args:
        state: model, optimizer and counters.
        root: the folder to save to; ``checkpoint.save`` of the state's run is not used.

    Returns:
        The finished folder.

    Raises:
        CheckpointError: it could not be written.
    """
    checkpoint = replace(state.run.checkpoint, save=str(root), keep_last=None)
    saver = CheckpointSaver(replace(state.run, checkpoint=checkpoint))
    saver.start(state)
    saver.wait()
    saver.close()
    if saver.failed is not None:
        raise CheckpointError(f"could not save iteration {state.iteration}: {saver.failed}")
    return checkpoint_folder(root, state.iteration)
