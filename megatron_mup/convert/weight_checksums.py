"""Whether the weight files of an export are those that were written, by their SHA-256.

``huggingface_target`` lists it in ``checksums.json``, in the form of a checkpoint's own
(``checkpoint.integrity``), for weight files and their index alone: whoever publishes a model may
edit its card and its configuration. Which tensors of a changed file are other ones is told by a
list of their CRC-32. Must not import torch before a file has changed.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from megatron_mup.checkpoint.integrity import (
    CHECKSUMS,
    FileDigest,
    digest_files,
    read_checksums,
)
from megatron_mup.errors import CheckpointError

TENSOR_CHECKSUMS = "tensor_checksums.json"
"""CRC-32 of each tensor's bytes, by its name in the files."""


def has_checksums(folder: Path) -> bool:
    """Whether an export lists the SHA-256 of its weights."""
    return (folder / CHECKSUMS).is_file()


def write_tensor_checksums(folder: Path, sums: Mapping[str, int]) -> None:
    """List the CRC-32 of each tensor of an export, by its name."""
    text = json.dumps({"format": 1, "crc32": dict(sums)}, indent=2, sort_keys=True)
    (folder / TENSOR_CHECKSUMS).write_text(text + "\n", encoding="utf-8")


def changed_weights(folder: Path) -> list[str]:
    """Compare the weight files of an export with their checksums; reads all of them.

    Returns:
        Problems as sentences that name the file; empty when all are as they were written.

    Raises:
        CheckpointError: the list cannot be read, or names a file outside the folder.
    """
    problems = []
    for name, expected in _listed(folder).items():
        path = folder / name
        try:
            size = path.stat().st_size
            if size != expected.bytes:
                problems.append(f"{path} has {size} bytes instead of {expected.bytes}.")
            elif _digest(folder, name) != expected:
                problem = f"{path} was changed: its SHA-256 is not that of the export."
                problems.append(problem + _changed_tensors(path))
        except OSError as error:
            problems.append(f"{path} cannot be read ({error.strerror or error}).")
    return problems


def refuse_changed_weights(folder: Path) -> None:
    """Refuse an export whose weight files are not those that were written.

    Raises:
        CheckpointError: names each file.
    """
    problems = changed_weights(folder)
    if problems:
        listed = "\n  ".join(problems)
        raise CheckpointError(
            f"the weights of {folder} are not those that were exported:\n  {listed}\nfetch or "
            f"export them again; if they were changed on purpose, remove {CHECKSUMS} or pass "
            "--no-check"
        )


def _changed_tensors(path: Path) -> str:
    """The tensors of a changed file that are other ones; empty where nothing tells."""
    from megatron_mup.convert.huggingface_folder import several
    from megatron_mup.convert.safetensors_shards import SafetensorsFile

    try:
        sums = json.loads((path.parent / TENSOR_CHECKSUMS).read_bytes())["crc32"]
        file = SafetensorsFile(path)
        changed = [name for name in file.tensors if file.checksum(name) != sums.get(name)]
    # An older export has no list, and the index and a damaged header no tensors.
    except (OSError, ValueError, LookupError, TypeError, AttributeError, CheckpointError):
        return ""
    return f" Changed in it: {several(changed)}." if changed else ""


def _listed(folder: Path) -> dict[str, FileDigest]:
    try:
        return read_checksums(folder)
    except CheckpointError as error:
        # Its own advice is about checkpoints of a run.
        raise CheckpointError(
            f"{folder / CHECKSUMS} cannot be used; fetch or export the folder again, or pass "
            "--no-check"
        ) from error


def _digest(folder: Path, name: str) -> FileDigest:
    return digest_files(folder, [name])[name]
