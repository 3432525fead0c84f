"""Fused QKV with fewer query groups than tensor-parallel ranks: initial values and parts."""

from __future__ import annotations

import pytest
import torch

from megatron_mup.model.initialization import Shard, part_span, part_view
from megatron_mup.parameterization.roles import LogicalTensor, ModelShape, Part, logical_tensors
from tests.configurations import tiny

FUSED = "decoder.layers.0.self_attention.linear_qkv.weight"


def query_key_value(shape: ModelShape) -> list[LogicalTensor]:
    """The parts of the first layer's fused weight."""
    return [tensor for tensor in logical_tensors(shape) if tensor.parameter == FUSED]


# One group of H heads is stored as its queries, its key, its value; 16 rows each.
@pytest.mark.parametrize(
    ("groups", "ranks", "expected"),
    [
        # Four queries, key, value are 96 rows: 48 for each of two ranks.
        (1, 2, [{"query": (0, 48)}, {"query": (48, 64), "key": (0, 16), "value": (0, 16)}]),
        # Two queries, key, value are 64 rows: each of four ranks holds half of a group.
        (
            2,
            4,
            [
                {"query": (0, 32)},
                {"key": (0, 16), "value": (0, 16)},
                {"query": (32, 64)},
                {"key": (16, 32), "value": (16, 32)},
            ],
        ),
    ],
)
def test_a_rank_holds_an_even_part_of_a_groups_rows(
    groups: int, ranks: int, expected: list[dict[str, tuple[int, int]]]
) -> None:
    shape = tiny(f"num_query_groups={groups}").model.shape
    for rank, held in enumerate(expected):
        spans = {
            tensor.part.value: part_span(tensor, shape, Shard(rank, ranks))
            for tensor in query_key_value(shape)
        }
        assert {part: span for part, span in spans.items() if span[0] < span[1]} == held


@pytest.mark.parametrize(("groups", "ranks"), [(1, 2), (1, 4), (2, 4)])
def test_views_of_all_ranks_are_the_parts_of_the_whole(groups: int, ranks: int) -> None:
    shape = tiny(f"num_query_groups={groups}").model.shape
    rows = (4 + 2 * groups) * 16
    whole = torch.arange(rows * 64.0).view(rows, 64)
    for part in (Part.QUERY, Part.KEY, Part.VALUE):
        views = [
            part_view(shard, part, shape, Shard(rank, ranks))
            for rank, shard in enumerate(whole.chunk(ranks))
        ]
        assert torch.equal(torch.cat(views), part_view(whole, part, shape).flatten(0, 1))
