"""Training losses of every step: kept of runs that are through, read of those that run.

A curve is an array of float32 in NumPy's format, entry t the loss of step t + 1 in nats per token,
NaN where a step was left out. Must not import torch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from megatron_mup.data.publication import published
from megatron_mup.errors import DataError


def losses_by_step(rows: Sequence[Mapping[str, float]]) -> list[float]:
    """Losses in the order of the steps.

    Args:
        rows: metrics with ``iteration``, as a run's history or its metrics file has them.
    """
    found = {int(row["iteration"]): row["lm loss"] for row in rows if "lm loss" in row}
    return [found.get(step, math.nan) for step in range(1, max(found, default=0) + 1)]


def write_curve(path: Path, losses: Sequence[float]) -> None:
    """Keep the losses of a run; the file appears when it is whole.

    Args:
        path: ends in ``.npy``.
        losses: nats per token, one a step.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with published(path) as stream:
        np.save(stream, np.asarray(losses, dtype=np.float32))


def read_curve(path: Path) -> list[float]:
    """What ``write_curve`` wrote.

    Raises:
        DataError: there is no such file, or it holds something else.
    """
    try:
        losses = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise DataError(f"cannot read the losses '{path}': {error}; delete the file") from error
    return [float(loss) for loss in np.ravel(losses)]
