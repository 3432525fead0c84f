"""Whether a checkpoint's files are those that were written.

``iter_0000100/checksums.json`` lists every other file of its folder with size and SHA-256. It is
written last, before the folder gets its final name, so a folder with that name and that file was
complete once; ``check_files`` tells whether it still is. Names come from a file that anybody may
have written: only plain names of files inside the folder are accepted. Must not import torch.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron_mup.data.publication import publish_text, sync_folder
from megatron_mup.errors import CheckpointError

CHECKSUMS = "checksums.json"
FORMAT = 1

_FOLDER = re.compile(r"iter_([0-9]{7,18})")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_LARGEST_LIST_BYTES = 1 << 28
"""Far above any real list: 100 bytes a file and a few files a rank."""


@dataclass(frozen=True, kw_only=True)
class FileDigest:
    """What one file held when it was saved."""

    bytes: int
    """Size of the file."""

    sha256: str
    """Hex digest of its content."""


def checkpoint_folder(root: Path, iteration: int) -> Path:
    """Megatron's folder name of one checkpoint."""
    return root / f"iter_{iteration:07d}"


def iteration_of(folder: Path) -> int | None:
    """The iteration that a checkpoint's folder is named after; None if it has no such name."""
    match = _FOLDER.fullmatch(folder.name)
    return int(match[1]) if match else None


def whole_iterations(root: Path) -> list[int]:
    """Iterations that were published under ``root``, newest first.

    Args:
        root: the ``save`` or ``load`` folder; may be missing.

    Returns:
        Iterations whose folder has its final name and its checksums.
    """
    found = {iteration_of(path.parent) for path in root.glob(f"iter_*/{CHECKSUMS}")} - {None}
    # iter_00000005 is not Megatron's name of iteration 5.
    named = [
        i for i in found if i is not None and (checkpoint_folder(root, i) / CHECKSUMS).is_file()
    ]
    return sorted(named, reverse=True)


def digest_files(folder: Path, names: Iterable[str]) -> dict[str, FileDigest]:
    """Read files back from the disk and digest them; each is synced first.

    Args:
        folder: the checkpoint's folder.
        names: the files, without folder.

    Returns:
        Size and digest by name.

    Raises:
        CheckpointError: a name leaves the folder.
        OSError: a file cannot be read.
    """
    digests = {}
    for name in names:
        _refuse_escape(folder, name)
        with (folder / name).open("rb") as stream:
            # A digest of pages that never reach the disk would vouch for nothing.
            os.fsync(stream.fileno())
            digests[name] = _digest(stream)
    return digests


def write_checksums(folder: Path, digests: Mapping[str, FileDigest]) -> None:
    """Publish ``checksums.json``; the files and the folder's own entries reach the disk before.

    Args:
        folder: the checkpoint's folder, complete but for this file.
        digests: of every file, by name.

    Raises:
        CheckpointError: a name leaves the folder.
    """
    for name in digests:
        _refuse_escape(folder, name)
    sync_folder(folder)
    files = {name: asdict(digests[name]) for name in sorted(digests)}
    publish_text(folder / CHECKSUMS, json.dumps({"format": FORMAT, "files": files}, indent=1))


def read_checksums(folder: Path) -> dict[str, FileDigest]:
    """Read and validate ``checksums.json``.

    Args:
        folder: the checkpoint's folder.

    Returns:
        Size and digest by name.

    Raises:
        CheckpointError: missing, damaged, or naming a file outside the folder.
    """
    path = folder / CHECKSUMS
    try:
        # A device or a pipe in its place would be read without end.
        if path.stat().st_size > _LARGEST_LIST_BYTES or not path.is_file():
            raise ValueError(f"not a file of at most {_LARGEST_LIST_BYTES} bytes")
        record = json.loads(path.read_bytes())
        digests = _parse(record)
    except FileNotFoundError as error:
        raise CheckpointError(
            f"{path} is missing: {folder.name} was not saved to its end, or not by this version "
            "of megatron_mup; use another iter_* folder"
        ) from error
    # Deep nesting ends the parser with RecursionError.
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{path} is damaged ({error}); use another iter_* folder or copy this one again"
        ) from error
    for name in digests:
        _refuse_escape(folder, name)
    return digests


