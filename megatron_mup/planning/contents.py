"""What each pipeline stage would hold, counted from the parameter table; nothing is built.

The dry run builds the same chunks and counts what it finds. Must not import torch or megatron.
"""

from __future__ import annotations

import math

from megatron_mup.config import RunConfig
from megatron_mup.memory import NOT_IN_LAYERS, ChunkContents
from megatron_mup.parameterization.roles import Role


def chunk_contents(run: RunConfig, stage: int) -> tuple[ChunkContents, ...]:
    """What each model chunk of a pipeline stage holds, counted from the parameter table.

    Args:
        run: the run's configuration.
        stage: pipeline rank, from 0.

    Returns:
        Its chunks in order, for any tensor-parallel rank.
    """
    stages, count = run.parallel.pipeline_model_parallel_size, run.parallel.model_chunks
    depth = run.model.num_layers // (stages * count)
    sizes = _elements_by_place(run)
    chunks = []
    for number in range(count):
        # Consecutive groups of layers go round the stages.
        first = (number * stages + stage) * depth
        places: list[int | str] = list(range(first, first + depth))
        readout = stage == stages - 1 and number == count - 1
        if stage == 0 and number == 0:
            places.append("embedding")
        if readout:
            places += _end_places(run)
        held = [sizes.get(place, (0, 0)) for place in places]
        chunks.append(
            ChunkContents(
                layers=tuple(range(first, first + depth)),
                matrix_elements=sum(matrices for matrices, _ in held),
                other_elements=sum(others for _, others in held),
                readout=readout,
            )
        )
    return tuple(chunks)


def _end_places(run: RunConfig) -> list[int | str]:
    """What the last chunk holds beside layers; a tied readout on its own stage is a copy."""
    tied = not run.model.untie_embeddings_and_output_weights
    if tied and run.parallel.pipeline_model_parallel_size > 1:
        return ["end", "copy"]
    return ["end"]


def _elements_by_place(run: RunConfig) -> dict[int | str, tuple[int, int]]:
    """Layer number, "embedding", "end" or "copy" -> (matrix, other) elements of one rank."""
    sizes: dict[int | str, tuple[int, int]] = {}
    for row in run.table.rows:
        tensor = row.tensor
        split = 1 if tensor.partition_axis is None else run.parallel.tensor_model_parallel_size
        elements = math.prod(tensor.shape) // split
        place = _place(tensor.parameter)
        matrices, others = sizes.get(place, (0, 0))
        if tensor.role in NOT_IN_LAYERS:
            others += elements
        else:
            matrices += elements
        sizes[place] = (matrices, others)
        if tensor.role is Role.EMBEDDING:
            sizes["copy"] = (0, elements)
    return sizes


def _place(parameter: str) -> int | str:
    parts = parameter.split(".")
    if parts[:2] == ["decoder", "layers"]:
        return int(parts[2])
    return "embedding" if parts[0] == "embedding" else "end"
