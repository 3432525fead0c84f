"""Boxes of a block are read from their place in the file: any cut, cast and order of values."""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_mup.convert import stored_blocks
from megatron_mup.convert.stored_blocks import Sizes, StoredPart, find_values


def stored(folder: Path, values: object, *, before: int = 13) -> StoredPart:
    """A file that holds something else before and after what ``torch.save`` wrote."""
    path = folder / "blocks"
    with path.open("wb") as stream:
        stream.write(b"x" * before)
    with path.open("ab") as stream:
        torch.save(values, stream)
    length = path.stat().st_size - before
    with path.open("ab") as stream:
        stream.write(b"y" * 1000)
    return StoredPart("blocks", before, length)


@pytest.mark.parametrize("staging", [1, 24, 1 << 20])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("first", "size"),
    [
        ((0, 0, 0), (2, 5, 6)),
        ((1, 0, 0), (1, 5, 6)),
        ((0, 2, 0), (1, 3, 6)),
        ((1, 1, 2), (1, 3, 3)),
        ((0, 4, 5), (2, 1, 1)),
        ((0, 0, 0), (2, 0, 6)),
    ],
)
def test_any_box_is_read_in_its_own_dtype_or_cast(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    first: Sizes,
    size: Sizes,
    dtype: torch.dtype,
    staging: int,
) -> None:
    monkeypatch.setattr(stored_blocks, "_STAGING_BYTES", staging)
    whole = torch.arange(60.0).view(2, 5, 6).to(dtype)
    values = find_values(tmp_path, stored(tmp_path, whole))
    a, b, c = (slice(start, start + count) for start, count in zip(first, size, strict=True))
    around = torch.full((4, 7, 8), -1.0)
    target = around[1 : 1 + size[0], 1 : 1 + size[1], 1 : 1 + size[2]]
    values.read_into(target, first)
    assert torch.equal(target, whole[a, b, c].float())
    assert (around == -1.0).sum() == around.numel() - target.numel()
    same = torch.empty(size, dtype=dtype)
    values.read_into(same, first)
    assert torch.equal(same, whole[a, b, c])


@pytest.mark.parametrize(
    "values", [torch.arange(12.0).view(3, 4).t(), torch.tensor(2.5), torch.arange(20.0)[4:9]]
)
def test_values_in_another_order_scalars_and_views_are_read(tmp_path: Path, values: Tensor) -> None:
    found = find_values(tmp_path, stored(tmp_path, values))
    target = torch.empty(values.shape)
    found.read_into(target, (0,) * values.dim())
    assert torch.equal(target, values)
    if values.dim() == 2:
        column = torch.empty(4, 1)
        found.read_into(column, (0, 2))
        assert column.view(-1).tolist() == [8.0, 9.0, 10.0, 11.0]


def test_only_plain_tensors_are_found_and_a_cut_file_is_told(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no tensor but dict"):
        find_values(tmp_path, stored(tmp_path, {"a": torch.ones(2)}))
    values = find_values(tmp_path, stored(tmp_path, torch.arange(1000.0)))
    assert values.position is not None
    path = tmp_path / "blocks"
    path.write_bytes(path.read_bytes()[: values.position + 100])
    with pytest.raises(OSError, match="ends inside"):
        values.read_into(torch.empty(1000), (0,))


class TooLong:
    """Says that it has a thousand values, and brings four."""

    def __reduce__(self) -> tuple[Any, ...]:
        four = torch.zeros(4)
        rebuild = torch._utils._rebuild_tensor_v2
        held = torch.storage.TypedStorage(
            wrap_storage=four.untyped_storage(), dtype=four.dtype, _internal=True
        )
        return rebuild, (held, 0, (1000,), (1,), False, OrderedDict())


def test_values_beyond_the_end_of_their_block_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="its values end outside of it"):
        find_values(tmp_path, stored(tmp_path, TooLong()))
