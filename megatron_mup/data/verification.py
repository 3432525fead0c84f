"""Verification: every byte of a shard is read, through megatron-core's own reader, and compared.

What is wrong is collected, not raised: one damaged shard must not hide the others. Shards are
checked in processes of their own. Imports megatron-core only where a shard is read.
"""

from __future__ import annotations

import dataclasses
import hashlib
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_mup.data.manifest import (
    JobManifest,
    ShardEntry,
    job_manifest_path,
    read_job_manifest,
    read_shard_manifest,
)
from megatron_mup.data.shard_sets import expand, job_shards, named_prefix
from megatron_mup.data.shards import (
    ShardIndex,
    ShardInfo,
    file_sha256,
    open_shard,
    read_index,
)
from megatron_mup.data.worker_pool import run_in_order
from megatron_mup.errors import DataError

# 8 to 32 MB at a time.
_PIECE_TOKENS = 1 << 22
_ALTERED = "is not the file that the manifest describes (SHA-256 differs); copy it again"


class DamagedShardsError(DataError):
    """Shards were read, and are not what they should be; the command itself was right."""

    exit_code: int = 1


@dataclass(frozen=True, kw_only=True)
class ShardReport:
    """What was found in one shard, or of one whole job."""

    name: str
    """The shard's prefix, or the path of the job's manifest."""

    documents: int
    """Documents read; 0 where reading was not possible."""

    tokens: int
    """Token ids read."""

    has_manifest: bool
    """Whether there was a manifest to compare with."""

    problems: tuple[str, ...]
    """What is wrong; empty for a good shard."""


@dataclass
class _Ids:
    """What reading all ids of a shard gives."""

    sha256: str = ""
    smallest: int = 0
    largest: int = 0
    unended_documents: int = 0
    first_unended: int | None = None

    def note_unended(self, documents: NDArray[np.integer]) -> None:
        """Count documents, by number, that do not end as they should."""
        self.unended_documents += len(documents)
        if self.first_unended is None and len(documents):
            self.first_unended = int(documents[0])


def verify(
    prefixes: Sequence[Path],
    *,
    tokenizer_sha256: str | None = None,
    workers: int = 1,
    report: Callable[[ShardReport], None] = lambda _report: None,
) -> list[ShardReport]:
    """Check shards, sets and whole jobs.

    Args:
        prefixes: Of shards or sets, or output prefixes of jobs, or one of their files.
        tokenizer_sha256: Digest of the tokenizer that all must be of; None leaves it unchecked.
        workers: Processes that read shards.
        report: Called with each result as soon as it and those before it are known.

    Returns:
        One report for each shard, and for each job one after its shards.

    Raises:
        DataError: Nothing has such a prefix, a job is not finished, a set has holes, a job's
            manifest cannot be read, or a shard was made with another tokenizer. Then nothing has
            been read yet.
    """
    prefixes = [named_prefix(prefix) for prefix in prefixes]
    plans = [_plan(prefix) for prefix in prefixes]
    shards = [shard for plan, _ in plans for shard in plan]
    if tokenizer_sha256 is not None:
        _check_tokenizers(shards, tokenizer_sha256)
    reports = []
    results = _reports(shards, workers)
    for prefix, (plan, job) in zip(prefixes, plans, strict=True):
        found = []
        for _ in plan:
            found.append(next(results))
            report(found[-1])
        if job is not None:
            found.append(_verify_job(prefix, job))
            report(found[-1])
        reports += found
    return reports


def _reports(shards: Sequence[Path], workers: int) -> Iterator[ShardReport]:
    workers = min(workers, len(shards))
    if workers > 1:
        return run_in_order(verify_shard, shards, workers=workers)
    return map(verify_shard, shards)


def _plan(prefix: Path) -> tuple[list[Path], JobManifest | None]:
    """The shards to read, and the manifest of a whole job."""
    path = job_manifest_path(prefix)
    if not path.is_file():
        return expand(prefix), None
    job = read_job_manifest(path)
    return [shard for shards in job_shards(prefix, job).values() for shard in shards], job


