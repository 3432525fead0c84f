"""Exact duplicates: which documents of a corpus are copies of an earlier one.

Two documents are copies where the first ``DIGEST_BYTES`` of their texts' SHA-256 agree; the first
in the corpus's order stays. The digests go through files on disk, one for each bucket of digests,
so that memory holds one bucket and one bit for each document, whatever the corpus's size. The
result is a file of these bits; nothing here knows units or shards.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

BUCKET_DOCUMENTS = 1 << 20
"""Documents of a bucket, as long as the buckets suffice: sorting them takes 100 MB."""

# All are open at once, and a process may often have no more than 1024 files open; a corpus of 10^9
# documents makes buckets of 4 * 10^6, 400 MB in the sort.
_MOST_BUCKETS = 256
_BUFFER_BYTES = 1 << 16
_ENTRY = np.dtype([("high", "<u8"), ("low", "<u8"), ("document", "<i8")])


def mark_duplicates(
    digests: Iterable[NDArray[np.void]],
    marks: Path,
    *,
    documents: int,
    bucket_documents: int = BUCKET_DOCUMENTS,
) -> int:
    """Find the copies of earlier documents and store a bit for each document.

    Args:
        digests: Arrays of 16-byte digests; end to end those of all documents in order.
        marks: The file to write: bit i % 8 (the lowest is 0) of byte i // 8 is set where document
            i is a copy. Beside it a folder for the buckets lives during the call.
        documents: Number of documents.
        bucket_documents: About how many documents to sort at a time.

    Returns:
        The number of copies.

    Raises:
        OSError: The disk is full or fails.
    """
    bits = np.zeros((documents + 7) // 8, dtype=np.uint8)
    folder = marks.with_name(f"{marks.name}.buckets")
    # A run that was killed may have left its buckets.
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        copies = 0
        for bucket in _fill_buckets(digests, folder, documents // bucket_documents + 1):
            found = _copies(np.fromfile(bucket, dtype=_ENTRY))
            bucket.unlink()
            np.bitwise_or.at(bits, found >> 3, (1 << (found & 7)).astype(np.uint8))
            copies += len(found)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    marks.write_bytes(bits.data)
    return copies


def read_marks(marks: Path, first: int, count: int) -> NDArray[np.bool_]:
    """Read the bits of some documents.

    Args:
        marks: What ``mark_duplicates`` wrote.
        first: Number of the first document.
        count: How many documents.

    Returns:
        [count] whether each is a copy of an earlier document.
    """
    skipped = first % 8
    raw = np.fromfile(marks, dtype=np.uint8, offset=first // 8, count=(skipped + count + 7) // 8)
    return np.unpackbits(raw, bitorder="little")[skipped : skipped + count].astype(np.bool_)


def _fill_buckets(
    digests: Iterable[NDArray[np.void]], folder: Path, buckets_wanted: int
) -> list[Path]:
    """Spread the digests, with the documents' numbers, over bucket files by their first byte."""
    # A power of two, so that the low bits of the first byte are spread evenly.
    buckets = min(1 << (buckets_wanted - 1).bit_length(), _MOST_BUCKETS)
    paths = [folder / f"{bucket:03d}" for bucket in range(buckets)]
    with contextlib.ExitStack() as stack:
        streams = [stack.enter_context(path.open("wb", _BUFFER_BYTES)) for path in paths]
        first = 0
        for part in digests:
            words = np.ascontiguousarray(part).view("<u8").reshape(-1, 2)
            bucket_of = words[:, 0] & np.uint64(buckets - 1)
            # Stable: within a bucket the documents stay in the corpus's order.
            order = np.argsort(bucket_of, kind="stable")
            entries = np.empty(len(words), dtype=_ENTRY)
            entries["high"], entries["low"] = words[order, 0], words[order, 1]
            entries["document"] = order + first
            ends = np.cumsum(np.bincount(bucket_of.astype(np.intp), minlength=buckets))
            for stream, mine in zip(streams, np.split(entries, ends[:-1]), strict=True):
                stream.write(mine.tobytes())
            first += len(words)
    return paths


def _copies(entries: NDArray[np.void]) -> NDArray[np.int64]:
    """Numbers of the documents of a bucket that repeat an earlier one."""
    # lexsort is stable: among equal digests the first document comes first.
    order = np.lexsort((entries["low"], entries["high"]))
    high, low = entries["high"][order], entries["low"][order]
    same = (high[1:] == high[:-1]) & (low[1:] == low[:-1])
    numbers: NDArray[np.int64] = entries["document"][order[1:][same]]
    return numbers