def check_files(folder: Path, *, rank: int = 0, size: int = 1) -> list[str]:
    """Compare one rank's share of a checkpoint's files with their checksums.

    Args:
        folder: the checkpoint's folder.
        rank: this rank; rank 0 also looks for files that are not listed.
        size: ranks that share the work.

    Returns:
        Problems as sentences that name the file; empty when the share is whole.

    Raises:
        CheckpointError: ``checksums.json`` itself is missing or damaged.
    """
    digests = read_checksums(folder)
    problems = []
    if rank == 0:
        # NFS keeps a file that was deleted while open under a name of its own for a while.
        found = {path.name for path in folder.iterdir() if not path.name.startswith(".nfs")}
        unlisted = sorted(found - {*digests, CHECKSUMS})
        problems = [f"{folder / name} is not listed in {CHECKSUMS}." for name in unlisted]
    for name in sorted(_share(digests, rank=rank, size=size), key=file_order):
        problem = _problem(folder / name, digests[name])
        if problem is not None:
            problems.append(problem)
    return problems


def file_order(name: str) -> list[int]:
    """Sorts files as they were written: ``__0_10.distcp`` after ``__0_9.distcp``."""
    return [int(digits) for digits in re.findall(r"[0-9]+", name)]


def was_completed(folder: Path) -> bool:
    """Whether a folder was written to its end: every listed file is there with its size.

    Args:
        folder: a checkpoint's folder, whatever its name; contents are not read.
    """
    try:
        digests = read_checksums(folder)
        return all(_has_size(folder / name, digests[name].bytes) for name in digests)
    except (CheckpointError, OSError):
        return False


def _has_size(path: Path, size: int) -> bool:
    return path.is_file() and path.stat().st_size == size


def _share(digests: Mapping[str, FileDigest], *, rank: int, size: int) -> list[str]:
    """The files of one rank: largest first, each to the rank with the fewest bytes so far."""
    loads = [0] * size
    share = []
    for name in sorted(digests, key=lambda name: (-digests[name].bytes, name)):
        owner = loads.index(min(loads))
        loads[owner] += digests[name].bytes
        if owner == rank:
            share.append(name)
    return share


def _problem(path: Path, expected: FileDigest) -> str | None:
    try:
        if not path.is_file():
            return f"{path} is missing."
        with path.open("rb") as stream:
            found = os.fstat(stream.fileno()).st_size
            if found != expected.bytes:
                return f"{path} has {found} bytes instead of {expected.bytes}."
            if _digest(stream) != expected:
                return f"{path} was changed: its SHA-256 is not that of the saved file."
    except OSError as error:
        return f"{path} cannot be read ({error.strerror or error})."
    return None


def _digest(stream: io.BufferedReader) -> FileDigest:
    digest = hashlib.file_digest(stream, "sha256").hexdigest()
    return FileDigest(bytes=stream.tell(), sha256=digest)


def _parse(record: Any) -> dict[str, FileDigest]:
    """The digests of a parsed file; ValueError for anything but our own format."""
    if not isinstance(record, dict) or record.get("format") != FORMAT or len(record) != 2:
        raise ValueError(f"not a list of checksums of format {FORMAT}")
    files = record.get("files")
    if not isinstance(files, dict):
        raise ValueError("no files")
    digests = {}
    for name, entry in files.items():
        size = entry.get("bytes") if isinstance(entry, dict) else None
        sha256 = entry.get("sha256") if isinstance(entry, dict) else None
        # bool is an int to Python, not to this format.
        if type(size) is not int or size < 0 or len(entry) != 2:
            raise ValueError(f"no size of '{name}'")
        if not isinstance(sha256, str) or not _SHA256.fullmatch(sha256):
            raise ValueError(f"no SHA-256 of '{name}'")
        digests[name] = FileDigest(bytes=size, sha256=sha256)
    return digests


def _refuse_escape(folder: Path, name: str) -> None:
    if name in ("", ".", "..", CHECKSUMS) or set(name) & set("/\\\0"):
        raise CheckpointError(
            f"{folder / CHECKSUMS} names {name!r}, which is not a plain file name; "
            "use another iter_* folder"
        )
    path = folder / name
    if path.resolve().parent != folder.resolve():
        raise CheckpointError(
            f"{path} is a link to {path.resolve()}, outside the checkpoint; copy the file into "
            "the folder or use another iter_* folder"
        )
