"""What a worker changes for some cells: stand-ins for a GPU's parts, and defects.

A defect is a plausible mistake or a missing reduction; the matrix must turn red under each.
"""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
import torch.nn.functional as functional
from megatron.core import parallel_state
from torch import Tensor

from megatron_mup.model import initialization, layer_specs, naming
from megatron_mup.training import state, step

DDP = "megatron.core.distributed.DistributedDataParallel"
BUCKETS = "megatron.core.distributed.param_and_grad_buffer._ParamAndGradBucketGroup"


class _Gather(torch.autograd.Function):
    """All context-parallel ranks' parts, one after the other along axis 0."""

    @staticmethod
    def forward(ctx: Any, part: Tensor) -> Tensor:
        group = parallel_state.get_context_parallel_group()
        parts = [torch.empty(part.shape) for _ in range(group.size())]
        dist.all_gather(parts, part.contiguous(), group=group)
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        group = parallel_state.get_context_parallel_group()
        total = gradient.contiguous()
        dist.all_reduce(total, group=group)
        return total.chunk(group.size())[group.rank()]


class GatheringAttention(layer_specs.SdpaCoreAttention):
    """Attention of one context-parallel rank that gathers all keys and values.

    Stands for TransformerEngine's: the same function, from the definition.
    """

    def forward(self, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> Tensor:
        group = parallel_state.get_context_parallel_group()
        rank, size = group.rank(), group.size()
        positions = [self._positions(place, size, len(query)) for place in range(size)]
        mine, everyone = positions[rank], torch.cat(positions)
        keys, values = (_Gather.apply(part).permute(1, 2, 0, 3) for part in (key, value))
        context = functional.scaled_dot_product_attention(
            query.permute(1, 2, 0, 3),
            keys,
            values,
            attn_mask=everyone[None, :] <= mine[:, None],
            scale=self.softmax_scale,
            enable_gqa=query.shape[2] != key.shape[2],
        )
        return context.permute(2, 0, 1, 3).flatten(2)

    @staticmethod
    def _positions(rank: int, size: int, length: int) -> Tensor:
        """Global positions of a rank's tokens, by its two chunks."""
        chunks = torch.arange(length * size).chunk(2 * size)
        return torch.cat([chunks[rank], chunks[2 * size - 1 - rank]])


@contextmanager
def _context_parallelism_on_the_cpu() -> Iterator[None]:
    # The refusal is right for users: only this stand-in can do it without TransformerEngine.
    refusal = "megatron_mup.config.layout_checks._check_context_parallel"
    with patch(refusal), patch.object(layer_specs, "SdpaCoreAttention", GatheringAttention):
        yield


def _small_buckets() -> AbstractContextManager[Any]:
    small = partial(state.DistributedDataParallelConfig, bucket_size=20_000)
    return patch.object(state, "DistributedDataParallelConfig", small)


def _fan_in_of_the_shard() -> AbstractContextManager[Any]:
    fill = initialization._fill

    def mutated(view: Tensor, row: Any, shape: Any, *, seed: int, shard: Any) -> None:
        if row.tensor.partition_axis == 1:
            row = replace(row, init_std=row.init_std * math.sqrt(shard.size))
        fill(view, row, shape, seed=seed, shard=shard)

    return patch.object(initialization, "_fill", mutated)


def _layers_per_chunk() -> AbstractContextManager[Any]:
    canonical = naming._canonical

    def mutated(model: torch.nn.Module, local: str, *, tied: bool) -> str:
        name = canonical(model, local, tied=tied)
        number = re.match(r"decoder\.layers\.\d+\.", local)
        return re.sub(r"^decoder\.layers\.\d+\.", number.group(), name) if number else name

    return patch.object(naming, "_canonical", mutated)


def _first_shard() -> AbstractContextManager[Any]:
    return patch("megatron_mup.model.gpt.Shard", lambda _rank, size: initialization.Shard(0, size))


def _denominator_per_microbatch() -> AbstractContextManager[Any]:
    right = step.loss_function

    def mutated(*arguments: Any) -> Any:
        total, count, report = right(*arguments)
        return total / count, torch.ones_like(count), report

    return patch.object(step, "loss_function", mutated)


def _same_context_part() -> AbstractContextManager[Any]:
    def mutated(batches: Iterator[dict[str, Tensor]]) -> Iterator[dict[str, Tensor]]:
        for batch in batches:
            yield {key: value[:, : value.shape[1] // 2] for key, value in batch.items()}

    return patch.object(step, "context_parts", mutated)


def _without(name: str) -> AbstractContextManager[Any]:
    """Skip one reduction of ``finalize_model_grads``."""
    # The package's attribute of this name is the function.
    return patch.object(sys.modules["megatron.core.distributed.finalize_model_grads"], name)


PATCHES: dict[str, Any] = {
    "small buckets": _small_buckets,
    "context parallelism on the CPU": _context_parallelism_on_the_cpu,
    "a shard's fan-in taken for the global one": _fan_in_of_the_shard,
    "norm gains' gradients not summed": partial(
        _without, "_allreduce_non_tensor_model_parallel_grads"
    ),
    "tied gradients not summed": partial(_without, "_allreduce_word_embedding_grads"),
    "layers counted per chunk": _layers_per_chunk,
    "gradients not summed": partial(patch, f"{DDP}.finish_grad_sync"),
    "parameters not gathered": partial(patch, f"{BUCKETS}.start_param_sync"),
    "every rank draws the first shard": _first_shard,
    "denominator per microbatch": _denominator_per_microbatch,
    "context ranks read the same part": _same_context_part,
}


@contextmanager
def patched(names: list[str]) -> Iterator[None]:
    """Apply patches by name."""
    with ExitStack() as stack:
        for name in names:
            stack.enter_context(PATCHES[name]())
        yield
