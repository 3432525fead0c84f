"""Publication of a whole set of shards: all of them under their final names, or none readable.

Owns the final names, and the rule of when an older set goes. When every shard is whole, the job's
manifest is written into the work folder: from then on the set is decided, and a run that is killed
is continued by moving what has not been moved. At no instant can a shard of an older set be opened
beside a new one, for the two could hold the same documents.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

from megatron_mup.data.manifest import (
    JobManifest,
    ShardEntry,
    job_manifest_path,
    manifest_text,
    read_job_manifest,
)
from megatron_mup.data.publication import publish_text, sync_folder
from megatron_mup.errors import DataError

SHARD_SUFFIXES = (".bin", ".json", ".idx")
"""A shard's files in the order of their publication: without its .idx it cannot be opened."""


def shard_name(output_prefix: Path, split: str | None, number: int, count: int | None) -> str:
    """Return a shard's file name without .bin or .idx.

    Args:
        output_prefix: What the user named.
        split: The split's name; None where there is only one.
        number: The shard's number from 0.
        count: How many shards the split has; None without a shard size.
    """
    stem = output_prefix.name if split is None else f"{output_prefix.name}_{split}"
    return stem if count is None else f"{stem}-{number:05d}-of-{count:05d}"


def existing_outputs(output_prefix: Path) -> list[Path]:
    """Find what a job with this prefix, of any number of shards, has published.

    Args:
        output_prefix: What the user named.

    Returns:
        The shards' files and the job's manifest, sorted; broken links count.
    """
    name = re.escape(output_prefix.name)
    shard = re.compile(rf"{name}(_train|_valid|_test)?(-\d{{5}}-of-\d{{5}})?\.(bin|idx|json)")
    folder = output_prefix.parent
    names = os.listdir(folder) if folder.is_dir() else []
    manifest = job_manifest_path(output_prefix).name
    return [
        folder / found for found in sorted(names) if shard.fullmatch(found) or found == manifest
    ]


def refuse_inputs_as_outputs(output_prefix: Path, inputs: Sequence[str]) -> None:
    """Refuse a prefix under which publishing would replace an input.

    Args:
        output_prefix: What the user named.
        inputs: The input files.

    Raises:
        DataError: An input, say PREFIX.json, has the name of an output.
    """
    outputs = {os.path.realpath(path) for path in existing_outputs(output_prefix)}
    # Resolving a million names takes seconds, and mostly there is nothing to compare with.
    taken = [name for name in inputs if os.path.realpath(name) in outputs] if outputs else []
    if taken:
        raise DataError(
            f"the input {taken[0]} has the name of an output of --output-prefix {output_prefix}; "
            "pass another --output-prefix"
        )


def begun_publication(work: Path) -> JobManifest | None:
    """Return the manifest of a set that is whole and perhaps published in part.

    Args:
        work: The job's work folder.

    Returns:
        None if the publication has not begun.

    Raises:
        DataError: The record is damaged.
    """
    record = _record(work)
    return read_job_manifest(record) if record.is_file() else None


def begin_publication(work: Path, manifest: JobManifest) -> None:
    """Decide that the shards in ``work / "shards"`` are the whole set.

    Args:
        work: The job's work folder.
        manifest: The set.
    """
    publish_text(_record(work), manifest_text(manifest))


def publish_shards(work: Path, output_prefix: Path, manifest: JobManifest) -> None:
    """Move a whole set of shards to its final names; the job's manifest comes last.

    What an older job published under the prefix is removed. Nothing is done twice: a set that was
    published in part is completed.

    Args:
        work: The job's work folder, where ``begin_publication`` was called.
        output_prefix: What the user named.
        manifest: The set.

    Raises:
        DataError: A shard is missing.
        OSError: A file cannot be moved or removed.
    """
    made, folder, record = work / "shards", output_prefix.parent, job_manifest_path(output_prefix)
    entries = [entry for part in manifest.splits.values() for entry in part]
    # The .idx moves last: where it is gone, the whole shard has its final name.
    pending = [entry.name for entry in entries if (made / f"{entry.name}.idx").exists()]
    for entry in entries:
        _check_present(entry, made, folder, moved=entry.name not in pending)
    wanted = {f"{entry.name}{suffix}" for entry in entries for suffix in SHARD_SUFFIXES}
    if not pending:
        wanted.add(record.name)
    # First what makes old shards readable: the old manifest and each .idx, also of the shards that
    # are about to be replaced.
    old = [path for path in existing_outputs(output_prefix) if path.name not in wanted]
    old += [folder / f"{name}.idx" for name in pending]
    for path in sorted(old, key=lambda path: (path.name != record.name, path.suffix != ".idx")):
        path.unlink(missing_ok=True)
    sync_folder(folder)
    for name in pending:
        for suffix in SHARD_SUFFIXES:
            if (made / f"{name}{suffix}").exists():
                os.replace(made / f"{name}{suffix}", folder / f"{name}{suffix}")
    sync_folder(folder)
    publish_text(record, manifest_text(manifest))


def _record(work: Path) -> Path:
    return work / "publication.json"


def _check_present(entry: ShardEntry, made: Path, folder: Path, *, moved: bool) -> None:
    for suffix in SHARD_SUFFIXES:
        name = f"{entry.name}{suffix}"
        place = folder / name if moved or not (made / name).exists() else made / name
        size = place.stat().st_size if place.is_file() else None
        if size is None or (suffix == ".bin" and size != entry.bin_bytes):
            raise DataError(
                f"{place}: missing or not the one that was made; pass --overwrite after deleting "
                f"the work folder {made.parent} to make the shards again"
            )
