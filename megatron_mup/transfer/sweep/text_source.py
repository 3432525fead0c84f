"""Which text a sweep's shards are made of, so that the same text is known wherever it lies by now.

Shards are made once, and a folder that has its own goes on without the text. Beside them
``source.json`` notes the files in order and ``texts.json`` what they held, so that a text is
compared by its contents: a copy is the same text, and what has changed is another one. Must not
import torch.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

from megatron_mup.data.documents import check_inputs
from megatron_mup.data.manifest import job_manifest_path
from megatron_mup.data.publication import publish_text
from megatron_mup.errors import DataError
from megatron_mup.transfer.sweep.text_records import corpus_records

_NAMED = 3
"""Files that are named before the rest is counted."""


def has_shards(data: Path) -> bool:
    """Whether the shards in a folder are there and whole."""
    # The manifest is published last.
    return job_manifest_path(data / "text").exists()


def corpus_of(data: Path) -> Path:
    """What the tokenizer and the shards in a folder are made of."""
    return data / "corpus.jsonl"


def noted_files(data: Path) -> list[str] | None:
    """Absolute names of the files that shards are made of.

    Args:
        data: folder of the shards.

    Returns:
        The names in order, empty for installed Python sources; None where nothing is noted.
    """
    try:
        names = json.loads((data / "source.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return [str(name) for name in names]


def source_words(data: Path) -> str:
    """What shards are made of, in words."""
    names = noted_files(data)
    if names is None:
        return "a text that is not on record"
    return _listed(names) or "installed Python sources"


def check_text(data: Path, text: Sequence[Path]) -> None:
    """Refuse a text that the shards are not made of; writes nothing.

    Args:
        data: folder of the shards; it need not be there.
        text: the files that were named; empty: none.

    Raises:
        DataError: a file is missing or unreadable; the shards are of another text; no text is named
            for shards that were begun with one.
    """
    if not text:
        if noted_files(data) and not has_shards(data):
            raise DataError(
                f"the shards in {data} are not whole, and were begun with the text "
                f"{source_words(data)}; give it again by --text, or choose another --out"
            )
        return
    for path in text:
        if not path.is_file():
            raise DataError(
                f"there is no file '{path}'; correct --text (make: TEXT){_or_none(data)}"
            )
    check_inputs(text)
    # Before the corpus nothing has read the text.
    if has_shards(data) or corpus_of(data).exists():
        _check_same(data, text)


def note_text(data: Path, text: Sequence[Path]) -> None:
    """Note what shards are about to be made of.

    Args:
        data: folder of the shards, in which there is no corpus yet.
        text: the files, in order.
    """
    # Absolute: the same relative name in another working folder is another file.
    files = [path.resolve() for path in text]
    publish_text(data / "texts.json", json.dumps({str(path): _stamp(path) for path in files}))
    publish_text(data / "source.json", json.dumps([str(path) for path in files]))


def _or_none(data: Path) -> str:
    """Words on the way without a text, where there is one."""
    if not has_shards(data):
        return ""
    return f", or leave it out: {data} has shards of its own, made of {source_words(data)}"


def _check_same(data: Path, text: Sequence[Path]) -> None:
    difference = _difference(data, text)
    if difference is not None:
        cure = "leave --text out to go on with them" if has_shards(data) else "give the text again"
        raise DataError(f"{difference}; {cure}, or choose another --out for another text")


def _difference(data: Path, text: Sequence[Path]) -> str | None:
    """How a text differs from the one that shards were made of, in words; None: it does not."""
    made = f"the shards in {data} were made of"
    names = noted_files(data)
    if names == []:
        return f"{made} installed Python sources, not of {_listed(text)}"
    stamps = _noted_stamps(data, names or [])
    if not stamps:
        # Of a version that noted no contents; what the text became is there to compare with.
        if _is_corpus(corpus_of(data), text):
            return None
        return f"{made} {source_words(data)}, and {_listed(text)} is not known to be the same"
    if len(text) != len(stamps):
        return f"{made} {len(stamps)} files ({source_words(data)}), not of {len(text)}"
    for path, name, stamp in zip(text, names or [], stamps, strict=True):
        if _is_same(path, name, stamp):
            continue
        if str(path.resolve()) == name:
            return f"{path} has changed since {made} it: {_change(stamp, path)}"
        if sorted(map(_sha256, text)) == sorted(stamp["sha256"] for stamp in stamps):
            return f"{made} the same files in another order: {source_words(data)}"
        return f"{path} is another text than {name}, which {made}: {_change(stamp, path)}"
    return None


def _noted_stamps(data: Path, names: Sequence[str]) -> list[dict[str, Any]] | None:
    """Contents of the files in order; None where those of one of them are not noted."""
    try:
        noted = json.loads((data / "texts.json").read_text(encoding="utf-8"))
        return [noted[name] for name in names]
    except (OSError, ValueError, KeyError):
        return None


def _is_corpus(corpus: Path, text: Sequence[Path]) -> bool:
    """Whether a corpus is what the files become."""
    if not corpus.exists():
        return False
    with corpus.open("rb") as lines:
        return all(one == other for one, other in zip_longest(lines, corpus_records(text)))


def _is_same(path: Path, name: str, before: dict[str, Any]) -> bool:
    seen = path.stat()
    if [str(path.resolve()), seen.st_size, seen.st_mtime_ns] == [
        name,
        before["bytes"],
        before["modified_ns"],
    ]:
        return True
    return [seen.st_size, _sha256(path)] == [before["bytes"], before["sha256"]]


def _change(before: dict[str, Any], path: Path) -> str:
    now = _stamp(path)
    was, is_now = (f"{one['bytes']:,} bytes, SHA-256 {one['sha256'][:12]}" for one in (before, now))
    return f"{is_now}, and was {was}"


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


def _listed(files: Sequence[str | Path]) -> str:
    names = ", ".join(map(str, files[:_NAMED]))
    return f"{names} and {len(files) - _NAMED} more" if len(files) > _NAMED else names
