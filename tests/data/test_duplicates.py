from __future__ import annotations

import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from megatron_mup.data.duplicates import mark_duplicates, read_marks


def digests_of(numbers: list[int]) -> NDArray[np.void]:
    """Digests whose first byte has many values, as those of SHA-256 do."""
    raw = b"".join(
        (number * 0x9E3779B97F4A7C15 % 2**128).to_bytes(16, "little") for number in numbers
    )
    return np.frombuffer(raw, dtype="V16")


@settings(max_examples=60, deadline=None)
@given(
    numbers=st.lists(st.integers(0, 40), max_size=120),
    cuts=st.lists(st.integers(0, 120), max_size=4),
    bucket_documents=st.sampled_from([1, 7, 1 << 20]),
)
def test_all_but_the_first_of_equal_documents_are_marked(
    tmp_path_factory: pytest.TempPathFactory,
    numbers: list[int],
    cuts: list[int],
    bucket_documents: int,
) -> None:
    marks = tmp_path_factory.mktemp("marks") / "marks"
    parts = np.split(digests_of(numbers), sorted(min(cut, len(numbers)) for cut in cuts))
    copies = mark_duplicates(
        parts, marks, documents=len(numbers), bucket_documents=bucket_documents
    )
    expected = [number in numbers[:place] for place, number in enumerate(numbers)]
    assert read_marks(marks, 0, len(numbers)).tolist() == expected
    assert copies == sum(expected)


@pytest.mark.parametrize("differing", [0, 7, 8, 15])
def test_digests_that_differ_in_one_byte_are_of_two_documents(
    tmp_path: Path, differing: int
) -> None:
    other = bytearray(16)
    other[differing] = 1
    digests = np.frombuffer(bytes(16) + bytes(other) + bytes(16), dtype="V16")
    mark_duplicates([digests], tmp_path / "marks", documents=3)
    assert read_marks(tmp_path / "marks", 0, 3).tolist() == [False, False, True]


@pytest.mark.parametrize(("first", "count"), [(0, 0), (3, 1), (7, 10), (8, 8), (19, 1), (20, 0)])
def test_marks_are_read_from_any_document_on(tmp_path: Path, first: int, count: int) -> None:
    numbers = [0, 1, 0, 0, 2, 3, 2, 1, 4, 5, 5, 6, 7, 8, 8, 8, 9, 1, 10, 9]
    mark_duplicates([digests_of(numbers)], tmp_path / "marks", documents=20)
    expected = [number in numbers[:place] for place, number in enumerate(numbers)]
    found = read_marks(tmp_path / "marks", first, count)
    assert found.tolist() == expected[first : first + count]


def test_the_buckets_are_gone_afterwards_whatever_happens(tmp_path: Path) -> None:
    # Left by a run that was killed.
    (tmp_path / "marks.buckets").mkdir()
    (tmp_path / "marks.buckets" / "000").write_bytes(b"old")
    mark_duplicates([digests_of([1, 1])], tmp_path / "marks", documents=2, bucket_documents=1)
    assert [path.name for path in tmp_path.iterdir()] == ["marks"]
    (tmp_path / "marks").unlink()

    def failing() -> NDArray[np.void]:
        raise OSError("no unit")

    with pytest.raises(OSError, match="no unit"):
        mark_duplicates((failing() for _ in range(1)), tmp_path / "marks", documents=2)
    assert list(tmp_path.iterdir()) == []


def test_memory_holds_a_bucket_and_not_the_corpus(tmp_path: Path) -> None:
    documents, part = 2_000_000, 20_000
    generator = np.random.default_rng(0)

    def parts() -> Iterator[NDArray[np.void]]:
        return (
            np.frombuffer(generator.bytes(16 * part), dtype="V16") for _ in range(documents // part)
        )

    tracemalloc.start()
    try:
        copies = mark_duplicates(
            parts(), tmp_path / "marks", documents=documents, bucket_documents=20_000
        )
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert copies == 0
    # The digests alone are 32 MB; the streams' buffers 8 MB.
    assert peak < 16e6
