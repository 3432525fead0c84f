"""Memory and step time of a run in one layout.

A step of n microbatches on P stages of v chunks takes n + (P - 1) / v times the slowest stage's
microbatch (arXiv:2104.04473, Section 2.2), what gradients and weights wait, and the update. Data
loading, evaluation, checkpoints, restarts and Muon's Newton-Schulz products are not counted.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from megatron_mup.config import RunConfig
from megatron_mup.flops import model_flops_per_sequence
from megatron_mup.memory import (
    ChunkContents,
    Memory,
    bubble_fraction,
    optimizer_bytes,
    rank_memory,
    workspace_bytes,
)
from megatron_mup.planning.assumptions import Rates
from megatron_mup.planning.communication import (
    Links,
    data_seconds,
    stage_transfer_seconds,
    tensor_seconds,
)
from megatron_mup.planning.compute import Seconds, Speed, stage_seconds
from megatron_mup.planning.contents import chunk_contents
from megatron_mup.planning.gpus import Gpu


@dataclass(frozen=True, kw_only=True)
class StageMemory:
    """Bytes of a rank of one pipeline stage.

    Attributes:
        counted: weights, gradients, optimizer, activations; the dry run's numbers.
        workspace: short-lived tensors; see ``memory.workspace_bytes``.
        context: CUDA context and libraries; assumption.
    """

    counted: Memory
    workspace: float
    context: float

    @property
    def total(self) -> float:
        """All of them."""
        return self.counted.total + self.workspace + self.context


@dataclass(frozen=True, kw_only=True)
class StepTime:
    """Seconds of a step by what they are spent on, at one end of the assumptions.

    Attributes:
        compute: kernels of the slowest stage.
        tensor: its tensor-parallel collectives.
        stages: its transfers to the next stages.
        bubble: waiting for other stages.
        data: waiting for gradients and weights.
        update: the optimizer's, gradients' clearing and norm, FP8 weights.
    """

    compute: float
    tensor: float
    stages: float
    bubble: float
    data: float
    update: float

    @property
    def total(self) -> float:
        """Of the whole step."""
        return self.compute + self.tensor + self.stages + self.bubble + self.data + self.update


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """A layout that fits, and how long its steps take.

    Attributes:
        run: the configuration in this layout.
        gpus: ranks.
        memory: of each pipeline stage.
        slow: step time at the slow end.
        fast: step time at the fast end.
        peak: dense FLOP/s of a GPU in the layout's precision.
    """

    run: RunConfig
    gpus: int
    memory: tuple[StageMemory, ...]
    slow: StepTime
    fast: StepTime
    peak: float

    @property
    def data_parallel_size(self) -> int:
        """Ranks with the same parameters and other sequences."""
        return self.gpus // self.run.parallel.model_parallel_size

    @property
    def microbatches(self) -> int:
        """Of a step on one rank."""
        training = self.run.training
        return training.global_batch_size // (training.micro_batch_size * self.data_parallel_size)

    @property
    def peak_memory(self) -> float:
        """Bytes of the fullest stage."""
        return max(stage.total for stage in self.memory)

    @property
    def middle_seconds(self) -> float:
        """Geometric mean of slow and fast step, by which layouts are ranked."""
        return math.sqrt(self.slow.total * self.fast.total)

    @property
    def tokens_per_second(self) -> tuple[float, float]:
        """Of all GPUs, slow and fast."""
        tokens = self.run.training.global_batch_size * self.run.model.seq_length
        return tokens / self.slow.total, tokens / self.fast.total

    @property
    def tflops_per_gpu(self) -> tuple[float, float]:
        """Model TFLOP/s of one GPU, slow and fast."""
        batch = self.run.training.global_batch_size
        flops = model_flops_per_sequence(self.run.model).total * batch / self.gpus / 1e12
        return flops / self.slow.total, flops / self.fast.total

    @property
    def mfu(self) -> tuple[float, float]:
        """Model FLOPs utilization, slow and fast: of the FP8 peak if layers run in FP8."""
        slow, fast = self.tflops_per_gpu
        return slow * 1e12 / self.peak, fast * 1e12 / self.peak

    def gpu_hours(self, samples: int) -> tuple[float, float]:
        """Of so many sequences at the full batch, fast and slow."""
        steps = samples / self.run.training.global_batch_size
        hours = steps * self.gpus / 3600
        return self.fast.total * hours, self.slow.total * hours


Contents = tuple[tuple[ChunkContents, ...], ...]
"""Chunks of each pipeline stage."""


def contents(run: RunConfig) -> Contents:
    """What the ranks of each pipeline stage hold."""
    return tuple(
        chunk_contents(run, stage) for stage in range(run.parallel.pipeline_model_parallel_size)
    )


def stage_memory(
    run: RunConfig, held: Contents, *, data_parallel_size: int, rates: Rates
) -> tuple[StageMemory, ...]:
    """Memory of a rank of each pipeline stage.

    Args:
        run: the run's configuration, in a layout.
        held: from ``contents``.
        data_parallel_size: ranks with the same parameters and other sequences.
        rates: for the context's size.
    """
    stages = []
    for stage, chunks in enumerate(held):
        counted = rank_memory(run, chunks, stage=stage, data_parallel_size=data_parallel_size)
        stages.append(
            StageMemory(
                counted=counted,
                workspace=workspace_bytes(run, readout=any(chunk.readout for chunk in chunks)),
                context=rates.context_gigabytes * 1e9,
            )
        )
    return tuple(stages)


def step_time(run: RunConfig, held: Contents, *, gpu: Gpu, gpus: int, rates: Rates) -> StepTime:
    """Time of a full step at one end of the assumptions.

    Args:
        run: the run's configuration, in a layout that divides.
        held: from ``contents``.
        gpu: of every rank.
        gpus: ranks.
        rates: the end.
    """
    speed = Speed(gpu=gpu, rates=rates)
    links = Links(speed=speed, gpus=gpus)
    parallel, training = run.parallel, run.training
    stages = [_stage_times(run, chunks, speed, links) for chunks in held]
    worst = max(stages, key=lambda times: times.compute.total + times.tensor.total)
    transfer = stage_transfer_seconds(run, links)
    data_size = gpus // parallel.model_parallel_size
    count = training.global_batch_size // (training.micro_batch_size * data_size)
    one = worst.compute.total + worst.tensor.total + transfer
    idle = bubble_fraction(run, count)
    return StepTime(
        compute=count * worst.compute.total,
        tensor=count * worst.tensor.total,
        stages=count * transfer,
        bubble=count * one * idle / (1 - idle),
        data=max(times.data for times in stages),
        update=max(times.update for times in stages),
    )


@dataclass(frozen=True, kw_only=True)
class _StageTimes:
    compute: Seconds
    tensor: Seconds
    data: float
    update: float


def _stage_times(
    run: RunConfig, chunks: tuple[ChunkContents, ...], speed: Speed, links: Links
) -> _StageTimes:
    compute = stage_seconds(run, chunks, speed)
    tensor = tensor_seconds(run, sum(len(chunk.layers) for chunk in chunks), links)
    elements = sum(chunk.elements for chunk in chunks)
    microbatch = Seconds(
        forward=compute.forward + tensor.forward, backward=compute.backward + tensor.backward
    )
    matrices = sum(chunk.matrix_elements for chunk in chunks)
    return _StageTimes(
        compute=compute,
        tensor=tensor,
        data=data_seconds(run, elements, links, microbatch=microbatch),
        update=_update_seconds(run, elements, matrices, speed=speed, gpus=links.gpus),
    )


def _update_seconds(
    run: RunConfig, elements: int, matrices: int, *, speed: Speed, gpus: int
) -> float:
    """Bytes of the update: every state is read and written, gradients are read twice and cleared.

    With the distributed optimizer a rank updates its share. FP8 weights are cast once a step.
    """
    parallel = run.parallel
    copies = gpus // (parallel.tensor_model_parallel_size * parallel.pipeline_model_parallel_size)
    shards = copies if parallel.use_distributed_optimizer else 1
    state = optimizer_bytes(run, matrices, elements - matrices)
    moved = (2 * state + 2 * 4 * elements + 2 * elements) / shards + 4 * elements
    if run.precision.fp8_format is not None:
        moved += 4 * matrices
    return speed.moved(moved)
