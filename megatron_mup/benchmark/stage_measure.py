"""One pipeline stage alone on one GPU: some layers, with or without embedding and readout.

Without the embedding it takes a random residual stream and differentiates it as well; without the
readout it is given a random gradient. What other stages, ranks and collectives would add is not
there: tensor and data parallelism are 1, and the optimizer's state is not sharded.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from megatron_mup import platform
from megatron_mup.benchmark.contestants import random_batches
from megatron_mup.benchmark.gpu_contest import clock, release_memory
from megatron_mup.benchmark.measure import WARMUP_STEPS
from megatron_mup.config import RunConfig
from megatron_mup.errors import ConfigError
from megatron_mup.flops import model_flops_per_sequence
from megatron_mup.memory import ChunkContents, rank_memory, workspace_bytes
from megatron_mup.model.gpt import construct, transformer_config
from megatron_mup.model.initialization import Shard, initialize
from megatron_mup.optimizer.build import apply_schedule, build_optimizer
from megatron_mup.planning.assumptions import Rates
from megatron_mup.planning.contents import chunk_contents
from megatron_mup.planning.gpus import Gpu
from megatron_mup.planning.prediction import step_time
from megatron_mup.training.processes import Launch, parallel_processes, when_left
from megatron_mup.training.state import release_chunks, wrap_chunk

ALONE = (
    "parallel.tensor_model_parallel_size=1",
    "parallel.pipeline_model_parallel_size=1",
    "parallel.virtual_pipeline_model_parallel_size=null",
    "parallel.context_parallel_size=1",
    "parallel.sequence_parallel=false",
    "parallel.use_distributed_optimizer=false",
    "parallel.overlap_grad_reduce=false",
    "parallel.overlap_param_gather=false",
    # Zero queries, as a run may start with, would spare the card power in attention.
    "parameterization.q_init=scaled",
)
"""Options of a stage that has a GPU to itself."""

_SMALL_STEPS = 1e-3
"""Share of the peak learning rate: weights stay near their initial values."""


@dataclass(frozen=True, kw_only=True)
class StageParts:
    """What a stage holds.

    Attributes:
        layers: how many, at least 1.
        embedding: whether it starts with the embedding.
        readout: whether it ends in final norm, readout and loss.
    """

    layers: int
    embedding: bool = False
    readout: bool = False

    @property
    def label(self) -> str:
        """In words."""
        ends = (" + embedding" * self.embedding) + (" + readout" * self.readout)
        return f"{self.layers} layers{ends}"


@dataclass(frozen=True, kw_only=True)
class StageMeasurement:
    """Medians over steps, seconds, and bytes.

    Attributes:
        forward: of one microbatch.
        backward: of it.
        update: clipping and optimizer.
        peak_bytes: the allocator's largest use; 0 without a GPU.
        context_bytes: what the device has given away beyond the allocator's; 0 without a GPU.
    """

    forward: float
    backward: float
    update: float
    peak_bytes: int
    context_bytes: int


@dataclass(frozen=True, kw_only=True)
class StagePrediction:
    """What a plan says of the stage at one end of its assumptions; seconds and bytes."""

    compute: float
    update: float
    peak_bytes: float


def stage_contents(run: RunConfig, parts: StageParts) -> ChunkContents:
    """What the stage holds, for the plan's formulas.

    Raises:
        ConfigError: embedding and readout are one matrix.
    """
    model = run.model
    if not model.untie_embeddings_and_output_weights:
        raise ConfigError(
            "a stage without its embedding or readout needs two matrices; set "
            "model.untie_embeddings_and_output_weights=true"
        )
    (whole,) = chunk_contents(run, 0)
    absent = (not parts.embedding) + (not parts.readout)
    matrix = model.padded_vocab_size * model.hidden_size
    return replace(
        whole, other_elements=whole.other_elements - absent * matrix, readout=parts.readout
    )


def stage_flops(run: RunConfig, parts: StageParts) -> float:
    """Model FLOPs of one microbatch through the stage, forward and backward."""
    flops = model_flops_per_sequence(run.model)
    counted = flops.total if parts.readout else flops.total - flops.readout
    return float(counted * run.training.micro_batch_size)


def predict(run: RunConfig, parts: StageParts, *, gpu: Gpu, rates: Rates) -> StagePrediction:
    """The plan's time and memory of one step of one microbatch."""
    chunk = stage_contents(run, parts)
    time = step_time(run, ((chunk,),), gpu=gpu, gpus=1, rates=rates)
    counted = rank_memory(run, (chunk,), stage=0, data_parallel_size=1)
    return StagePrediction(
        compute=time.compute,
        update=time.update,
        peak_bytes=counted.total + workspace_bytes(run, readout=parts.readout),
    )


