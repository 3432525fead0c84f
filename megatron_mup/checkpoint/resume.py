"""Which checkpoint a run continues: checks before any work, then the choice of all ranks.

``check_resumable`` needs no process group and reads records only. ``choose_checkpoint`` is called
by every rank: all files are checked, a damaged checkpoint is named, and the one before is used.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron_mup.checkpoint.folders import (
    TRACKER,
    read_record,
    tracked_iteration,
    usable_iterations,
)
from megatron_mup.checkpoint.integrity import CHECKSUMS, check_files, checkpoint_folder
from megatron_mup.checkpoint.overrides import (
    Change,
    history_entries,
    named_options,
    unneeded_names,
)
from megatron_mup.checkpoint.provenance import data_identity
from megatron_mup.checkpoint.record import check_record, length_warning
from megatron_mup.config import RunConfig
from megatron_mup.errors import CheckpointError, MupError

logger = logging.getLogger(__name__)

_STEP_OPTION = "checkpoint.ckpt_step"


@dataclass(frozen=True)
class FoundCheckpoint:
    """A checkpoint whose files were checked, and that fits the run.

    Attributes:
        folder: ``.../iter_0000100``.
        iteration: its iteration.
        record: its parameterization record.
        changes: differences that ``checkpoint.override`` allows.
    """

    folder: Path
    iteration: int
    record: dict[str, Any]
    changes: list[Change]

    def history(self, run: RunConfig) -> list[Any]:
        """What checkpoints of the run that continues it remember of changed options."""
        if run.checkpoint.finetune:
            return []
        entries = [*self.record.get("history", []), *history_entries(self.changes, self.iteration)]
        # Not again when a restart finds a checkpoint that went back already.
        if run.checkpoint.ckpt_step == self.iteration:
            entries.append(_going_back(self.iteration))
        return entries


def _going_back(step: int) -> dict[str, Any]:
    """How a checkpoint remembers that its run went back to ``checkpoint.ckpt_step``."""
    return {"iteration": step, "options": [_STEP_OPTION], "was": None, "now": step}


def check_resumable(run: RunConfig) -> int | None:
    """Check a checkpoint against a configuration before anything is built.

    Args:
        run: the configuration; ``checkpoint.load`` names the folder.

    Returns:
        The iteration to load, unless its files prove to be damaged; None when the folder never
        held a checkpoint.

    Raises:
        CheckpointError: damaged folder or another parameterization; or ``finetune`` without one.
        ConfigError: ``checkpoint.override`` names what cannot be changed.
    """
    if run.checkpoint.load is None:
        return None
    named_options(run)
    root = Path(run.checkpoint.load)
    if root.name.startswith("iter_"):
        raise CheckpointError(
            f"checkpoint.load '{root}' is one checkpoint; give the folder that holds it, "
            f"'{root.parent}', and choose with checkpoint.ckpt_step"
        )
    problems = []
    for iteration in _candidates(run, root):
        try:
            record = read_record(checkpoint_folder(root, iteration))
        except CheckpointError as error:
            problems.append(str(error))
            continue
        _checked_against(record, run)
        return iteration
    if problems:
        raise _nothing_left(root, problems)
    return None


def _candidates(run: RunConfig, root: Path) -> list[int]:
    """Iterations to try, best first."""
    usable, step = usable_iterations(root), run.checkpoint.ckpt_step
    if step is not None:
        later = _saved_since(run, root, step, usable)
        if step not in usable and not later:
            raise CheckpointError(
                f"checkpoint.ckpt_step={step}: '{root}' holds no whole iteration {step}, but "
                f"{usable}; choose one of these or leave ckpt_step out"
            )
        return [*later, step] if step in usable else later
    if not usable and run.checkpoint.finetune:
        raise CheckpointError(
            f"checkpoint.finetune: '{root}' holds no checkpoint; set checkpoint.load to a folder "
            "that training saved to"
        )
    return usable


def continues_own_folder(run: RunConfig) -> bool:
    """Whether the run saves where it loads from: a restart of its command finds its own work."""
    save, load = run.checkpoint.save, run.checkpoint.load
    if save is None or load is None or run.checkpoint.finetune:
        return False
    return Path(load).resolve() == Path(save).resolve()


def _saved_since(run: RunConfig, root: Path, step: int, usable: Sequence[int]) -> list[int]:
    """Checkpoints that this command saved after it went back to ``checkpoint.ckpt_step``.

    A command that is requeued still names the step that its first start went back to.

    Raises:
        CheckpointError: they are there, but options were changed: this is another command.
    """
    if not continues_own_folder(run):
        return []
    later = [newer for newer in usable if newer > step and _went_back(root, newer, step)]
    if later:
        changes = _checked_against(read_record(checkpoint_folder(root, later[0])), run)
        if changes:
            raise CheckpointError(
                f"checkpoint.ckpt_step={step} was followed before, and iterations {later} were "
                f"saved since; continuing would change {changes[0].text}. To go back to {step} "
                "once more, move the iter_* folders after it away; to continue, leave out ckpt_step"
            )
    return later


def _went_back(root: Path, iteration: int, step: int) -> bool:
    """Whether a checkpoint was saved after its run had gone back to a step."""
    try:
        record = read_record(checkpoint_folder(root, iteration))
    except CheckpointError:
        return False
    return _going_back(step) in record.get("history", [])


def _checked_against(record: dict[str, Any], run: RunConfig) -> list[Change]:
    finetune = run.checkpoint.finetune
    data = None if finetune else data_identity(run)
    return check_record(record, run, weights_only=finetune, data=data)


def _nothing_left(root: Path, problems: list[str]) -> CheckpointError:
    listed = "\n  ".join(problems)
    return CheckpointError(
        f"'{root}' holds no undamaged checkpoint:\n  {listed}\nrestore the named files from a "
        "copy, or start from scratch in another folder"
    )


def choose_checkpoint(run: RunConfig) -> FoundCheckpoint | None:
    """Find the newest checkpoint whose files are what was saved; every rank must call it.

    Args:
        run: the configuration; ``checkpoint.load`` names the folder.

    Returns:
        The same on every rank; None to start from scratch.

    Raises:
        CheckpointError: checkpoints are there but all are damaged, or the one that
            ``checkpoint.ckpt_step`` names is, or it belongs to another run.
    """
    if run.checkpoint.load is None:
        return None
    root = Path(run.checkpoint.load)
    damaged: list[str] = []
    # All ranks follow rank 0's view of the folder: a network disk can show two of them two views.
    for iteration in from_first_rank(partial(_candidates, run, root)):
        folder = checkpoint_folder(root, iteration)
        problems = _problems_on_all_ranks(folder)
        if not problems:
            record = from_first_rank(partial(read_record, folder))
            changes = from_first_rank(partial(_checked_against, record, run))
            found = FoundCheckpoint(folder, iteration, record, changes)
            if dist.get_rank() == 0:
                _tell(run, found)
            return found
        damaged += problems
        if dist.get_rank() == 0:
            logger.warning("checkpoint %s is not used: %s", folder, " ".join(problems))
    if damaged:
        raise _nothing_left(root, damaged)
    return None


def from_first_rank(function: Callable[[], Any]) -> Any:
    """Call a function on rank 0 and give its answer, or its MupError, to every rank."""
    box: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            box[0] = function()
        except MupError as error:
            box[1] = error
    dist.broadcast_object_list(box, src=0)
    if box[1] is not None:
        raise box[1]
    return box[0]


def _problems_on_all_ranks(folder: Path) -> list[str]:
    """Each rank checks its share of the files; the problems of all of them."""
    rank, size = dist.get_rank(), dist.get_world_size()
    problems = []
    try:
        if (folder / CHECKSUMS).exists():
            problems = check_files(folder, rank=rank, size=size)
        elif rank == 0:
            logger.warning(
                "%s was saved without %s by an earlier version: its files are used unchecked",
                folder,
                CHECKSUMS,
            )
    # OSError: a run that is alive may delete or rename the folder meanwhile.
    except (CheckpointError, OSError) as error:
        problems = [str(error)]
    gathered: list[list[str]] = [[] for _ in range(size)]
    dist.all_gather_object(gathered, problems)
    # Every rank reads the list of checksums, so all of them report one that is damaged.
    return list(dict.fromkeys(problem for part in gathered for problem in part))


def _tell(run: RunConfig, found: FoundCheckpoint) -> None:
    """Log everything about the choice that a user could not expect."""
    root, used = found.folder.parent, found.iteration
    tracked = tracked_iteration(root)
    if tracked != str(used) and run.checkpoint.ckpt_step is None:
        logger.warning(
            "%s names '%s', but iteration %d is used; checkpoint.ckpt_step chooses another one",
            root / TRACKER,
            tracked,
            used,
        )
    if not run.checkpoint.finetune:
        _tell_of_resuming(run, found)


def _tell_of_resuming(run: RunConfig, found: FoundCheckpoint) -> None:
    root, used = found.folder.parent, found.iteration
    newer = [iteration for iteration in usable_iterations(root) if iteration > used]
    step = run.checkpoint.ckpt_step
    if step is not None and newer:
        logger.warning(
            "checkpoint.ckpt_step=%d goes back behind iterations %s; leave it out to continue "
            "from the newest",
            step,
            newer,
        )
    if step is not None and used != step:
        logger.warning(
            "checkpoint.ckpt_step=%d was followed before: iteration %d was saved after it and is "
            "continued; to go back once more, move the iter_* folders after %d away",
            step,
            used,
            step,
        )
    for change in found.changes:
        logger.warning("checkpoint.override allows: %s", change.text)
    for name in unneeded_names(run, found.changes):
        logger.warning(
            "checkpoint.override names %s, which does not differ from the checkpoint or may "
            "always differ",
            name,
        )
    warning = length_warning(found.record, run)
    if warning is not None:
        logger.warning(warning)


def check_save_folder(run: RunConfig) -> None:
    """Refuse to save into the folder of a run that this one does not continue.

    Raises:
        CheckpointError: the folder holds checkpoints of another run.
    """
    save = run.checkpoint.save
    if save is None:
        return
    if continues_own_folder(run):
        return
    held = usable_iterations(Path(save))
    if held:
        raise CheckpointError(
            f"checkpoint.save '{save}' already holds iteration {held[0]} of a run that this one "
            f"does not continue; continue it with checkpoint.load={save}, or save elsewhere"
        )
