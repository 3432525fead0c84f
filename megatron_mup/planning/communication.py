"""Seconds of transfers: tensor-parallel collectives, stages' activations, gradients, weights.

Ranks lie as Megatron's groups do: tensor, context, data, pipeline, the first nearest. Rings move
(n - 1) / n of the bytes once to scatter or to gather, twice to reduce for all. Bytes leave a node
by as many adapters as the group has members there. What context-parallel ranks exchange is taken
as hidden behind attention. Shares of bandwidth and latencies are in ``assumptions``.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_mup.config import RecomputeGranularity, RecomputeMethod, RunConfig
from megatron_mup.planning.compute import Seconds, Speed, tokens_on_rank

_GRADIENT_BYTES = 4
_BF16_BYTES = 2


@dataclass(frozen=True, kw_only=True)
class Links:
    """Connections at one end of the assumptions.

    Attributes:
        speed: GPU and rates.
        gpus: of the run.
    """

    speed: Speed
    gpus: int

    @property
    def nvlink(self) -> float:
        """Bytes per second of a GPU in one direction inside a node."""
        rates = self.speed.rates
        return self.speed.gpu.nvlink_gigabytes_per_second * 1e9 * rates.nvlink_efficiency

    def between(self, members: int, span: int) -> float:
        """Bytes per second of each member of a group.

        Args:
            members: GPUs of the group.
            span: GPUs from its first to its last one.
        """
        node = self.speed.rates.node_size
        if span <= node:
            return self.nvlink
        stride = max(1, span // members)
        here = max(1, min(members, node // stride))
        return min(self.nvlink, here * self.speed.rates.network_gigabytes_per_second * 1e9)


def tensor_seconds(run: RunConfig, layers: int, links: Links) -> Seconds:
    """Collectives of the tensor-parallel ranks for one microbatch, none hidden.

    Two reductions of the residual stream in each layer's forward pass, as many in the backward
    pass (arXiv:1909.08053, Section 3); with sequence parallelism each is a scatter and a gather
    of the same bytes (arXiv:2205.05198, Section 4.2.2). Recomputed layers reduce again.

    Args:
        run: the run's configuration, in a layout.
        layers: of the rank, all chunks.
        links: connections.
    """
    size = run.parallel.tensor_model_parallel_size
    if size == 1:
        return Seconds(forward=0.0, backward=0.0)
    stream = tokens_on_rank(run) * run.model.hidden_size * _BF16_BYTES
    reduction = 2 * (size - 1) / size * stream / links.between(size, size)
    calls = 2 if run.parallel.sequence_parallel else 1
    of_layer = 2 * (reduction + calls * links.speed.rates.collective_seconds)
    return Seconds(
        forward=layers * of_layer, backward=(layers + _recomputed(run, layers)) * of_layer
    )


def _recomputed(run: RunConfig, layers: int) -> int:
    if run.recompute.recompute_granularity is not RecomputeGranularity.FULL:
        return 0
    if run.recompute.recompute_method is not RecomputeMethod.BLOCK:
        return layers
    return min(layers, run.parallel.model_chunks * (run.recompute.recompute_num_layers or 0))


def stage_transfer_seconds(run: RunConfig, links: Links) -> float:
    """Activations that come and gradients that go for one microbatch on one pipeline rank.

    The interleaved schedule hides the stated share behind other chunks' work.
    """
    parallel = run.parallel
    if parallel.pipeline_model_parallel_size == 1:
        return 0.0
    stream = tokens_on_rank(run) * run.model.hidden_size * _BF16_BYTES
    if parallel.sequence_parallel:
        stream /= parallel.tensor_model_parallel_size
    # The next stage's rank is one stage's GPUs away.
    rate = links.between(2, links.gpus)
    rates = links.speed.rates
    one = stream / rate + rates.collective_seconds
    shown = 1.0 if parallel.virtual_stages is None else 1 - rates.overlap
    return 2 * parallel.model_chunks * one * shown


def data_seconds(run: RunConfig, elements: int, links: Links, *, microbatch: Seconds) -> float:
    """What a step waits for gradients and weights of the other data-parallel ranks.

    Overlapped, gradients are reduced behind the last microbatch's backward pass and weights are
    gathered behind the first one's forward pass: the stated share of it at most.

    Args:
        run: the run's configuration, in a layout.
        elements: parameters on the rank.
        links: connections.
        microbatch: of this rank.
    """
    parallel = run.parallel
    stage = links.gpus // parallel.pipeline_model_parallel_size
    members = stage // parallel.tensor_model_parallel_size
    if members == 1:
        return 0.0
    rate = links.between(members, stage)
    sharded = parallel.use_distributed_optimizer
    once = (members - 1) / members * elements / rate
    reduce = _GRADIENT_BYTES * once * (1 if sharded else 2)
    gather = (1 if run.precision.fp8_param_gather else _BF16_BYTES) * once if sharded else 0.0
    rates = links.speed.rates
    waits = 0.0
    for transfer, hidden, behind in (
        (reduce, parallel.overlap_grad_reduce, microbatch.backward),
        (gather, parallel.overlap_param_gather, microbatch.forward),
    ):
        covered = rates.overlap * min(transfer, behind) if hidden else 0.0
        waits += transfer - covered + (rates.collective_seconds if transfer else 0.0)
    return waits
