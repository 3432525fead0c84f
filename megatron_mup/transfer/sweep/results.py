"""From what a worker answers to a row of the table. Must not import torch."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from megatron_mup import __version__
from megatron_mup.config import RunConfig
from megatron_mup.data.blend import expand_blend, parse_blend, train_paths, valid_paths
from megatron_mup.data.shards import open_shard
from megatron_mup.revision import revision
from megatron_mup.transfer.runs import Row, Status
from megatron_mup.transfer.sweep.cells import Cell
from megatron_mup.transfer.sweep.scaling import parameter_counts


@dataclass(frozen=True, kw_only=True)
class Origin:
    """What all rows of one command share.

    Attributes:
        sweep: its name.
        data_sha256: of the shards.
        commit: of this package; empty for an installed one.
        torch: its version.
        megatron_core: its version.
    """

    sweep: str
    data_sha256: str
    commit: str
    torch: str
    megatron_core: str


def origin_of(sweep_name: str, run: RunConfig) -> Origin:
    """Describe this installation and the shards.

    Args:
        sweep_name: name in the YAML.
        run: any run of the sweep: all read the same shards.

    Raises:
        DataError: a shard is missing or damaged.
    """
    return Origin(
        sweep=sweep_name,
        data_sha256=data_digest(run),
        commit=revision().removeprefix(__version__).removeprefix("-"),
        torch=metadata.version("torch"),
        megatron_core=metadata.version("megatron-core"),
    )


def data_digest(run: RunConfig) -> str:
    """Identity of the training and held-out shards and their blend, wherever they lie.

    A shard made elsewhere has no manifest: the digest of its .idx stands for it.
    """
    parts: list[Any] = []
    for paths in (train_paths(run), valid_paths(run)):
        prefixes, weights = expand_blend(parse_blend(paths))
        parts.append([[_shard_digest(Path(prefix)) for prefix in prefixes], weights])
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _shard_digest(prefix: Path) -> str:
    manifest = open_shard(prefix).manifest
    if manifest is not None:
        return manifest.bin_sha256
    with Path(f"{prefix}.idx").open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


@dataclass(frozen=True, kw_only=True)
class Attempted:
    """A cell that is through.

    Attributes:
        status: how it ended.
        outcome: the worker's answer; empty if it failed.
        seconds: of all attempts.
        machine: that trained it.
        started: UTC, ISO 8601.
    """

    status: Status
    outcome: Mapping[str, Any]
    seconds: float
    machine: str
    started: str


def make_row(cell: Cell, attempted: Attempted, origin: Origin) -> Row:
    """The row of a cell that is through."""
    training, seq_length = cell.run.training, cell.run.model.seq_length
    total, rest = parameter_counts(cell.run)
    steps = int(attempted.outcome.get("steps", 0))
    finished = attempted.status is Status.FINISHED
    loss = attempted.outcome.get("validation_loss") if finished else None
    train_loss = attempted.outcome.get("train_loss")
    return Row(
        sweep=origin.sweep,
        cell=cell.id,
        arm=cell.arm,
        axis=cell.axis,
        size=cell.size,
        log2_lr=cell.log2_lr,
        seed=cell.seed,
        settings=cell.settings,
        status=attempted.status,
        validation_loss=math.nan if loss is None else loss,
        train_loss=math.nan if train_loss is None else train_loss,
        steps=steps,
        planned_steps=training.train_iters,
        tokens=steps * training.global_batch_size * seq_length,
        parameters=total,
        non_embedding_parameters=rest,
        validation_tokens=training.eval_iters * training.global_batch_size * seq_length,
        loss_spikes=int(attempted.outcome.get("loss_spikes", 0)),
        seconds=round(attempted.seconds, 3),
        config_sha256=cell.config_sha256,
        data_sha256=origin.data_sha256,
        commit=origin.commit,
        version=__version__,
        torch=origin.torch,
        megatron_core=origin.megatron_core,
        machine=attempted.machine,
        started=attempted.started,
    )