def _check_tokenizers(shards: Sequence[Path], sha256: str) -> None:
    """Compare the manifests with a tokenizer; raises DataError for another one."""
    others = [shard for shard in shards if _tokenizer_of(shard) not in (None, sha256)]
    if others:
        raise DataError(
            f"{len(others)} of {len(shards)} shards were made with another tokenizer than "
            f"--tokenizer-model (SHA-256 {sha256[:12]}...), first {others[0]} "
            f"({str(_tokenizer_of(others[0]))[:12]}...); pass the right file, or leave the option "
            "out"
        )


def _tokenizer_of(shard: Path) -> str | None:
    """Digest of a shard's tokenizer by its manifest; None without one that can be read."""
    path = Path(f"{shard}.json")
    try:
        return read_shard_manifest(path).tokenizer_sha256 if path.is_file() else None
    # Reading the shard finds it again, and reports it as damage.
    except DataError:
        return None


def verify_shard(prefix: Path) -> ShardReport:
    """Check one shard; see ``verify``.

    Args:
        prefix: The shard's name without .bin or .idx.
    """
    problems = []
    try:
        info = open_shard(prefix)
        index = read_index(Path(f"{prefix}.idx"))
        ends = info.manifest is not None and info.manifest.append_eod
        eod = info.manifest.eod if info.manifest and ends else None
        problems += _reader_problems(prefix, index)
        # A reader that sees other documents would read past the file's end.
        ids = _read_ids(prefix, index, eod) if not problems else None
    except (DataError, OSError) as error:
        has_manifest = Path(f"{prefix}.json").is_file()
        return ShardReport(
            name=str(prefix),
            documents=0,
            tokens=0,
            has_manifest=has_manifest,
            problems=(str(error),),
        )
    if ids is not None:
        problems += _id_problems(info, ids)
    return ShardReport(
        name=str(prefix),
        documents=info.documents,
        tokens=info.tokens,
        has_manifest=info.manifest is not None,
        problems=tuple(problems),
    )


def _dataset(prefix: Path) -> Any:
    """Megatron-core's reader; it reads files and does not map them."""
    from megatron_mup import platform

    platform.prepare()
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    return IndexedDataset(str(prefix), mmap=False)


def _reader_problems(prefix: Path, index: ShardIndex) -> list[str]:
    """Whether megatron-core sees the documents that the index lists."""
    reader = _dataset(prefix)
    problems = [
        f"{prefix}.idx: megatron-core reads other {what} than the file holds"
        for what, seen, held in (
            ("lengths", reader.index.sequence_lengths, index.lengths),
            ("pointers", reader.index.sequence_pointers, index.pointers),
            ("document boundaries", reader.document_indices, index.boundaries),
        )
        if not _equal(seen, held)
    ]
    if np.dtype(reader.index.dtype) != np.dtype(index.dtype):
        problems.append(f"{prefix}.idx: megatron-core reads {reader.index.dtype}")
    return problems


def _equal(left: NDArray[np.integer], right: NDArray[np.integer]) -> bool:
    if len(left) != len(right):
        return False
    step = _PIECE_TOKENS
    return all(
        np.array_equal(left[first : first + step], right[first : first + step])
        for first in range(0, len(left), step)
    )


