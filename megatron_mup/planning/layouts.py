"""Candidate layouts of a run on so many GPUs, each checked as training checks it.

Tensor parallelism doubles up to a node, pipeline stages divide the layers or double, chunks divide
a stage's layers, microbatches double. Sequence parallelism goes with tensor parallelism, overlap
with data parallelism. Context parallelism stays as configured: it changes no memory of weights,
and sequences that need it are long.
"""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

from megatron_mup.config import (
    Fp8Format,
    OptimizerName,
    ParallelConfig,
    PrecisionConfig,
    RecomputeConfig,
    RecomputeGranularity,
    RecomputeMethod,
    RunConfig,
)
from megatron_mup.errors import ConfigError
from megatron_mup.memory import has_unfused_attention
from megatron_mup.training.ranks import check_layout


@dataclass
class Refusals:
    """Layouts that cannot be, by reason; reasons that differ in numbers alone are one.

    Attributes:
        counts: reason without its numbers -> layouts.
        examples: the same -> the first message.
    """

    counts: Counter[str] = field(default_factory=Counter)
    examples: dict[str, str] = field(default_factory=dict)

    def add(self, message: str, count: int = 1) -> None:
        """Count a reason for so many layouts."""
        key = re.sub(r"\d[\d.,]*", "N", message)
        self.counts[key] += count
        self.examples.setdefault(key, message)

    def lines(self) -> list[tuple[int, str]]:
        """(layouts, first message) of each reason, the commonest first."""
        return [(count, self.examples[key]) for key, count in self.counts.most_common()]


@dataclass(frozen=True, kw_only=True)
class Split:
    """How ranks share the model.

    Attributes:
        tensor: tensor-parallel ranks.
        stages: pipeline stages.
        chunks: model chunks on each pipeline rank.
    """

    tensor: int
    stages: int
    chunks: int


def splits(run: RunConfig, gpus: int) -> Iterator[Split]:
    """Every way to share the model that is worth a check.

    Args:
        run: the run's configuration.
        gpus: ranks.
    """
    layers = run.model.num_layers
    tensors = {*_doubling(min(gpus, 16)), run.parallel.tensor_model_parallel_size}
    stage_counts = {*_divisors(layers), *_doubling(layers)}
    stage_counts.add(run.parallel.pipeline_model_parallel_size)
    for tensor in sorted(tensors):
        for stages in sorted(count for count in stage_counts if tensor * count <= gpus):
            per_stage = layers // stages
            chunks = _divisors(per_stage) if stages > 1 and layers % stages == 0 else [1]
            for count in chunks:
                yield Split(tensor=tensor, stages=stages, chunks=count)


def _doubling(largest: int) -> list[int]:
    return [2**power for power in range(largest.bit_length()) if 2**power <= largest]


def _divisors(number: int) -> list[int]:
    return [divisor for divisor in range(1, number + 1) if number % divisor == 0]


def data_parallel_size(run: RunConfig, split: Split, gpus: int, *, node_size: int) -> int:
    """Ranks with the same parameters and other sequences.

    Raises:
        ConfigError: the GPUs do not divide, or tensor parallelism leaves a node.
    """
    if split.tensor > node_size:
        raise ConfigError(
            f"tensor_model_parallel_size {split.tensor} exceeds the {node_size} GPUs of a node, "
            "whose NVLink it needs"
        )
    context = run.parallel.context_parallel_size
    ranks = split.tensor * split.stages * context
    if gpus % ranks:
        raise ConfigError(
            f"{gpus} GPUs are no multiple of tensor {split.tensor} x pipeline {split.stages}"
            + (f" x context {context}" if context > 1 else "")
        )
    return gpus // ranks


def micro_batch_sizes(run: RunConfig, data_size: int) -> list[int]:
    """Sequences of a microbatch to try: doubling, and the configured one.

    Raises:
        ConfigError: the batch does not divide over the data-parallel ranks.
    """
    batch = run.training.global_batch_size
    if batch % data_size:
        raise ConfigError(
            f"global_batch_size {batch} is not divisible by data-parallel size {data_size}"
        )
    share = batch // data_size
    sizes = {size for size in _doubling(share) if share % size == 0}
    if share % run.training.micro_batch_size == 0:
        sizes.add(run.training.micro_batch_size)
    return sorted(sizes)


