"""A description of stored blocks that does not fit together is refused before anything is read."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from megatron_mup.convert.stored_tensors import StoredTensors
from megatron_mup.errors import CheckpointError

Block = tuple[tuple[int, int], tuple[int, int]]


def describe(folder: Path, *blocks: Block) -> Path:
    """A folder that says it holds a 4 x 6 tensor in blocks: offset and size."""
    chunks = [ChunkStorageMetadata(torch.Size(o), torch.Size(s)) for o, s in blocks]
    entry = TensorStorageMetadata(TensorProperties(torch.float32), torch.Size((4, 6)), chunks)
    places = {
        MetadataIndex("weight", torch.Size(offset)): _StorageInfo("__0_0.distcp", 100 * number, 100)
        for number, (offset, _) in enumerate(blocks)
    }
    with (folder / ".metadata").open("wb") as stream:
        pickle.dump(Metadata({"weight": entry}, storage_data=places), stream)
    return folder


def test_blocks_side_by_side_are_taken_in_any_order(tmp_path: Path) -> None:
    blocks: list[Block] = [((2, 3), (2, 3)), ((0, 0), (2, 6)), ((2, 0), (2, 3))]
    stored = StoredTensors(describe(tmp_path, *blocks)).tensors["weight"]
    assert len(stored.parts) == 3


@pytest.mark.parametrize(
    ("blocks", "message"),
    [
        # As many elements as the tensor has: the hole of rows 3 is hidden by rows 1 twice.
        ([((0, 0), (2, 6)), ((1, 0), (2, 6))], "two blocks of weight overlap"),
        ([((0, 0), (4, 4)), ((0, 3), (4, 2))], "two blocks of weight overlap"),
        ([((0, 0), (4, 1)), ((0, 1), (1, 5)), ((3, 0), (1, 6))], "two blocks of weight overlap"),
        ([((0, 0), (4, 3)), ((0, 3), (4, 4))], "a block of weight lies outside of it"),
    ],
)
def test_blocks_that_overlap_or_leave_the_tensor_are_refused(
    tmp_path: Path, blocks: list[Block], message: str
) -> None:
    with pytest.raises(CheckpointError, match=f"does not describe its own files .{message}"):
        StoredTensors(describe(tmp_path, *blocks))