def _read_ids(prefix: Path, index: ShardIndex, eod: int | None) -> _Ids:
    """Read every id through megatron-core, as many documents at a time as fit.

    Args:
        prefix: The shard.
        index: Its layout.
        eod: What each document must end with; None leaves the ends unchecked.
    """
    reader = _dataset(prefix)
    itemsize = np.dtype(index.dtype).itemsize
    digest, found = hashlib.sha256(), _Ids()
    start = document = 0
    for lengths in index.document_tokens():
        ends = start + np.cumsum(lengths)
        if eod is not None:
            found.note_unended(document + np.flatnonzero(lengths == 0))
        for first in range(start, int(ends[-1]), _PIECE_TOKENS):
            count = min(_PIECE_TOKENS, int(ends[-1]) - first)
            ids = reader.bin_reader.read(index.dtype, count, first * itemsize)
            digest.update(ids)
            found.smallest = min(found.smallest, int(ids.min()))
            found.largest = max(found.largest, int(ids.max()))
            if eod is not None:
                # Documents whose last id lies in this piece.
                low, high = np.searchsorted(ends, [first, first + count], side="right")
                inside = low + np.flatnonzero(lengths[low:high])
                found.note_unended(document + inside[ids[ends[inside] - 1 - first] != eod])
        start, document = int(ends[-1]), document + len(lengths)
    found.sha256 = digest.hexdigest()
    return found


def _id_problems(info: ShardInfo, ids: _Ids) -> list[str]:
    problems = []
    if ids.smallest < 0:
        problems.append(f"{info.prefix}.bin: holds the negative token id {ids.smallest}")
    manifest = info.manifest
    if manifest is None:
        return problems
    if ids.sha256 != manifest.bin_sha256:
        problems.append(f"{info.prefix}.bin: {_ALTERED}")
    if file_sha256(Path(f"{info.prefix}.idx")) != manifest.idx_sha256:
        problems.append(f"{info.prefix}.idx: {_ALTERED}")
    if ids.largest >= manifest.vocab_size:
        problems.append(
            f"{info.prefix}.bin: holds token id {ids.largest}, the tokenizer has "
            f"{manifest.vocab_size} ids"
        )
    if ids.largest != manifest.largest_token_id:
        problems.append(
            f"{info.prefix}.json: says that the largest token id is "
            f"{manifest.largest_token_id}, the .bin holds {ids.largest}"
        )
    if ids.unended_documents:
        problems.append(
            f"{info.prefix}: {ids.unended_documents} documents do not end with id {manifest.eod}, "
            f"the first is number {ids.first_unended} from 0"
        )
    return problems


def _verify_job(prefix: Path, job: JobManifest) -> ShardReport:
    """Compare a job's manifest with the shards' own, and with what lies beside it."""
    problems = []
    shards = job_shards(prefix, job)
    for split, entries in job.splits.items():
        for shard, entry in zip(shards[split], entries, strict=True):
            problems += _entry_problems(shard, entry, job)
    known = {entry.name for entries in job.splits.values() for entry in entries}
    pattern = re.compile(rf"{re.escape(prefix.name)}(_(train|valid|test))?(-\d{{5,}}-of-\d{{5,}})?")
    present = {path.stem for path in prefix.parent.iterdir() if path.suffix in (".bin", ".idx")}
    problems += [
        f"{prefix.with_name(name)}: is not in {job_manifest_path(prefix).name}: it is left from "
        "another run; delete it"
        for name in sorted(present - known)
        if pattern.fullmatch(name)
    ]
    entries = [entry for parts in job.splits.values() for entry in parts]
    return ShardReport(
        name=str(job_manifest_path(prefix)),
        documents=sum(entry.documents for entry in entries),
        tokens=sum(entry.tokens for entry in entries),
        has_manifest=True,
        problems=tuple(problems),
    )


def _entry_problems(shard: Path, entry: ShardEntry, job: JobManifest) -> list[str]:
    try:
        manifest = read_shard_manifest(Path(f"{shard}.json"))
    except DataError as error:
        return [str(error)]
    of_shard = dataclasses.asdict(manifest)
    expected = dataclasses.asdict(entry) | {
        "tokenizer_sha256": job.tokenizer_sha256,
        "vocab_size": job.vocab_size,
        "eod": job.eod,
    }
    return [
        f"{shard}.json: {name} is {of_shard[name]}, the job's manifest says {value}"
        for name, value in expected.items()
        if name != "name" and of_shard[name] != value
    ]
