"""Shards, sets and jobs by the definition of their formats, without the package's writer."""

from __future__ import annotations

import hashlib
import json
import struct
from pathlib import Path
from typing import Any

import numpy as np


def write_shard(
    prefix: Path, documents: list[list[int]], *, dtype: str = "uint16", code: int = 8
) -> Path:
    """Write a shard as Megatron does it: without a manifest."""
    ids = [token for document in documents for token in document]
    lengths = [len(document) for document in documents]
    size = np.dtype(dtype).itemsize
    pointers = [size * sum(lengths[:number]) for number in range(len(lengths))]
    count = len(documents)
    prefix.parent.mkdir(parents=True, exist_ok=True)
    Path(f"{prefix}.bin").write_bytes(np.array(ids, dtype=dtype).tobytes())
    Path(f"{prefix}.idx").write_bytes(
        b"MMIDIDX\0\0"
        + struct.pack("<QBQQ", 1, code, count, count + 1)
        + struct.pack(f"<{count}i", *lengths)
        + struct.pack(f"<{count}q", *pointers)
        + struct.pack(f"<{count + 1}q", *range(count + 1))
    )
    return prefix


def digest(path: Path | str) -> str:
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def shard_record(prefix: Path, documents: list[list[int]]) -> dict[str, Any]:
    """The manifest that belongs to a shard of 16-bit ids below 512 that end with 2."""
    return {
        "format_version": 2,
        "documents": len(documents),
        "tokens": sum(map(len, documents)),
        "text_bytes": 3 * sum(map(len, documents)),
        "largest_token_id": max(max(document) for document in documents),
        "dtype": "uint16",
        "bin_bytes": Path(f"{prefix}.bin").stat().st_size,
        "bin_sha256": digest(f"{prefix}.bin"),
        "idx_sha256": digest(f"{prefix}.idx"),
        "tokenizer_sha256": "a" * 64,
        "vocab_size": 512,
        "eod": 2,
        "append_eod": True,
        "inputs": [{"file": "a.jsonl", "start": 0, "stop": 40, "documents": len(documents)}],
    }


def write_own_shard(prefix: Path, documents: list[list[int]], **changes: object) -> Path:
    """A shard with its manifest, in which some values may be others."""
    write_shard(prefix, documents)
    record = shard_record(prefix, documents) | changes
    Path(f"{prefix}.json").write_text(json.dumps(record))
    return prefix


def write_set(prefix: Path, shards: list[list[list[int]]], **changes: object) -> Path:
    """A set of shards with manifests; one list of documents for each shard."""
    for number, documents in enumerate(shards):
        name = f"{prefix.name}-{number:05d}-of-{len(shards):05d}"
        write_own_shard(prefix.with_name(name), documents, **changes)
    return prefix


def write_job(prefix: Path, splits: dict[str, list[list[list[int]]]], **changes: object) -> Path:
    """The output of a whole job: a set for each split, and the job's manifest."""
    entries = {}
    for split, shards in splits.items():
        name = f"{prefix.name}_{split}"
        write_set(prefix.with_name(name), shards)
        names = [f"{name}-{number:05d}-of-{len(shards):05d}" for number in range(len(shards))]
        kept = ("documents", "tokens", "text_bytes", "bin_bytes", "bin_sha256", "idx_sha256")
        entries[split] = []
        for shard, documents in zip(names, shards, strict=True):
            record = shard_record(prefix.with_name(shard), documents)
            entries[split].append({"name": shard} | {key: record[key] for key in kept})
    record = {
        "format_version": 2,
        "options": {"json_key": "text", "valid_fraction": 0.5},
        "inputs": ["a.jsonl"],
        "tokenizer_sha256": "a" * 64,
        "vocab_size": 512,
        "eod": 2,
        "empty_documents": 4,
        "duplicate_documents": 5,
        "rejected_documents": {"broken JSON": 6},
        "rejected_places": [f"a.jsonl:{line}: broken JSON" for line in range(1, 7)],
        "splits": entries,
    }
    Path(f"{prefix}.manifest.json").write_text(json.dumps(record | changes))
    return prefix


def patch(path: Path | str, offset: int, raw: bytes) -> None:
    """Change some bytes of a file."""
    content = bytearray(Path(path).read_bytes())
    content[offset : offset + len(raw)] = raw
    Path(path).write_bytes(content)
