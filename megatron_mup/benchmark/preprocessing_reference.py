"""The yardstick: Megatron-LM's way from JSON lines to shards, with sentencepiece.

Does what ``tools/preprocess_data.py`` does there, step by step and at its costs: a pool of
processes encodes one line at a time into a Python list of ids, and the parent process hands each
list to megatron-core's own ``IndexedDatasetBuilder``. Nothing is synced to the disk. It must not be
made faster: it stands for what a user has without this package.
"""

from __future__ import annotations

import filecmp
import json
import multiprocessing
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece

CHUNK_LINES = 32
"""Lines that a process of the pool is handed at a time, as there."""

# Set once in each process of the pool, as there.
_processor: Any = None


def run_reference(input_path: Path, prefix: Path, *, model_path: Path, workers: int) -> None:
    """Make ``PREFIX.bin`` and ``PREFIX.idx``.

    Args:
        input_path: JSON lines with the key "text".
        prefix: Where the shard goes.
        model_path: A sentencepiece model.
        workers: Processes of the pool; the parent process writes beside them.
    """
    indexed_dataset = upstream()
    processor = sentencepiece.SentencePieceProcessor(model_file=str(model_path))
    dtype = indexed_dataset.DType.optimal_dtype(processor.vocab_size())
    builder = indexed_dataset.IndexedDatasetBuilder(f"{prefix}.bin", dtype=dtype)
    # Forked, as there: the pool inherits what is imported.
    pool = multiprocessing.get_context("fork").Pool(
        workers, initializer=_start, initargs=(str(model_path),)
    )
    with input_path.open(encoding="utf-8") as lines, pool:
        for ids, lengths in pool.imap(_encode, lines, CHUNK_LINES):
            builder.add_document(ids, lengths)
        pool.close()
        pool.join()
    builder.finalize(f"{prefix}.idx")


def upstream() -> Any:
    """Import megatron-core's reader and writer of shards; takes seconds."""
    # Not at the top: processes that only tokenize must not load torch.
    from megatron_mup import platform

    platform.prepare()
    from megatron.core.datasets import indexed_dataset

    return indexed_dataset


def first_difference(ours: Path, theirs: Path) -> str | None:
    """Compare two shards byte for byte.

    Args:
        ours: Prefix of one shard.
        theirs: Prefix of the other.

    Returns:
        None if both files are the same; else the first document that differs, in words.
    """
    pairs = [(f"{ours}{suffix}", f"{theirs}{suffix}") for suffix in (".bin", ".idx")]
    if all(filecmp.cmp(*pair, shallow=False) for pair in pairs):
        return None
    dataset = upstream().IndexedDataset
    first, second = dataset(str(ours)), dataset(str(theirs))
    if first.index.dtype != second.index.dtype:
        return f"ids are {first.index.dtype.__name__} and {second.index.dtype.__name__}"
    for number in range(min(len(first), len(second))):
        if not np.array_equal(first[number], second[number]):
            return f"document {number} (counted from 0) differs"
    if len(first) != len(second):
        return f"{len(first)} documents against {len(second)}; the first ones are the same"
    return "the documents are the same, their order on disk or their index is not"


def _start(model_path: str) -> None:
    global _processor
    _processor = sentencepiece.SentencePieceProcessor(model_file=model_path)


def _encode(line: str) -> tuple[list[int], list[int]]:
    """The ids of a line's document with eod, and the lengths of its sequences."""
    ids: list[int] = _processor.encode(json.loads(line)["text"], out_type=int)
    if not ids:
        return [], []
    ids.append(_processor.eos_id())
    return ids, [len(ids)]
