"""Rewrite a checkpoint for another layout: weights, optimizer state and counters, bit for bit.

A checkpoint of this package loads under any layout as it is: every tensor is stored by its place in
the whole model, and plain and distributed optimizer are stored alike. Resharding is therefore never
needed to resume; it cuts the tensors as the ranks of the new layout hold them, into files of their
own, so that each rank reads only what it needs, and it changes the layout that the record names.
The distributed optimizer's shares depend on the number of data-parallel ranks, which no record
fixes, so only the option changes with it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_mup.checkpoint.integrity import file_order
from megatron_mup.checkpoint.record import make_record
from megatron_mup.checkpoint.upstream_args import upstream_args
from megatron_mup.config import ParallelConfig, RunConfig
from megatron_mup.config_io import config_from_dict, config_to_dict, qualified
from megatron_mup.convert.megatron_source import MegatronSource
from megatron_mup.convert.megatron_target import RESHARDED_FROM, name_newest, prepare_root
from megatron_mup.convert.output_places import check_checkpoint
from megatron_mup.convert.published_folder import Output, check_room, published_folder
from megatron_mup.convert.reshard_comparison import ReshardComparison
from megatron_mup.convert.stored_blocks import Sizes
from megatron_mup.convert.stored_places import COMMON_STATE, OPTIMIZER_PREFIX, place_of
from megatron_mup.convert.stored_tensors import StoredTensor
from megatron_mup.convert.tensor_files import TensorFiles
from megatron_mup.errors import ConfigError
from megatron_mup.parameterization.roles import (
    LogicalTensor,
    ModelShape,
    Part,
    by_parameter,
    logical_tensors,
)

_SECTIONS = ("parallel.", "recompute.")
_FIRST_STAGE = "embedding."


def reshard(
    path: Path,
    root: Path,
    *,
    layout: Sequence[str],
    iteration: int | None = None,
    check: bool = True,
    verify: bool = True,
    overwrite: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Path:
    """Write a checkpoint again for another layout.

    Args:
        path: a run's folder, or one ``iter_*`` folder.
        root: the new run's folder; made if missing.
        layout: ``key=value`` of ``parallel`` and ``recompute``; the rest stays as recorded.
        iteration: which checkpoint of a run's folder; unset means the newest.
        check: see ``MegatronSource``.
        verify: read both back and compare them bit for bit (``ReshardComparison``).
        overwrite: replace a checkpoint of this iteration.
        progress: called with the bytes of tensors written so far and in all.

    Returns:
        The finished ``iter_*`` folder.

    Raises:
        CheckpointError: the source is damaged, the target cannot be written, or the copy differs.
        ConfigError: the model does not fit the layout, or another option is named.
    """
    _check_options(layout)
    source = MegatronSource(path, iteration, check=False)
    run = config_from_dict(config_to_dict(source.run), layout, origin="the layout")
    check_checkpoint(source.folder, root, iteration=source.iteration, overwrite=overwrite)
    target = prepare_root(root, source.iteration, overwrite=overwrite, source=source.folder)
    with source.checked_meanwhile(wanted=check) as checked, published_folder(target) as output:
        _write(source, run, output, verify=verify, progress=progress)
        checked()
    name_newest(output, source.iteration)
    return output.folder


def _check_options(layout: Sequence[str]) -> None:
    others = [option for option in layout if not qualified(option).startswith(_SECTIONS)]
    if others:
        raise ConfigError(
            f"'{others[0]}' is no option of the layout; resharding changes the sections parallel "
            "and recompute, and nothing of what is trained"
        )


def _write(
    source: MegatronSource,
    run: RunConfig,
    output: Output,
    *,
    verify: bool,
    progress: Callable[[int, int], None] | None,
) -> None:
    room = sum(stored.nbytes for stored in source.stored.tensors.values())
    advice = "make room or choose another disk"
    check_room(output.hidden, room, folder=output.folder, advice=advice)
    comparison = ReshardComparison(source.stored, output.hidden)
    compare = comparison.compare_file if verify else None
    with TensorFiles(output.hidden, inspect=compare) as files:
        _copy_objects(source, run, files)
        _copy(source, run, files, progress)
        files.finish(_record(source, run))
    if verify:
        comparison.finish()


def _copy_objects(source: MegatronSource, run: RunConfig, files: TensorFiles) -> None:
    for key in source.stored.objects:
        if key == COMMON_STATE:
            files.add_object(key, _common_state(source, run))
        else:
            files.add_bytes(key, source.stored.read_bytes(key))


def _common_state(source: MegatronSource, run: RunConfig) -> dict[str, Any]:
    """Counters as they are; upstream's arguments, if they were saved, with the new layout."""
    common = dict(source.common)
    if "args" in common:
        samples = int(common["consumed_train_samples"])
        common["args"] = upstream_args(run, consumed_train_samples=samples)
    return common


def _record(source: MegatronSource, run: RunConfig) -> dict[str, object]:
    provenance = {**source.record.get("provenance", {}), RESHARDED_FROM: source.where}
    record = make_record(run, provenance=provenance, history=source.record.get("history", []))
    # Whether there is an optimizer state.
    kept = {key: source.record[key] for key in ("contents",) if key in source.record}
    return {**record, **kept}


