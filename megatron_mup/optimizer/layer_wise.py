"""Muon over data-parallel ranks: whole matrices are dealt out, one owner each.

Newton-Schulz needs a matrix whole, so Megatron's byte-wise distributed optimizer cannot hold it.
Its layer-wise one gives each matrix to one rank, while embeddings, readout and vectors, which AdamW
trains, stay byte-wise. The gradient buffers must be laid out accordingly before DDP makes them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from megatron.core import optimizer as upstream_optimizer
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig
from megatron.core.optimizer.layer_wise_optimizer import (
    LayerWiseDistributedOptimizer,
    tag_params_for_buffer_routing,
)
from megatron.core.optimizer.optimizer import FP32Optimizer
from megatron.core.optimizer.param_layout import FullParamLayout

from megatron_mup.config import OptimizerName, RunConfig


class LayerWiseOptimizer(LayerWiseDistributedOptimizer):  # type: ignore[misc]
    """Upstream's layer-wise optimizer, also for fp32.

    Upstream (0.19.2) wraps its torch optimizers only for bf16; bare ones lack the methods that its
    own step calls.
    """

    def __init__(
        self,
        optimizers: list[Any],
        config: OptimizerConfig,
        pg_collection: Any = None,
        init_state_fn_list: list[Callable[..., None]] | None = None,
        model_chunks: list[Any] | None = None,
    ) -> None:
        if not config.bf16:
            starts = init_state_fn_list or [lambda *_: None] * len(optimizers)
            optimizers = [
                FP32Optimizer(inner, config, start)
                for inner, start in zip(optimizers, starts, strict=True)
            ]
        super().__init__(optimizers, config, pg_collection, init_state_fn_list, model_chunks)


def register_layer_wise_optimizer() -> None:
    """Have upstream's factory build ``LayerWiseOptimizer``, which it looks up by name."""
    upstream_optimizer.LayerWiseDistributedOptimizer = LayerWiseOptimizer


def buffer_layout(
    run: RunConfig,
    chunk: torch.nn.Module,
    buffers: DistributedDataParallelConfig,
    *,
    bucketed: bool,
) -> FullParamLayout | None:
    """Where each parameter of a chunk lies in its gradient buffers.

    Args:
        run: the run's configuration.
        chunk: GPTModel before wrapping; its parameters are marked for their buffer.
        buffers: the configuration of its DDP.
        bucketed: whether DDP will cut the chunk's buffers into buckets.

    Returns:
        The argument ``full_param_layout`` of DDP; None where DDP's own layout is right.
    """
    muon = run.optimizer.optimizer is OptimizerName.MUON
    if not (muon and run.parallel.use_distributed_optimizer):
        return None
    tag_params_for_buffer_routing([chunk])
    group = parallel_state.get_data_parallel_group(with_context_parallel=True)
    # DDP's own numbers (0.19.2), which it does not offer to callers that bring a layout.
    bucket_size = max(40_000_000, 1_000_000 * group.size())
    overlapped = bucketed and buffers.overlap_grad_reduce
    parameters: Sequence[Any] = [p for p in chunk.parameters() if p.requires_grad]
    return LayerWiseDistributedOptimizer.compute_full_param_layout(
        parameters, bucket_size if overlapped else None, group.size(), buffers
    )
