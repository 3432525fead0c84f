"""All layouts of a run on so many GPUs: checked, sized, timed, ranked.

Nothing is built: memory and FLOPs are counted from the configuration by the dry run's functions.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from megatron_mup.config import RunConfig
from megatron_mup.errors import ConfigError, MupError
from megatron_mup.flops import model_flops_per_sequence
from megatron_mup.memory import GIB
from megatron_mup.planning.assumptions import Assumption, Rates, ends
from megatron_mup.planning.gpus import Gpu
from megatron_mup.planning.layouts import (
    Kind,
    Refusals,
    Split,
    candidate,
    data_parallel_size,
    kinds,
    micro_batch_sizes,
    splits,
)
from megatron_mup.planning.prediction import (
    Contents,
    Prediction,
    StageMemory,
    contents,
    stage_memory,
    step_time,
)
from megatron_mup.training.sample_counts import samples_after

_NOTHING_SAVED = (
    "recompute_granularity=selective saves nothing: this run's attention is fused and keeps no "
    "scores"
)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a run would cost in every layout that fits.

    Attributes:
        run: the configuration as given.
        gpu: of every rank.
        gpus: ranks.
        parameters: trainable elements of the model.
        flops: model FLOPs of the run.
        samples: sequences of the run.
        layouts: those that fit, best first.
        refusals: the others.
        assumptions: what the times rest on.
    """

    run: RunConfig
    gpu: Gpu
    gpus: int
    parameters: int
    flops: float
    samples: int
    layouts: tuple[Prediction, ...]
    refusals: Refusals
    assumptions: Mapping[str, Assumption]

    @property
    def best(self) -> Prediction:
        """The layout whose step is shortest."""
        return self.layouts[0]


def make_plan(
    run: RunConfig, *, gpu: Gpu, gpus: int, assumptions: Mapping[str, Assumption]
) -> Plan:
    """Try every layout of a run.

    Args:
        run: the configuration; its own layout is one of those that are tried.
        gpu: of every rank.
        gpus: ranks.
        assumptions: from ``assumptions_for``.

    Returns:
        At least one layout that fits.

    Raises:
        ConfigError: an impossible number of GPUs, an fp32 run, or no layout fits.
    """
    if gpus < 1:
        raise ConfigError(f"--gpus is {gpus}; give the number of GPUs, at least 1")
    if not run.precision.bf16:
        raise ConfigError(
            "a plan knows the speed of bf16 and FP8 only, and this run computes in fp32; set "
            "precision.bf16=true"
        )
    search = _Search(run=run, gpu=gpu, gpus=gpus, rates=ends(assumptions))
    layouts = search.layouts()
    if not layouts:
        raise ConfigError(_nothing_fits(search.refusals, gpus, gpu))
    samples = samples_after(run.training, run.training.train_iters)
    return Plan(
        run=run,
        gpu=gpu,
        gpus=gpus,
        parameters=sum(math.prod(row.tensor.shape) for row in run.table.rows),
        flops=float(model_flops_per_sequence(run.model).total) * samples,
        samples=samples,
        layouts=tuple(sorted(layouts, key=lambda one: (one.middle_seconds, one.peak_memory))),
        refusals=search.refusals,
        assumptions=assumptions,
    )


class _Search:
    """The candidates of one plan; what is refused is counted on the way."""

    def __init__(self, *, run: RunConfig, gpu: Gpu, gpus: int, rates: tuple[Rates, Rates]) -> None:
        self._run, self._gpu, self._gpus = run, gpu, gpus
        self._slow, self._fast = rates
        self.refusals = Refusals()

    def layouts(self) -> list[Prediction]:
        """Those that fit, in no order."""
        found = []
        for split in splits(self._run, self._gpus):
            try:
                data_size = data_parallel_size(
                    self._run, split, self._gpus, node_size=self._slow.node_size
                )
                sizes = micro_batch_sizes(self._run, data_size)
            except ConfigError as error:
                self.refusals.add(str(error))
                continue
            for kind in kinds(self._run, data_size):
                if kind.saves_nothing(self._run):
                    self.refusals.add(_NOTHING_SAVED, len(sizes))
                else:
                    found += self._with_microbatches(split, kind, sizes, data_size)
        return found

    def _with_microbatches(
        self, split: Split, kind: Kind, sizes: list[int], data_size: int
    ) -> list[Prediction]:
        found = []
        for number, size in enumerate(sizes):
            try:
                run = candidate(self._run, split, kind, micro_batch_size=size, gpus=self._gpus)
            except MupError as error:
                self.refusals.add(str(error))
                continue
            held = contents(run)
            memory = stage_memory(run, held, data_parallel_size=data_size, rates=self._slow)
            refusal = self._too_large(memory)
            if refusal is not None:
                # Larger microbatches need more.
                self.refusals.add(refusal, len(sizes) - number)
                break
            found.append(self._predicted(run, held, memory))
        return found

    def _too_large(self, memory: tuple[StageMemory, ...]) -> str | None:
        fullest = max(memory, key=lambda stage: stage.total)
        usable = self._gpu.memory_bytes * (1 - self._slow.reserve)
        if fullest.total <= usable:
            return None
        counted = fullest.counted
        kept = counted.weights + counted.gradients + counted.optimizer
        state_alone = kept + fullest.context > usable
        what = "weights, gradients and optimizer alone" if state_alone else "with activations"
        return (
            f"out of memory ({what}): {fullest.total / GIB:.1f} GiB needed, {usable / GIB:.1f} of "
            f"{self._gpu.memory_bytes / GIB:.1f} GiB usable"
        )

    def _predicted(
        self, run: RunConfig, held: Contents, memory: tuple[StageMemory, ...]
    ) -> Prediction:
        slow, fast = (
            step_time(run, held, gpu=self._gpu, gpus=self._gpus, rates=rates)
            for rates in (self._slow, self._fast)
        )
        fp8 = run.precision.fp8_format is not None
        return Prediction(
            run=run,
            gpus=self._gpus,
            memory=memory,
            slow=slow,
            fast=fast,
            peak=self._gpu.peak_flops(fp8=fp8),
        )


def _nothing_fits(refusals: Refusals, gpus: int, gpu: Gpu) -> str:
    reasons = "; ".join(f"{count} x {message}" for count, message in refusals.lines())
    return (
        f"no layout of this run fits {gpus} x {gpu.name}: {reasons}. Raise --gpus, take a GPU with "
        "more memory, or change the sizes that do not divide"
    )
