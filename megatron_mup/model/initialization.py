"""Initial weights: one pass over the logical tensors, the same values for any layout.

Each logical tensor is cut into blocks of ``BLOCK`` rows along the axis that tensor parallelism
splits, and each block has its own random stream, keyed by (seed, tensor name, block number). A rank
draws the blocks that overlap its shard and nothing else, so the values depend neither on TP, PP and
DP nor on the order of drawing, and a 10B model costs a rank only its own share. Values are
drawn on the CPU in fp32 and then cast, so a GPU starts from the same weights; as many threads draw
as torch may use.
"""

from __future__ import annotations

import hashlib
import itertools
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from megatron_mup.model.naming import rows_of_parameters
from megatron_mup.parameterization.roles import LogicalTensor, ModelShape, Part, Role
from megatron_mup.parameterization.table import ParameterTable, TableRow

BLOCK = 128
"""Rows (or columns, for row-parallel matrices) of one random stream. Ours; part of the format:
changing it changes every initial weight."""


Span = tuple[int, int]
"""Half-open range of rows."""

Rows = NDArray[np.float32]


@dataclass(frozen=True)
class Shard:
    """Which part of the tensor-parallel dimension this process holds."""

    rank: int = 0
    size: int = 1

    def span(self, length: int) -> tuple[int, int]:
        """Half-open range of a dimension of ``length`` that this shard holds."""
        per_rank = length // self.size
        return self.rank * per_rank, (self.rank + 1) * per_rank


def block_generator(seed: int, name: str, block: int) -> np.random.Generator:
    """Random stream of one block; Philox, so that nearby keys are independent."""
    digest = hashlib.sha256(f"{seed}/{name}/{block}".encode()).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest[:16], "little")))