def measure_stage(run: RunConfig, parts: StageParts, *, steps: int) -> StageMeasurement:
    """Build the stage, take ``steps`` steps after a warmup, and let it go.

    Args:
        run: of as many layers as the stage, with the options ``ALONE``.
        parts: what it holds.
        steps: measured ones, at least 1.
    """
    with parallel_processes(run, Launch()):
        stage = _Stage(run, parts)
        for _ in range(WARMUP_STEPS):
            stage.step(clock())
        if platform.has_cuda():
            torch.cuda.reset_peak_memory_stats()
        times = torch.tensor([stage.step(clock()) for _ in range(steps)], dtype=torch.float64)
        forward, backward, update = times.median(dim=0).values.tolist()
        peak, context = _bytes()
        del stage
    release_memory()
    return StageMeasurement(
        forward=forward, backward=backward, update=update, peak_bytes=peak, context_bytes=context
    )


def _bytes() -> tuple[int, int]:
    """The allocator's peak, and what of the device's memory is used but not by it."""
    if not platform.has_cuda():
        return 0, 0
    free, total = torch.cuda.mem_get_info()
    return torch.cuda.max_memory_allocated(), total - free - torch.cuda.memory_reserved()


class _Stage:
    """The built stage and its inputs; needs the parallel state."""

    def __init__(self, run: RunConfig, parts: StageParts) -> None:
        table, self.parts = run.table, parts
        config = transformer_config(run, table.multipliers)
        ends = (parts.embedding, parts.readout)
        self.chunk: Any = construct(run.model, config, table.multipliers, ends=ends)
        initialize(self.chunk, table, run.model.shape, seed=run.training.seed, shard=Shard(0, 1))
        self.wrapped: Any = wrap_chunk(run, self.chunk, first=True)
        when_left(partial(release_chunks, [self.wrapped]))
        self.optimizer = build_optimizer(
            run, table, model_chunks=[self.chunk], wrapped_chunks=[self.wrapped]
        )
        decay = run.optimizer_numbers.weight_decay
        apply_schedule(self.optimizer, _SMALL_STEPS, weight_decay=decay)
        (self.batch,) = random_batches(run, 1)
        shape = (run.model.seq_length, run.training.micro_batch_size, run.model.hidden_size)
        generator = torch.Generator().manual_seed(0)
        stream_SBM = torch.randn(shape, generator=generator).to(platform.device())
        self.stream_SBM = stream_SBM.to(torch.bfloat16 if run.precision.bf16 else torch.float32)

    def step(self, now: Callable[[], float]) -> tuple[float, float, float]:
        """Forward, backward and update of one microbatch; seconds of each by a clock."""
        self.wrapped.zero_grad_buffer()
        self.optimizer.zero_grad()
        # As the schedules do; otherwise the first step's FP8 weights would serve all steps.
        self.wrapped.set_is_first_microbatch()
        start = now()
        output = self._forward()
        forward = now()
        if self.parts.readout:
            output.float().mean().backward()
        else:
            torch.autograd.backward(output, self.stream_SBM.to(output.dtype))
        self.wrapped.finish_grad_sync()
        backward = now()
        self.optimizer.step()
        return forward - start, backward - forward, now() - backward

    def _forward(self) -> Any:
        if not self.parts.embedding:
            # As the pipeline's schedule hands over what the stage before sent.
            self.chunk.set_input_tensor(self.stream_SBM.detach().requires_grad_())
        batch = self.batch
        labels = {"labels": batch["labels"]} if self.parts.readout else {}
        return self.wrapped(batch["tokens"], batch["position_ids"], None, **labels)
