"""Checks of one machine before training: GPUs, disks, packages, data. No other rank takes part.

What a check finds is words, never an exception: a node must be able to say what is wrong with it.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import platform as interpreter
import re
import shutil
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path

import torch

from megatron_mup import platform
from megatron_mup.checkpoint.provenance import data_identity
from megatron_mup.config import RunConfig, TransformerImpl
from megatron_mup.data.blend import expand_blend, parse_blend, train_paths
from megatron_mup.errors import MupError
from megatron_mup.memory import checkpoint_bytes
from megatron_mup.parameterization.roles import Role
from megatron_mup.revision import revision
from megatron_mup.training.ranks import Launch

CHECKPOINTS_WITH_ROOM = 2
"""Checkpoints that must fit on the disk: one is written before an older one is deleted."""
TEMPORARY_GB = 1.0
"""10^9 bytes that must be free in the temporary folder (assumption: compiled kernels, sockets)."""

_PACKAGES = ("torch", "megatron-core", "transformer-engine", "numpy", "emerging-optimizers")
_NOT_IN_LAYERS = (Role.EMBEDDING, Role.UNEMBEDDING, Role.GAIN, Role.BIAS)
_SQUARE = 1024


@dataclass(frozen=True, kw_only=True)
class MachineFindings:
    """What one machine has.

    Attributes:
        failures: check -> what is wrong, in words.
        versions: package or device -> version.
        data: digest of the training data's index and manifests; None without configured data.
    """

    failures: Mapping[str, str] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    data: str | None = None


@dataclass(frozen=True, kw_only=True)
class DeviceFindings:
    """What this rank's GPU is.

    Attributes:
        name: what tells it from others on the node; None on a CPU.
        failure: what is wrong with it, in words.
    """

    name: str | None = None
    failure: str | None = None


def check_machine(
    run: RunConfig, *, free_gb: float | None, environment: Mapping[str, str] = os.environ
) -> MachineFindings:
    """Check the machine of this process.

    Args:
        run: the run's configuration.
        free_gb: space that checkpoints need, 10^9 bytes; None: of two checkpoints of this model.
        environment: of this process.
    """
    digest: list[str] = []

    def data() -> str | None:
        found = data_digest(run)
        digest.extend([] if found is None else [found])
        return None

    checks: dict[str, Callable[[], str | None]] = {
        "GPUs": lambda: _gpus(run, environment),
        "checkpoint disk": lambda: _checkpoint_disk(run, free_gb),
        "temporary folder": lambda: _too_full(Path(tempfile.gettempdir()), TEMPORARY_GB),
        "data": data,
    }
    failures = {}
    for name, check in checks.items():
        try:
            problem = check()
        except (MupError, OSError, RuntimeError) as error:
            problem = str(error) or type(error).__name__
        if problem is not None:
            failures[name] = problem
    return MachineFindings(
        failures=failures, versions=_versions(), data=digest[0] if digest else None
    )


def _gpus(run: RunConfig, environment: Mapping[str, str]) -> str | None:
    visible = torch.cuda.device_count() if platform.has_cuda() else 0
    processes = processes_on_node(environment)
    if visible == 0:
        promised = environment.get("SLURM_GPUS_ON_NODE", "0") not in ("", "0")
        asked = run.model.transformer_impl is TransformerImpl.TRANSFORMER_ENGINE
        if not promised and not asked:
            return None
        return "torch sees no GPU, but the job has some" if promised else "torch sees no GPU"
    # Where the scheduler gives each process its own GPU, each sees one.
    if visible == 1 or processes is None or visible >= processes:
        return None
    return f"{visible} visible for {processes} processes"


def processes_on_node(environment: Mapping[str, str]) -> int | None:
    """Processes of the run on this machine, by torchrun or Slurm; None if neither tells.

    Args:
        environment: of a rank.
    """
    local = environment.get("LOCAL_WORLD_SIZE", "")
    if local.isdecimal():
        return int(local)
    # 8(x16) is eight on each of sixteen nodes; of 8,4 nobody says which is this one.
    match = re.fullmatch(r"(\d+)(\(x\d+\))?", environment.get("SLURM_STEP_TASKS_PER_NODE", ""))
    return int(match[1]) if match else None


def _checkpoint_disk(run: RunConfig, free_gb: float | None) -> str | None:
    if run.checkpoint.save is None:
        return None
    folder = Path(run.checkpoint.save)
    folder.mkdir(parents=True, exist_ok=True)
    # A read-only or broken disk has free space, too.
    with tempfile.NamedTemporaryFile(dir=folder, prefix=".preflight.", suffix=".tmp") as stream:
        stream.write(b"x")
        stream.flush()
        os.fsync(stream.fileno())
    needed = checkpoints_gb(run) if free_gb is None else free_gb
    return _too_full(folder, needed)


def checkpoints_gb(run: RunConfig) -> float:
    """Space that a run's checkpoints need at least, 10^9 bytes."""
    matrices = others = 0
    for row in run.table.rows:
        if row.tensor.role in _NOT_IN_LAYERS:
            others += math.prod(row.tensor.shape)
        else:
            matrices += math.prod(row.tensor.shape)
    return CHECKPOINTS_WITH_ROOM * checkpoint_bytes(run, matrices, others) / 1e9


def _too_full(folder: Path, needed_gb: float) -> str | None:
    free = shutil.disk_usage(folder).free / 1e9
    if free >= needed_gb:
        return None
    return f"{_size(free)} free in {folder}, {_size(needed_gb)} needed"


def _size(gb: float) -> str:
    return f"{gb:.1f} GB" if gb >= 1 else f"{gb * 1e3:.1f} MB"


def _versions() -> dict[str, str]:
    found = {"python": interpreter.python_version(), "megatron_mup": revision()}
    for package in _PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    if platform.has_cuda():
        found["GPU"] = torch.cuda.get_device_name()
        found["CUDA"] = str(torch.version.cuda)
    return found


def data_digest(run: RunConfig) -> str | None:
    """What must be equal wherever the run reads its data: indices, manifests and sizes.

    The tokens themselves are not read; that would take hours.

    Args:
        run: the run's configuration.

    Returns:
        SHA-256; None without configured shards.

    Raises:
        DataError: a shard is missing or damaged.
    """
    identity = data_identity(run)
    if identity is None:
        return None
    prefixes, _ = expand_blend(parse_blend(train_paths(run)))
    sizes = [os.path.getsize(f"{prefix}{end}") for prefix in prefixes for end in (".bin", ".idx")]
    text = json.dumps([identity, sizes], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def check_device(launch: Launch) -> DeviceFindings:
    """Multiply two known matrices on this rank's GPU.

    Args:
        launch: place of this process.
    """
    if not platform.has_cuda():
        return DeviceFindings()
    name = None
    try:
        platform.bind_device(launch.local_rank)
        name = str(torch.cuda.get_device_properties(torch.cuda.current_device()).uuid)
        ones = torch.ones(_SQUARE, _SQUARE, device=platform.device())
        found = float((ones @ ones).mean())
    except RuntimeError as error:
        return DeviceFindings(name=name, failure=str(error).splitlines()[0])
    if found != _SQUARE:
        return DeviceFindings(name=name, failure=f"a product of ones is {found:g}, not {_SQUARE}")
    return DeviceFindings(name=name)
