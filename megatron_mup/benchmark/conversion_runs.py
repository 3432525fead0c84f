"""What the benchmark of conversions runs: drawn checkpoints, the commands, plain reads and writes.

Decides nothing about what is measured how often; prints nothing.
"""

from __future__ import annotations

import math
import os
import shutil
import sys
import time
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_mup.benchmark.preprocessing_memory import footprint
from megatron_mup.config import RunConfig
from megatron_mup.config_io import config_from_dict
from megatron_mup.convert.megatron_target import write_megatron
from megatron_mup.parameterization.roles import Role, logical_tensors

FULL_LAYERS = 12
FULL_WIDTH = 8192
"""Layers and width of the 10B model of arXiv:2404.05728."""

_HEAD_DIM = 128
_BLOCK = 16 << 20
"""Bytes that the plain runs read and write at once."""


class Storage(StrEnum):
    """What the source checkpoint stores of each weight."""

    BF16 = "bf16"
    FP32 = "fp32"
    MAIN_WEIGHTS = "bf16+fp32"

    @property
    def bytes_each(self) -> int:
        """Bytes stored for each parameter."""
        return {"bf16": 2, "fp32": 4, "bf16+fp32": 6}[self.value]


@dataclass(frozen=True, kw_only=True)
class Cost:
    """One run of a conversion."""

    wall_seconds: float
    """Until everything that it wrote is on the disk."""

    peak_bytes: int
    read_bytes: int
    """Size of what was converted."""

    written_bytes: int


@dataclass(frozen=True, kw_only=True)
class Work:
    """One conversion, as a user gives it.

    Attributes:
        arguments: of ``megatron-mup convert``.
        source: the folder that it reads.
        target: the folder that it makes.
    """

    arguments: tuple[str, ...]
    source: Path
    target: Path


def model_run(*, width: int, layers: int, gated: bool, storage: Storage) -> RunConfig:
    """A model shaped like the 10B one, under muP, with no multiplier at 1.

    Args:
        width: hidden size, a multiple of 64.
        layers: of the Transformer.
        gated: gated SiLU instead of squared ReLU, with the same F.
        storage: whether the run is in bf16.
    """
    # The tiny model too must have heads for two ranks.
    heads = max(2, width // _HEAD_DIM)
    return config_from_dict(
        {
            "model": {
                "num_layers": layers,
                "hidden_size": width,
                "num_attention_heads": heads,
                "ffn_hidden_size": 4 * width,
                "vocab_size": 32128,
                "seq_length": 256,
                "activation": "swiglu" if gated else "squared_relu",
            },
            "parameterization": {
                "name": "abs_mup",
                "base_hidden_size": 64,
                "base_ffn_hidden_size": 256,
                "base_kv_channels": width // heads,
                "base_num_layers": layers,
                "embedding_multiplier": 3.0,
                "residual_multiplier": 0.7,
                "logit_multiplier": 0.3,
            },
            "optimizer": {"lr": 1e-3},
            "training": {"train_iters": 1, "global_batch_size": 1, "micro_batch_size": 1},
            "precision": {"bf16": storage is not Storage.FP32},
        },
        origin="the benchmark's model",
    )


def parameters(run: RunConfig) -> int:
    """Parameters of a run's model, padded vocabulary included."""
    return sum(math.prod(tensor.shape) for tensor in logical_tensors(run.model.shape))


def largest_tensor_bytes(run: RunConfig) -> int:
    """Bytes of the largest logical tensor in fp32."""
    return 4 * max(math.prod(tensor.shape) for tensor in logical_tensors(run.model.shape))


def fitting_run(source_bytes: float, *, width: int, gated: bool, storage: Storage) -> RunConfig:
    """The model with the most layers, at most those of the 10B one, that a source's size allows.

    Args:
        source_bytes: what the weights of the source may take; one layer is made at least.
        width: hidden size.
        gated: see ``model_run``.
        storage: what is stored of each weight.
    """
    one, two = (
        parameters(model_run(width=width, layers=layers, gated=gated, storage=storage))
        for layers in (1, 2)
    )
    more = int((source_bytes / storage.bytes_each - one) // (two - one))
    layers = min(max(1, 1 + more), FULL_LAYERS)
    return model_run(width=width, layers=layers, gated=gated, storage=storage)


class DrawnWeights:
    """Random weights that exist only while somebody holds them; a ``WeightSource``.

    Args:
        run: the model and its multipliers.
        storage: bf16 draws values that bf16 holds exactly, so that no main weights are stored.
    """

    def __init__(self, run: RunConfig, storage: Storage) -> None:
        self.model, self.multipliers = run.model, run.table.multipliers
        self.where = "drawn weights"
        self.provenance: Mapping[str, Any] = {}
        self._tensors = {tensor.name: tensor for tensor in logical_tensors(run.model.shape)}
        self._rounded = storage is Storage.BF16

    def read(self, name: str) -> Tensor:
        """Draw one tensor: the same values each time, fp32."""
        tensor = self._tensors[name]
        generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        spread = math.sqrt(3 / (1 if tensor.role is Role.EMBEDDING else tensor.fan_in))
        values = torch.empty(tensor.shape).uniform_(-spread, spread, generator=generator)
        return values.bfloat16().float() if self._rounded else values


def write_source(run: RunConfig, folder: Path, storage: Storage) -> None:
    """Write the checkpoint that is converted, tensor by tensor."""
    write_megatron(DrawnWeights(run, storage), folder, run=run)


def run_conversion(work: Work) -> Cost:
    """Run one conversion in a process of its own; its source is not in the page cache.

    Raises:
        DataError: it failed.
    """
    make_cold(work.source)
    command = [sys.executable, "-m", "megatron_mup", "convert", *work.arguments]
    found = footprint(command)
    return Cost(
        # A conversion syncs what it makes itself; if it did not, this would count.
        wall_seconds=found.wall_seconds + _sync_seconds(work.target),
        peak_bytes=found.peak_bytes,
        read_bytes=folder_bytes(work.source),
        written_bytes=folder_bytes(work.target),
    )


def plain_write(path: Path, count: int) -> float:
    """Seconds for writing and syncing so many bytes one after the other; removes them again."""
    # What can be compressed would measure the disk's compression.
    block = memoryview(os.urandom(_BLOCK))
    began = time.perf_counter()
    with path.open("wb", buffering=0) as file:
        for first in range(0, count, _BLOCK):
            file.write(block[: min(_BLOCK, count - first)])
        os.fsync(file.fileno())
    seconds = time.perf_counter() - began
    path.unlink()
    return seconds


def plain_read(folder: Path) -> float:
    """Seconds for reading all files of a folder that are not in the page cache."""
    make_cold(folder)
    buffer = memoryview(bytearray(_BLOCK))
    began = time.perf_counter()
    for path in _files(folder):
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass
    return time.perf_counter() - began


def make_cold(folder: Path) -> None:
    """Put a folder's files out of the page cache."""
    for path in _files(folder):
        with path.open("rb") as file:
            # Pages that are not yet on the disk would stay.
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def folder_bytes(folder: Path) -> int:
    """Bytes of all files below a folder."""
    return sum(path.stat().st_size for path in _files(folder))


def remove(folder: Path) -> None:
    """Remove a folder with all it holds, if it is there."""
    if folder.exists():
        shutil.rmtree(folder)


def _sync_seconds(folder: Path) -> float:
    began = time.perf_counter()
    for path in _files(folder):
        with path.open("rb") as file:
            os.fsync(file.fileno())
    return time.perf_counter() - began


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())
