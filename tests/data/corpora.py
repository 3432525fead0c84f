"""Small corpora of finished units, and a plain model of what they become."""

from __future__ import annotations

import hashlib
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_mup.data.assembly import AssemblyRequest
from megatron_mup.data.shard_plan import SPLITS
from megatron_mup.data.unit_files import ROW, UnitFacts, UnitKey, unit_writer

INPUTS = ["a.jsonl", "b.jsonl.gz", "c.txt", "d.txt"]


@dataclass(frozen=True)
class Doc:
    text: str
    ids: tuple[int, ...]
    split: str = "train"
    file: int = 0
    position: int = 0

    @property
    def digest(self) -> bytes:
        return hashlib.sha256(self.text.encode("utf-8")).digest()[:16]


def write_docs(
    work: Path, units: dict[UnitKey, list[Doc]], *, dtype: str = "<u2", **facts: Any
) -> list[UnitKey]:
    """Write unit files as a worker does; return the keys in order."""
    (work / "units").mkdir(parents=True, exist_ok=True)
    for key, docs in units.items():
        rows = np.zeros(len(docs), ROW)
        for row, doc in zip(rows, docs, strict=True):
            row["length"], row["split"] = len(doc.ids), SPLITS.index(doc.split)
            row["file"], row["position"] = doc.file, doc.position
            row["text_bytes"] = len(doc.text.encode("utf-8"))
            row["digest"] = np.void(doc.digest)
        ids = [np.array(doc.ids, dtype=dtype) for doc in docs]
        known = {
            "engine": "reference",
            "tokens": sum(map(len, ids)),
            "lines": len(docs),
            "empty_documents": 0,
            "rejected": {},
            "rejected_places": [],
            "last": True,
            "raw_sha256": None,
        }
        with unit_writer(work / "units", key) as writer:
            for part in ids:
                writer.add(part)
            writer.finish(UnitFacts(**known | facts), rows)
    return sorted(units)


def random_units(seed: int, *, splits: tuple[str, ...] = SPLITS) -> dict[UnitKey, list[Doc]]:
    """Units with copies, documents without ids, and all splits; every split has a document."""
    source = random.Random(seed)
    units: dict[UnitKey, list[Doc]] = {}
    number = 0
    for key in [UnitKey(0, 0), UnitKey(0, 1), UnitKey(1, 0), UnitKey(1, 1), UnitKey(2, 0)]:
        docs = []
        for _ in range(source.randint(15, 25)):
            number += 1
            text = f"text {source.randint(0, 60)}"
            split = splits[sum(text.encode()) % len(splits)]
            ids = tuple(source.randint(0, 999) for _ in range(source.randint(0, 9)))
            # The last unit is one of text files, and so of several inputs.
            file = 2 + (len(docs) > 9) if key.source == 2 else key.source
            docs.append(Doc(text, ids, split, file, number))
        units[key] = docs
    return units


def request_for(work: Path, prefix: Path, keys: list[UnitKey], **changes: Any) -> AssemblyRequest:
    settings: dict[str, Any] = {
        "splits": SPLITS,
        "shard_tokens": 40,
        "deduplicate": True,
        "overwrite": False,
        "vocab_size": 1000,
    }
    return AssemblyRequest(
        work=work,
        output_prefix=prefix,
        keys=keys,
        input_names=INPUTS,
        tokenizer_sha256="7" * 64,
        eod=2,
        append_eod=True,
        options={"json_key": "text"},
        **settings | changes,
    )


def without_copies(docs: list[Doc]) -> list[Doc]:
    seen: set[bytes] = set()
    return [doc for doc in docs if not (doc.digest in seen or seen.add(doc.digest))]


def cut(docs: list[Doc], shard_tokens: int | None) -> list[list[Doc]]:
    """The law of shards, one document at a time."""
    shards: list[list[Doc]] = [[]]
    for doc in docs:
        tokens = sum(len(other.ids) for other in shards[-1])
        too_many = shard_tokens is not None and tokens + len(doc.ids) > shard_tokens
        if too_many and doc.ids and tokens:
            shards.append([])
        shards[-1].append(doc)
    return shards


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, by its path there."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}
