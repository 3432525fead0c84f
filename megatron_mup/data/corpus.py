"""A corpus that every machine has: installed Python sources and documentation, as real text.

For quickstarts and tests without a download. The texts stay under their own licences: use the
corpus where it was collected, do not redistribute it. The same installation and seed give the same
corpus; another installation gives another.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from megatron_mup.data.documents import Document
from megatron_mup.data.publication import check_writable, published
from megatron_mup.errors import DataError

MIN_BYTES, MAX_BYTES = 200, 256_000
"""Files outside these sizes are stubs or data in the shape of source."""

MAX_LINE_CHARACTERS = 400
"""A longer line marks minified or generated text."""

_SUFFIXES = (".py", ".md", ".rst", ".txt")
# site-packages lies inside the standard library's folder where there is no virtual environment.
_SKIPPED_FOLDERS = frozenset(
    {"__pycache__", "test", "tests", "testing", "idle_test", "testdata", "test_data", "fixtures"}
    | {"data", "datasets", "pydoc_data", "encodings", "node_modules", "licenses"}
    | {"site-packages", "dist-packages"}
)
_SKIPPED_NAMES = re.compile(
    # Licences; lists of words or packages; and files that hold absolute paths of the machine.
    r"(licen[sc]e|copying|notice|copyright|authors|requirements|top_level|entry_points|"
    r"__editable__|_sysconfigdata|_virtualenv|test_)|.*(_test|_pb2)\.py$",
    re.IGNORECASE,
)
_GENERATED = re.compile(
    r"do not (edit|modify)|(auto-?|automatically |machine )generated|generated (by|from|with)",
    re.IGNORECASE,
)


def collect_python_text(max_bytes: int, *, seed: int) -> Iterator[Document]:
    """Yield installed Python sources and documentation in a seeded order.

    Left out: tests, data in the shape of source, generated and minified files, licences, files
    that are not UTF-8, and exact copies.

    Args:
        max_bytes: Limit of the UTF-8 bytes of all texts together; the corpus ends before the
            first document that would exceed it.
        seed: Seed of the order.

    Yields:
        Documents named "stdlib/..." or "site-packages/...", never by a path of this machine.

    Raises:
        DataError: ``max_bytes`` is not positive.
    """
    if max_bytes <= 0:
        raise DataError(f"max_bytes is {max_bytes}; pass a positive number of bytes")
    return _collect(max_bytes, seed)


def write_corpus(out_jsonl: Path, *, max_bytes: int, seed: int = 0, overwrite: bool = False) -> int:
    """Write the corpus of ``collect_python_text`` as JSON lines with "name" and "text".

    Args:
        out_jsonl: The file to publish.
        max_bytes: Limit of the UTF-8 bytes of all texts together.
        seed: Seed of the order.
        overwrite: Whether an existing file may be replaced.

    Returns:
        Number of documents written.

    Raises:
        DataError: The output is refused, or ``max_bytes`` is not positive or holds no document.
    """
    documents = collect_python_text(max_bytes, seed=seed)
    check_writable([out_jsonl], overwrite=overwrite, option="the corpus file's name")
    count = 0
    with published(out_jsonl) as stream:
        for document in documents:
            record = {"name": document.name, "text": document.text}
            stream.write(json.dumps(record, ensure_ascii=False).encode("utf-8") + b"\n")
            count += 1
        if count == 0:
            raise DataError(f"max_bytes is {max_bytes}, too few for one document; pass more bytes")
    return count


def _collect(max_bytes: int, seed: int) -> Iterator[Document]:
    # By hash and not by a shuffle: a package more or less moves no other file.
    def order(name: str) -> bytes:
        return hashlib.sha256(f"{seed}\0{name}".encode()).digest()

    files = _candidates()
    seen: set[bytes] = set()
    total = 0
    for name in sorted(files, key=order):
        text = _usable_text(files[name])
        if text is None:
            continue
        raw = text.encode("utf-8")
        # Vendored copies would put the same text into both splits.
        digest = hashlib.sha256(raw).digest()
        if digest in seen:
            continue
        seen.add(digest)
        total += len(raw)
        if total > max_bytes:
            return
        yield Document(name, text)


def _candidates() -> dict[str, Path]:
    """Return the files worth reading, by their name in the corpus."""
    paths = sysconfig.get_paths()
    roots = [
        ("stdlib", Path(paths["stdlib"])),
        ("site-packages", Path(paths["purelib"])),
        ("site-packages", Path(paths["platlib"])),
    ]
    return {
        f"{label}/{path.relative_to(root).as_posix()}": path
        for label, root in roots
        for path in _walk(root)
    }


def _walk(root: Path) -> Iterator[Path]:
    for folder, subfolders, names in os.walk(root):
        # Assigned in place: os.walk then does not enter what is left out.
        subfolders[:] = [
            name
            for name in subfolders
            if name not in _SKIPPED_FOLDERS and not name.endswith((".dist-info", ".egg-info"))
        ]
        for name in names:
            if name.endswith(_SUFFIXES) and not _SKIPPED_NAMES.match(name):
                yield Path(folder, name)


def _usable_text(path: Path) -> str | None:
    """Return a file's text, or None if it is not text that a person wrote."""
    try:
        if not MIN_BYTES <= path.stat().st_size <= MAX_BYTES:
            return None
        text = path.read_bytes().decode("utf-8")
    except (OSError, UnicodeDecodeError):
        return None
    # Generators announce themselves at the top; further down the words may be about something else.
    if _GENERATED.search(text[:1000]) or "\0" in text:
        return None
    if max(map(len, text.splitlines()), default=0) > MAX_LINE_CHARACTERS:
        return None
    return text
