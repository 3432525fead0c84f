"""What a run would be, found out without starting it: ``megatron-mup train --dry-run``.

Each pipeline stage, and each virtual chunk of it, is built for real by Megatron on torch's meta
device, which allocates nothing, over torch's fake process group, which communicates nothing: so a
layout for hundreds of GPUs is checked on a laptop in seconds. TransformerEngine's modules need a
GPU to be built; the local ones, of the same matrices, take their place. Writes no file, makes no
folder, takes no lease.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_mup.config import (
    AttentionBackend,
    PrecisionConfig,
    RecomputeConfig,
    RunConfig,
    TransformerImpl,
)
from megatron_mup.data.blend import parse_blend, train_paths, valid_paths
from megatron_mup.data.checks import check_epochs, check_training_data, repetition_warning
from megatron_mup.data.shard_sets import expand
from megatron_mup.errors import ConfigError, ParameterizationError
from megatron_mup.memory import NOT_IN_LAYERS, ChunkContents, Memory, rank_memory
from megatron_mup.model.gpt import construct, transformer_config
from megatron_mup.model.naming import canonical_names, rows_of_parameters
from megatron_mup.parameterization.table import ParameterTable
from megatron_mup.training.batches import samples_after
from megatron_mup.training.processes import check_layout


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One pipeline stage, as its tensor-parallel rank 0 holds it.

    Attributes:
        chunks: its model chunks; one unless the pipeline is virtual.
        memory: estimated bytes of one rank.
    """

    chunks: tuple[ChunkContents, ...]
    memory: Memory


@dataclass(frozen=True, kw_only=True)
class DryRun:
    """A run that was checked and built, but not started.

    Attributes:
        run: its configuration.
        world_size: ranks.
        data_parallel_size: ranks with the same parameters and other sequences.
        stages: pipeline stages in order.
        matrix_elements: elements of the layers' weight matrices, all ranks together.
        other_elements: elements of embedding, readout, gains and biases.
        data: a line for each token shard.
    """

    run: RunConfig
    world_size: int
    data_parallel_size: int
    stages: tuple[Stage, ...]
    matrix_elements: int
    other_elements: int
    data: tuple[str, ...]

    @property
    def microbatches(self) -> int:
        """Microbatches of a full step on one rank."""
        training = self.run.training
        return training.global_batch_size // (training.micro_batch_size * self.data_parallel_size)


def dry_run(run: RunConfig, *, world_size: int | None = None) -> DryRun:
    """Check a run for a number of ranks, and build each of its pipeline stages without memory.

    Args:
        run: the configuration.
        world_size: ranks; unset means the fewest that hold the model.

    Returns:
        What there would be.

    Raises:
        MupError: what training would refuse: layout, batch, data of this machine; or a parameter
            that is missing from the table, or the other way round.
    """
    world_size = run.parallel.model_parallel_size if world_size is None else world_size
    if world_size < 1:
        raise ConfigError(f"--world-size is {world_size}; give the number of ranks, at least 1")
    data_parallel_size = check_layout(run, world_size)
    data = _check_data(run)
    table = run.table
    built = _build_stages(run, table)
    _check_against_table([count for _, counts in built for count in counts], table)
    stages = tuple(
        Stage(
            chunks=chunks,
            memory=rank_memory(run, chunks, stage=stage, data_parallel_size=data_parallel_size),
        )
        for stage, (chunks, _) in enumerate(built)
    )
    sizes = [(row.tensor.role in NOT_IN_LAYERS, math.prod(row.tensor.shape)) for row in table.rows]
    return DryRun(
        run=run,
        world_size=world_size,
        data_parallel_size=data_parallel_size,
        stages=stages,
        matrix_elements=sum(size for other, size in sizes if not other),
        other_elements=sum(size for other, size in sizes if other),
        data=data,
    )


_Counts = dict[str, int]
"""Table name of a parameter -> its elements over all tensor-parallel ranks."""


def _build_stages(
    run: RunConfig, table: ParameterTable
) -> list[tuple[tuple[ChunkContents, ...], list[_Counts]]]:
    """Contents of each stage's chunks, and their parameters by name."""
    local = _buildable(run)
    stages = []
    for stage in range(run.parallel.pipeline_model_parallel_size):
        with pretended_rank(local, stage), torch.device("meta"):
            config = transformer_config(local, table.multipliers)
            # On a machine with a GPU upstream would otherwise allocate there, by name.
            config.use_cpu_initialization = True
            models: list[Any] = [
                construct(local.model, config, table.multipliers, chunk=chunk)
                for chunk in range(run.parallel.model_chunks)
            ]
            contents = tuple(_contents(model, table) for model in models)
            stages.append((contents, [_global_sizes(model, local) for model in models]))
    return stages


def _buildable(run: RunConfig) -> RunConfig:
    """The same parameters without anything that only a GPU can build."""
    return dataclasses.replace(
        run,
        model=dataclasses.replace(
            run.model,
            transformer_impl=TransformerImpl.LOCAL,
            attention_backend=AttentionBackend.SDPA,
        ),
        # Every context-parallel rank holds the same parameters.
        parallel=dataclasses.replace(run.parallel, context_parallel_size=1),
        precision=PrecisionConfig(bf16=run.precision.bf16),
        recompute=RecomputeConfig(),
    )


