"""What happens before the first step: every check that can be made, data, and who owns the folder.

Checks that need neither processes nor a model come first, so that a wrong option costs seconds.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch

from megatron_mup import platform
from megatron_mup.checkpoint.lease import Lease
from megatron_mup.checkpoint.resume import (
    FoundCheckpoint,
    check_resumable,
    check_save_folder,
    from_first_rank,
)
from megatron_mup.checkpoint.retention import remove_leftovers
from megatron_mup.config import RunConfig
from megatron_mup.data.checks import check_epochs, check_training_data, repetition_warning
from megatron_mup.data.datasets import Samples, build_datasets
from megatron_mup.errors import ConfigError
from megatron_mup.flops import model_flops_per_sequence, peak_tflops
from megatron_mup.model.layer_specs import check_implementation
from megatron_mup.training.batches import samples_after
from megatron_mup.training.interval import Interval
from megatron_mup.training.outputs import check_outputs
from megatron_mup.training.processes import Launch, check_layout, is_log_rank

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainData:
    """Samples to train on and, optionally, held-out samples."""

    train: Samples
    valid: Samples | None = None


def check_before_work(
    run: RunConfig, launch: Launch, *, with_shards: bool
) -> dict[str, float] | None:
    """Every check that needs neither processes nor model.

    Returns:
        How often each configured training shard is read; None unless ``with_shards``.

    Raises:
        MupError: what is wrong, and how to mend it.
    """
    check_layout(run, launch.world_size)
    check_implementation(run.model)
    _check_checkpoints(run)
    epochs = None
    if with_shards:
        check_training_data(run)
        epochs = check_epochs(run, samples_after(run.training, run.planned_iters))
    # Last, because it makes the folders: a run that is refused leaves none behind.
    check_outputs(run)
    if run.precision.bf16 and launch.rank == 0 and (slow := platform.slow_bf16()):
        logger.warning(slow)
    return epochs


def _check_checkpoints(run: RunConfig) -> None:
    try:
        check_resumable(run)
        check_save_folder(run)
    except NotADirectoryError as error:
        # Of a folder that is written this tells more.
        check_outputs(run)
        raise ConfigError(
            f"checkpoint.load '{run.checkpoint.load}' cannot be read ({error.strerror}); give the "
            "save folder of a run"
        ) from error


def hold_save_folder(run: RunConfig, stack: ExitStack) -> Lease | None:
    """Take the save folder for this job and clean up after a killed one; every rank must call it.

    Args:
        run: the run's configuration.
        stack: gives the folder back at the end.

    Returns:
        The lease on the first rank; None elsewhere and without ``checkpoint.save``.

    Raises:
        CheckpointError: another job holds it.
    """
    if run.checkpoint.save is None:
        return None
    folder = Path(run.checkpoint.save)
    lease = Lease(folder, timeout_seconds=run.faults.lease_timeout_seconds)

    def take() -> None:
        stack.enter_context(lease)
        remove_leftovers(folder)
        # The owner that this job may have waited for can have saved until now.
        check_save_folder(run)

    from_first_rank(take)
    return lease if is_log_rank() else None


def configured_data(run: RunConfig) -> TrainData:
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


def data_text(epochs: Mapping[str, float]) -> str:
    """How often the training shards are read, in words, with a warning if any is repeated.

    Args:
        epochs: by shard or set, from ``check_before_work``.
    """
    listed = ", ".join(f"'{prefix}' {count:.3g}" for prefix, count in epochs.items())
    text = f"epochs of the training shards: {listed}"
    warning = repetition_warning(epochs)
    return text if warning is None else f"{text}\n{warning}"


def origin_text(run: RunConfig, found: FoundCheckpoint | None) -> str:
    """Where the weights come from, in words."""
    load = run.checkpoint.load
    if found is None:
        return f"'{load}' holds no checkpoint: starting from scratch"
    what = "weights of" if run.checkpoint.finetune else "resuming from"
    return f"{what} '{load}' at iteration {found.iteration}"


def new_interval(run: RunConfig) -> Interval:
    """The sums of a log interval, with this machine's peak if it is known."""
    peak = run.logging.peak_tflops_per_device
    if peak is None and platform.has_cuda():
        fp8 = run.precision.fp8_format is not None
        peak = peak_tflops(torch.cuda.get_device_name(), fp8=fp8)
    return Interval(
        run,
        flops_per_sample=model_flops_per_sequence(run.model).total,
        peak_flops=None if peak is None else peak * 1e12,
    )
