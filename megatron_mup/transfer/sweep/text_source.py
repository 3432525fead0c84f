"""Which texts a sweep's shards were made of, so that a text that has changed is noticed.

Shards are made once. A text whose contents are others by now would otherwise be taken for what the
runs have read. Must not import torch.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_mup.data.publication import publish_text
from megatron_mup.errors import DataError


def check_same_text(data: Path, text: Sequence[Path]) -> None:
    """Compare texts with what is noted of them; note them while nothing is made of them.

    Args:
        data: folder of the shards.
        text: files; a folder or a glob is not looked into.

    Raises:
        DataError: shards were made of other contents of one of them.
    """
    files = [path for path in text if path.is_file()]
    note = data / "texts.json"
    if not (data / "corpus.jsonl").exists():
        data.mkdir(parents=True, exist_ok=True)
        publish_text(note, json.dumps({str(path.resolve()): _stamp(path) for path in files}))
        return
    try:
        noted = dict(json.loads(note.read_text(encoding="utf-8")))
    except (OSError, ValueError):
        # Shards of a version that noted nothing.
        return
    for path in files:
        before = noted.get(str(path.resolve()))
        if before is not None and not _is_same(path, before):
            raise DataError(
                f"{path} has changed since the shards in {data} were made of it; choose another "
                "--out, or restore it"
            )


def _is_same(path: Path, before: dict[str, Any]) -> bool:
    seen = path.stat()
    if [seen.st_size, seen.st_mtime_ns] == [before["bytes"], before["modified_ns"]]:
        return True
    return [seen.st_size, _sha256(path)] == [before["bytes"], before["sha256"]]


def _stamp(path: Path) -> dict[str, Any]:
    seen = path.stat()
    return {
        "bytes": seen.st_size,
        "modified_ns": seen.st_mtime_ns,
        "sha256": _sha256(path),
    }


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