@contextmanager
def pretended_rank(run: RunConfig, stage: int) -> Iterator[None]:
    """Megatron's groups as the first rank of a pipeline stage sees them, without other ranks.

    Communication returns at once and moves nothing.

    Args:
        run: the configuration; tensor, pipeline and virtual pipeline sizes count.
        stage: pipeline rank to be.
    """
    # Not at the top: the platform must be prepared before megatron is imported, and torch's test
    # support, whose group is the only one that needs no peers (torch 2.11), registers a backend.
    from megatron.core import parallel_state
    from torch.testing._internal.distributed.fake_pg import FakeStore

    tensor = run.parallel.tensor_model_parallel_size
    stages = run.parallel.pipeline_model_parallel_size
    # Data-parallel ranks lie between tensor and pipeline ranks; here there is one.
    dist.init_process_group(
        "fake", store=FakeStore(), rank=stage * tensor, world_size=stages * tensor
    )
    try:
        parallel_state.initialize_model_parallel(
            tensor, stages, run.parallel.virtual_stages, create_gloo_process_groups=False
        )
        yield
    finally:
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()


def _contents(model: Any, table: ParameterTable) -> ChunkContents:
    """What a built chunk holds on this rank.

    Raises:
        ParameterizationError: a parameter has no role in the table.
    """
    rows = rows_of_parameters(model, table)
    matrices = others = 0
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if rows[name][0].tensor.role in NOT_IN_LAYERS:
            others += parameter.numel()
        else:
            matrices += parameter.numel()
    return ChunkContents(
        layers=tuple(layer.layer_number - 1 for layer in model.decoder.layers),
        matrix_elements=matrices,
        other_elements=others,
        readout=bool(model.post_process),
    )


def _global_sizes(model: Any, run: RunConfig) -> _Counts:
    """Elements of each parameter over all tensor-parallel ranks, as Megatron marks its shards."""
    parameters = dict(model.named_parameters())
    return {
        name: parameters[local].numel()
        * (run.parallel.tensor_model_parallel_size if _is_split(parameters[local]) else 1)
        for local, name in canonical_names(model).items()
    }


def _is_split(parameter: torch.nn.Parameter) -> bool:
    return bool(getattr(parameter, "tensor_model_parallel", False))


def _check_against_table(built: Sequence[_Counts], table: ParameterTable) -> None:
    """Check that all stages together hold exactly the table's parameters.

    Raises:
        ParameterizationError: one is missing, or of another size.
    """
    # The readout's copy of a tied embedding has the embedding's name and counts once.
    found = {name: size for counts in built for name, size in counts.items()}
    expected = {
        name: sum(math.prod(row.tensor.shape) for row in rows)
        for name, rows in table.by_parameter().items()
    }
    wrong = sorted(
        name for name in found.keys() | expected.keys() if found.get(name) != expected.get(name)
    )
    if wrong:
        name = wrong[0]
        raise ParameterizationError(
            f"{len(wrong)} parameters differ between the pipeline's stages and the table, first "
            f"'{name}': {found.get(name)} elements built, {expected.get(name)} in the table; "
            "megatron_mup/parameterization/roles.py does not describe this model"
        )


def _check_data(run: RunConfig) -> tuple[str, ...]:
    """Check the shards that are on this machine; a line for each shard or set of all.

    Raises:
        DataError: no shard is configured, or one that is here does not fit.
    """
    train, _ = parse_blend(train_paths(run))
    valid, _ = parse_blend(valid_paths(run)) if run.training.eval_iters else ([], None)
    here = {prefix for prefix in [*train, *valid] if _is_here(prefix)}
    missing = not train or (run.training.eval_iters > 0 and not valid)
    present_train = [prefix for prefix in train if prefix in here]
    present_valid = [prefix for prefix in valid if prefix in here]
    if missing or present_train or present_valid:
        # Shards of another machine are left out; held-out ones take the same checks.
        shards = present_train + present_valid
        checked = run.data
        if not missing:
            checked = dataclasses.replace(
                run.data, train_data_path=shards, per_split_data_args_path=None
            )
        training = run.training if missing else dataclasses.replace(run.training, eval_iters=0)
        check_training_data(dataclasses.replace(run, data=checked, training=training))
    epochs = {}
    if len(present_train) == len(train):
        epochs = check_epochs(run, samples_after(run.training, run.planned_iters))
    lines = []
    for prefix in [*train, *valid]:
        state = "whole, fits the model" if prefix in here else "not on this machine, not checked"
        read = f", read {epochs[prefix]:.2f} times" if prefix in epochs else ""
        lines.append(f"{prefix}: {state}{read}")
    warning = repetition_warning(epochs)
    return tuple(lines) if warning is None else (*lines, warning)


def _is_here(prefix: str) -> bool:
    return any(
        Path(f"{shard}{suffix}").exists()
        for shard in expand(Path(prefix))
        for suffix in (".idx", ".bin")
    )