@dataclass(frozen=True, kw_only=True)
class Kind:
    """What a layout may have besides its split and its microbatch.

    Attributes:
        recompute: activations that are computed again.
        precision: bf16, or FP8 over it.
        sharded: whether the optimizer is distributed.
    """

    recompute: RecomputeConfig
    precision: PrecisionConfig
    sharded: bool

    def saves_nothing(self, run: RunConfig) -> bool:
        """Whether it recomputes an attention that keeps no scores anyway."""
        selective = self.recompute.recompute_granularity is RecomputeGranularity.SELECTIVE
        return selective and not has_unfused_attention(run)


def kinds(run: RunConfig, data_size: int) -> list[Kind]:
    """Every combination of recomputation, FP8 and distributed optimizer.

    Args:
        run: the run's configuration, whose own FP8 and full recomputation options are kept.
        data_size: data-parallel ranks; the optimizer of one is not distributed.
    """
    full = RecomputeConfig(
        recompute_granularity=RecomputeGranularity.FULL,
        recompute_method=RecomputeMethod.UNIFORM,
        recompute_num_layers=1,
    )
    if run.recompute.recompute_granularity is RecomputeGranularity.FULL:
        full = run.recompute
    selective = RecomputeConfig(recompute_granularity=RecomputeGranularity.SELECTIVE)
    copies = data_size * run.parallel.context_parallel_size
    return [
        Kind(recompute=recompute, precision=precision, sharded=sharded)
        for precision in _precisions(run.precision)
        for sharded in ([False, True] if copies > 1 else [False])
        for recompute in (RecomputeConfig(), selective, full)
    ]


def _precisions(precision: PrecisionConfig) -> tuple[PrecisionConfig, PrecisionConfig]:
    """Bf16, and FP8 as configured or, if it is not, hybrid."""
    without = dataclasses.replace(
        precision, fp8_format=None, fp8_param_gather=False, first_last_layers_bf16=False
    )
    with_fp8 = precision
    if precision.fp8_format is None:
        with_fp8 = dataclasses.replace(precision, fp8_format=Fp8Format.HYBRID)
    return without, with_fp8


def candidate(
    run: RunConfig, split: Split, kind: Kind, *, micro_batch_size: int, gpus: int
) -> RunConfig:
    """The run in one layout, checked as training checks it.

    Raises:
        MupError: training would refuse it.
    """
    # Muon's layer-wise optimizer cannot overlap the gathering.
    gathers_early = kind.sharded and run.optimizer.optimizer is not OptimizerName.MUON
    copies = gpus // (split.tensor * split.stages)
    parallel: ParallelConfig = dataclasses.replace(
        run.parallel,
        tensor_model_parallel_size=split.tensor,
        sequence_parallel=split.tensor > 1,
        pipeline_model_parallel_size=split.stages,
        virtual_pipeline_model_parallel_size=split.chunks if split.chunks > 1 else None,
        use_distributed_optimizer=kind.sharded,
        overlap_grad_reduce=copies > 1,
        overlap_param_gather=gathers_early,
    )
    result = dataclasses.replace(
        run,
        parallel=parallel,
        precision=kind.precision,
        recompute=kind.recompute,
        training=dataclasses.replace(run.training, micro_batch_size=micro_batch_size),
    )
    check_layout(result, gpus)
    return result


def overrides(run: RunConfig) -> dict[str, dict[str, str | int | bool | None]]:
    """Options of a layout by section: those that a plan chooses, whether they changed or not."""
    parallel, precision, recompute = run.parallel, run.precision, run.recompute
    granularity, method = recompute.recompute_granularity, recompute.recompute_method
    chosen: dict[str, dict[str, str | int | bool | None]] = {
        "parallel": {
            "tensor_model_parallel_size": parallel.tensor_model_parallel_size,
            "sequence_parallel": parallel.sequence_parallel,
            "pipeline_model_parallel_size": parallel.pipeline_model_parallel_size,
            "virtual_pipeline_model_parallel_size": parallel.virtual_pipeline_model_parallel_size,
            "use_distributed_optimizer": parallel.use_distributed_optimizer,
            "overlap_grad_reduce": parallel.overlap_grad_reduce,
            "overlap_param_gather": parallel.overlap_param_gather,
        },
        "precision": {
            "fp8_format": None if precision.fp8_format is None else precision.fp8_format.value,
            "fp8_param_gather": precision.fp8_param_gather,
            "first_last_layers_bf16": precision.first_last_layers_bf16,
        },
        "recompute": {
            "recompute_granularity": None if granularity is None else granularity.value,
            "recompute_method": None if method is None else method.value,
            "recompute_num_layers": recompute.recompute_num_layers,
        },
        "training": {"micro_batch_size": run.training.micro_batch_size},
    }
    return chosen