def _copy(
    source: MegatronSource,
    run: RunConfig,
    files: TensorFiles,
    progress: Callable[[int, int], None] | None,
) -> None:
    """Copy every tensor, one layer of one kind at a time."""
    cuts = _cuts(run.model.shape)
    tensors = source.stored.tensors.values()
    total = sum(stored.nbytes for stored in tensors)
    done = 0
    work = [
        (stored, block)
        for stored in tensors
        for block in _blocks(stored, cuts, run.parallel, run.model.num_layers)
    ]
    # File after file, as the checksums are compared: what one of the two has read, the other finds
    # in the page cache.
    places = {stored.key: _places(stored) for stored in tensors}
    # Blocks that begin inside a stored part come first; where they lie is a matter of speed alone.
    work.sort(key=lambda one: places[one[0].key].get(one[1].offset[:1], ([], 0)))
    for stored, block in work:
        _copy_block(source, stored, block, files)
        done += math.prod(block.size) * stored.dtype.itemsize
        if progress is not None:
            progress(done, total)


def _places(stored: StoredTensor) -> dict[Sizes, tuple[list[int], int]]:
    """Where the parts of each index of the first axis begin: file and position."""
    places: dict[Sizes, tuple[list[int], int]] = {}
    for part in stored.parts:
        place = (file_order(part.file), part.position)
        places[part.offset[:1]] = min(place, places.get(part.offset[:1], place))
    return places


def _copy_block(
    source: MegatronSource, stored: StoredTensor, block: _Block, files: TensorFiles
) -> None:
    width = block.size[block.axis] // block.parts
    # Columns are read with all of their rows, so at once; rows lie apart from each other.
    rows = all(size == 1 for size in block.size[: block.axis])
    whole = None if rows else source.read_stored(stored.key, block.offset, block.size)
    for part in range(block.parts):
        offset, size = list(block.offset), list(block.size)
        offset[block.axis] += part * width
        size[block.axis] = width
        if whole is None:
            piece = source.read_stored(stored.key, tuple(offset), tuple(size))
        else:
            piece = whole.narrow(block.axis, part * width, width)
        files.add(stored.key, stored.shape, tuple(offset), piece, rank=block.rank + part)
        del piece


@dataclass(frozen=True)
class _Cut:
    """How tensor parallelism cuts a stored tensor.

    Attributes:
        shape: of the stored tensor.
        axis: the axis that is cut, the axis of the layers counted; None for replicated tensors.
        regions: first index and length of the stretches of that axis, each cut by itself.
    """

    shape: Sizes
    axis: int | None
    regions: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class _Block:
    """What is read at once, and how it is cut.

    Attributes:
        offset: of the block in the stored tensor.
        size: of the block.
        axis: cut along this axis.
        parts: into so many parts.
        rank: whose file the first part goes to; the others follow.
    """

    offset: Sizes
    size: Sizes
    axis: int
    parts: int
    rank: int


def _cuts(shape: ModelShape) -> dict[str, _Cut]:
    """How the stored tensors of a model are cut, by key."""
    cuts = {}
    for tensors in by_parameter(logical_tensors(shape)).values():
        place = place_of(tensors[0], shape)
        stacked = 0 if place.layer is None else 1
        axis = tensors[0].partition_axis
        cut = None if axis is None else axis + stacked
        length = 1 if cut is None else place.shape[cut]
        cuts[place.key] = _Cut(place.shape, cut, _regions(tensors, length))
    return cuts


def _regions(tensors: tuple[LogicalTensor, ...], length: int) -> tuple[tuple[int, int], ...]:
    """Gate and up are each cut; query groups lie one after the other and are cut as one."""
    if tensors[0].part is Part.GATE:
        half = length // 2
        return ((0, half), (half, half))
    return ((0, length),)


def _blocks(
    stored: StoredTensor, cuts: Mapping[str, _Cut], parallel: ParallelConfig, layers: int
) -> Iterator[_Block]:
    """A stored tensor in blocks of at most one layer, with the ranks that hold them."""
    key = stored.key
    if key.startswith(OPTIMIZER_PREFIX):
        # optimizer.state.KIND.KEY
        key = key.removeprefix(OPTIMIZER_PREFIX).partition(".")[2]
    cut = cuts.get(key)
    if cut is None or cut.shape != stored.shape:
        cut = _Cut(stored.shape, None, ())
    stacked = key.startswith("decoder.layers.")
    for layer in range(stored.shape[0]) if stacked else (None,):
        offset = [0] * len(stored.shape)
        size = list(stored.shape)
        if layer is not None:
            offset[0], size[0] = layer, 1
        rank = parallel.tensor_model_parallel_size * _stage(key, layer, parallel, layers)
        if cut.axis is None:
            yield _Block(tuple(offset), tuple(size), 0, 1, rank)
            continue
        for first, length in cut.regions:
            offset[cut.axis], size[cut.axis] = first, length
            parts = parallel.tensor_model_parallel_size
            yield _Block(tuple(offset), tuple(size), cut.axis, parts, rank)


def _stage(key: str, layer: int | None, parallel: ParallelConfig, layers: int) -> int:
    """The pipeline stage that holds a tensor; virtual stages take turns over the ranks."""
    stages = parallel.pipeline_model_parallel_size
    if layer is None:
        return 0 if key.startswith(_FIRST_STAGE) else stages - 1
    return layer // (layers // (stages * parallel.model_chunks)) % stages
