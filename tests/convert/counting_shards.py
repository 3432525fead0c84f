"""Token shards whose ids count up, so that a test knows where it reads."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder


def write_shard(prefix: Path, end: int, *, first: int = 1) -> Path:
    """Write one document of the ids ``first`` to ``end - 1``.

    Returns:
        The prefix.
    """
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.uint16)
    builder.add_item(torch.arange(first, end))
    builder.end_document()
    builder.finalize(f"{prefix}.idx")
    return prefix