def draw_rows(*, seed: int, name: str, length: int, width: int, span: Span) -> Rows:
    """Standard normal rows ``span`` of a [length, width] tensor, whoever asks for them.

    Args:
        seed: the run's seed.
        name: logical tensor name.
        length: global number of rows along the split axis.
        width: elements of a row.
        span: half-open global row range.

    Returns:
        float32 array [span, width].
    """
    start, stop = span
    rows = np.empty((stop - start, width), dtype=np.float32)
    for block in range(start // BLOCK, -(-stop // BLOCK)):
        first, last = block * BLOCK, min((block + 1) * BLOCK, length)
        values = block_generator(seed, name, block).standard_normal(
            (last - first, width), dtype=np.float32
        )
        low, high = max(first, start), min(last, stop)
        rows[low - start : high - start] = values[low - first : high - first]
    return rows


def _in_order(draw: Callable[[Span], Rows], spans: Iterable[Span]) -> Iterator[tuple[Span, Rows]]:
    """Draw spans on several threads and hand them over in their order.

    numpy draws without holding the interpreter. No more than a block per thread waits.
    """
    threads = torch.get_num_threads()
    drawn: deque[tuple[Span, Future[Rows]]] = deque()
    with ThreadPoolExecutor(threads, thread_name_prefix="draw") as pool:
        for span in spans:
            drawn.append((span, pool.submit(draw, span)))
            if len(drawn) > threads:
                first, rows = drawn.popleft()
                yield first, rows.result()
        for span, rows in drawn:
            yield span, rows.result()


def _group_rows(part: Part, shape: ModelShape) -> tuple[int, int, int]:
    """First and last row of a part inside one query group of fused QKV, and the group's rows."""
    head_dim = shape.kv_channels
    query_rows = shape.num_attention_heads // shape.num_query_groups * head_dim
    start, stop = {
        Part.QUERY: (0, query_rows),
        Part.KEY: (query_rows, query_rows + head_dim),
        Part.VALUE: (query_rows + head_dim, query_rows + 2 * head_dim),
    }[part]
    return start, stop, query_rows + 2 * head_dim


def part_span(tensor: LogicalTensor, shape: ModelShape, shard: Shard) -> tuple[int, int]:
    """Half-open range of a split logical tensor along its split axis that a shard holds.

    With fewer query groups than ranks, Megatron cuts a group's rows evenly, whatever they are: a
    rank may hold some queries and no key.
    """
    qkv = tensor.part in (Part.QUERY, Part.KEY, Part.VALUE)
    if not qkv or shape.num_query_groups >= shard.size:
        return shard.span(tensor.shape[tensor.partition_axis or 0])
    start, stop, rows = _group_rows(tensor.part, shape)
    first, last = shard.span(rows * shape.num_query_groups)
    group, offset = divmod(first, rows)
    low, high = (min(max(edge, start), stop) - start for edge in (offset, offset + last - first))
    return group * (stop - start) + low, group * (stop - start) + high


def part_view(
    parameter: Tensor, part: Part, shape: ModelShape, shard: Shard | None = None
) -> Tensor:
    """The rows of one logical tensor inside a (fused) parameter shard, as a writable view.

    Megatron interleaves QKV by query group ([G, (H/G + 2) * D, M]) and stacks gate over up.

    Args:
        parameter: local shard of a weight [rows, M] or bias [rows].
        part: which logical tensor.
        shape: global model shape.
        shard: this process's place in tensor parallelism; needed with fewer query groups than
            ranks, where the view is [rows, ...] and may be empty.

    Returns:
        View whose elements are the part's rows in logical order (QKV: [G, rows, ...]).
    """
    if part is Part.WHOLE:
        return parameter
    if part in (Part.GATE, Part.UP):
        return parameter.chunk(2, dim=0)[0 if part is Part.GATE else 1]
    start, stop, rows = _group_rows(part, shape)
    if shard is not None and shape.num_query_groups < shard.size:
        held = parameter.shape[0]
        offset = shard.rank * held % rows
        low, high = (min(max(edge - offset, 0), held) for edge in (start, stop))
        return parameter[low:high]
    return parameter.view(-1, rows, *parameter.shape[1:])[:, start:stop]


def _fill(view: Tensor, row: TableRow, shape: ModelShape, *, seed: int, shard: Shard) -> None:
    """Write one logical tensor's local values into its view."""
    tensor = row.tensor
    if tensor.role is Role.GAIN:
        view.fill_(1.0)
        return
    # Streams are keyed by name, so that leaving this one undrawn moves no other value.
    if row.init_std == 0.0:
        view.zero_()
        return
    # Row-parallel matrices are drawn by columns, their split axis, and written transposed.
    axis = tensor.partition_axis or 0
    length, width = tensor.shape[axis], tensor.shape[1 - axis]
    split = tensor.partition_axis is not None
    start, stop = part_span(tensor, shape, shard) if split else (0, length)
    if start == stop:
        return

    def draw(span: Span) -> Rows:
        rows = draw_rows(seed=seed, name=tensor.name, length=length, width=width, span=span)
        # In place and block by block: the memory beyond the weights is that of a few blocks.
        rows *= np.float32(row.init_std)
        return rows

    # flatten() of the interleaved query, key and value would be a copy, and the writing lost.
    matrix = view.flatten(0, -2) if view.is_contiguous() else None
    # Cut at block boundaries: a shard that starts inside a block draws no block twice.
    boundaries = range((start // BLOCK + 1) * BLOCK, stop, BLOCK)
    for (low, high), rows in _in_order(draw, itertools.pairwise((start, *boundaries, stop))):
        values = torch.from_numpy(rows)
        if axis == 1:
            view[:, low - start : high - start].copy_(values.T)
        elif matrix is not None:
            matrix[low - start : high - start].copy_(values)
        else:
            _copy_grouped(view, values, low - start)


def _copy_grouped(view: Tensor, values: Tensor, offset: int) -> None:
    """Copy logical rows [offset, offset + n) into a [groups, rows, width] view."""
    per_group = view.shape[1]
    done = 0
    while done < values.shape[0]:
        group, within = divmod(offset + done, per_group)
        count = min(per_group - within, values.shape[0] - done)
        view[group, within : within + count].copy_(values[done : done + count])
        done += count


@torch.no_grad()
def initialize(
    model: torch.nn.Module,
    table: ParameterTable,
    shape: ModelShape,
    *,
    seed: int,
    shard: Shard,
) -> None:
    """Give every trainable parameter of this stage its initial value.

    Args:
        model: unwrapped GPTModel, one pipeline stage; its parameters may hold garbage.
        table: resolved parameter table.
        shape: global model shape.
        seed: the run's seed.
        shard: this process's place in tensor parallelism.

    Raises:
        ParameterizationError: a parameter has no role.
    """
    rows = rows_of_parameters(model, table)
    for name, parameter in model.named_parameters():
        if name not in rows:
            continue
        values = _writable(parameter)
        for row in rows[name]:
            _fill(
                part_view(values, row.tensor.part, shape, shard), row, shape, seed=seed, shard=shard
            )
        if values is not parameter:
            parameter.copy_(values)


def _writable(parameter: torch.nn.Parameter) -> Tensor:
    """The tensor to write initial values into.

    An FP8 weight cannot be written in parts. TransformerEngine keeps what it was quantized from,
    and the distributed optimizer's main weights start from that and not from the rounded weight.
    """
    kept = getattr(parameter, "get_high_precision_init_val", None)
    return parameter if kept is None else kept()
