"""From samples to microbatches: which samples each step and each rank reads.

Sample numbers are global and consecutive: the step that starts after n consumed samples reads
n ... n + batch - 1 whatever the layout, which makes resuming exact.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from megatron.core import parallel_state
from megatron.core.utils import get_batch_on_this_cp_rank
from torch import Tensor

from megatron_mup import platform
from megatron_mup.data.datasets import Samples
from megatron_mup.training.sample_counts import global_batch_size as global_batch_size
from megatron_mup.training.sample_counts import samples_after as samples_after

Batch = dict[str, Tensor]
_KEYS = ("tokens", "labels", "loss_mask", "position_ids")


def micro_batches(
    samples: Samples,
    *,
    first: int,
    batch_size: int,
    micro_batch_size: int,
    data_rank: int = 0,
    data_size: int = 1,
) -> Iterator[Batch]:
    """Microbatches of one step for one data-parallel rank.

    Args:
        samples: dataset; sample numbers beyond its length wrap around.
        first: number of the step's first sample.
        batch_size: sequences of the step over all ranks.
        micro_batch_size: sequences of one microbatch.
        data_rank: data-parallel rank of this process.
        data_size: number of data-parallel ranks.

    Yields:
        Tensors [B, S] on this process's device.
    """
    device = platform.device()
    for micro in range(batch_size // (micro_batch_size * data_size)):
        start = first + (micro * data_size + data_rank) * micro_batch_size
        rows = [samples[(start + row) % len(samples)] for row in range(micro_batch_size)]
        yield {key: torch.stack([row[key] for row in rows]).to(device) for key in _KEYS}


def context_parts(batches: Iterator[Batch]) -> Iterator[Batch]:
    """This context-parallel rank's positions of each microbatch.

    Rank r of C holds the chunks r and 2C - 1 - r of 2C: an early and a late one, so that causal
    attention costs every rank the same. Needs Megatron's parallel state.

    Args:
        batches: tensors [B, S], the same on all context-parallel ranks.

    Returns:
        Tensors [B, S / C]; ``batches`` itself without context parallelism.
    """
    if parallel_state.get_context_parallel_world_size() == 1:
        return batches
    group = parallel_state.get_context_parallel_group()
    return (get_batch_on_this_cp_rank(batch, False, cp_group=group) for batch in batches)
