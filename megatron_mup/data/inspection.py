"""What shards hold: counts, lengths, decoded samples, and whether the manifests describe them.

Every byte of a shard is read once, a piece at a time: memory does not grow with the corpus. Finding
out what exactly is wrong with damaged shards is ``verification``'s. Must not import torch.
"""

from __future__ import annotations

import hashlib
import random
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from megatron_mup.data.manifest import JobManifest, job_manifest_path, read_job_manifest
from megatron_mup.data.shard_sets import expand, job_shards, named_prefix
from megatron_mup.data.shards import (
    ShardInfo,
    check_tokenizer,
    file_sha256,
    open_shard,
    read_chunks,
    read_index,
)
from megatron_mup.data.tokenizer import Tokenizer
from megatron_mup.errors import DataError

_SAMPLE_TOKENS = 64
# A document of 2^31 tokens or more does not fit the format: lengths are 32-bit.
_BINS = 64


@dataclass(frozen=True, kw_only=True)
class LengthBin:
    """Documents of similar length."""

    shortest_tokens: int
    """Smallest length that counts here: a power of two, or 0 for empty documents."""

    longest_tokens: int
    """Largest length that counts here."""

    documents: int
    """Documents of such a length."""

    tokens: int
    """Token ids of these documents together."""


@dataclass(frozen=True, kw_only=True)
class SplitSummary:
    """A part of the documents, by hash; a shard or set that is no whole job is one split."""

    name: str
    """"train", "valid" or "test"; the prefix for what is no whole job."""

    shards: int
    """Shards of the split."""

    documents: int
    """Documents of the split."""

    tokens: int
    """Token ids of the split."""


@dataclass(frozen=True, kw_only=True)
class Sample:
    """The beginning of one document, decoded."""

    shard: str
    """Prefix of the shard."""

    document: int
    """Number of the document in it, from 0."""

    tokens: int
    """Length of the whole document in tokens."""

    text: str
    """Its first 64 tokens as text."""


@dataclass(frozen=True, kw_only=True)
class Inspection:
    """What ``inspect_prefix`` found."""

    prefix: str
    """The name that was inspected."""

    shards: int
    """Number of shards."""

    documents: int
    """Number of documents."""

    tokens: int
    """Number of token ids."""

    text_bytes: int | None
    """UTF-8 bytes of the text; None if a shard has no manifest."""

    mean_document_tokens: float
    """Mean length of a document in tokens."""

    min_document_tokens: int
    """Length of the shortest document in tokens."""

    max_document_tokens: int
    """Length of the longest document in tokens."""

    dtype: str
    """NumPy's name of the ids' type; several are joined by a comma."""

    largest_token_id: int
    """The largest id that occurs."""

    histogram: list[LengthBin]
    """Lengths of the documents by powers of two."""

    splits: list[SplitSummary]
    """Documents of each split."""

    manifest_matches: bool | None
    """Whether all digests are those of the manifests; None if a shard has no manifest."""

    altered_files: list[str]
    """Files that are not those that their manifests describe."""

    job: JobManifest | None
    """Options, inputs, skipped documents of the whole job; None for a shard or set alone."""

    samples: list[Sample]
    """Decoded documents; empty without a tokenizer."""


@dataclass
class _Totals:
    """Sums over the shards read so far."""

    infos: list[ShardInfo] = field(default_factory=list)
    bin_documents: NDArray[np.int64] = field(default_factory=lambda: np.zeros(_BINS, np.int64))
    bin_tokens: NDArray[np.int64] = field(default_factory=lambda: np.zeros(_BINS, np.int64))
    shortest: int = 1 << 62
    longest: int = 0
    largest_id: int = 0
    altered: list[str] = field(default_factory=list)

    def add(self, info: ShardInfo) -> None:
        """Read a whole shard."""
        self.infos.append(info)
        for lengths in read_index(Path(f"{info.prefix}.idx")).document_tokens():
            # The binary exponent of a length: 0 for 0, k for [2^(k - 1), 2^k).
            exponents = np.frexp(lengths.astype(np.float64))[1]
            self.bin_documents += np.bincount(exponents, minlength=_BINS)
            sums = np.bincount(exponents, weights=lengths, minlength=_BINS)
            self.bin_tokens += sums.astype(np.int64)
            self.shortest = min(self.shortest, int(lengths.min()))
            self.longest = max(self.longest, int(lengths.max()))
        digest = hashlib.sha256()
        largest = 0
        for chunk in read_chunks(info.prefix, info.dtype):
            digest.update(chunk)
            largest = max(largest, int(chunk.max()))
        self.largest_id = max(self.largest_id, largest)
        manifest = info.manifest
        if manifest is None:
            return
        if (digest.hexdigest(), largest) != (manifest.bin_sha256, manifest.largest_token_id):
            self.altered.append(f"{info.prefix}.bin")
        if file_sha256(Path(f"{info.prefix}.idx")) != manifest.idx_sha256:
            self.altered.append(f"{info.prefix}.idx")

    def histogram(self) -> list[LengthBin]:
        """The bins from the first to the last that is not empty."""
        used = np.flatnonzero(self.bin_documents)
        return [
            LengthBin(
                shortest_tokens=(1 << number) >> 1,
                longest_tokens=(1 << number) - 1,
                documents=int(self.bin_documents[number]),
                tokens=int(self.bin_tokens[number]),
            )
            for number in range(used[0], used[-1] + 1)
        ]


def inspect_prefix(
    prefix: Path, *, tokenizer: Tokenizer | None = None, samples: int = 0, seed: int = 0
) -> Inspection:
    """Read a shard, a set or the output of a whole job and summarize it.

    Args:
        prefix: Of a shard or set, or the output prefix of a job, or one of their files.
        tokenizer: Decodes the samples; its vocabulary must hold every id.
        samples: Documents to decode, drawn without repetition.
        seed: Of the drawing.

    Returns:
        The summary.

    Raises:
        DataError: As ``named_prefix`` and ``open_shard``, or a shard was made with another
            tokenizer.
    """
    prefix = named_prefix(prefix)
    path = job_manifest_path(prefix)
    job = read_job_manifest(path) if path.is_file() else None
    splits = job_shards(prefix, job) if job else {str(prefix): expand(prefix)}
    totals, summaries = _Totals(), []
    for name, shards in splits.items():
        infos = [_opened(shard, tokenizer) for shard in shards]
        for info in infos:
            totals.add(info)
        documents = sum(info.documents for info in infos)
        tokens = sum(info.tokens for info in infos)
        summaries.append(
            SplitSummary(name=name, shards=len(infos), documents=documents, tokens=tokens)
        )
    if not totals.infos:
        raise DataError(f"{path}: names no shard; preprocess text that is not empty")
    drawn = _draw(totals.infos, tokenizer, samples, seed) if tokenizer else []
    return _inspection(prefix, totals, summaries, job=job, samples=drawn)


def _inspection(
    prefix: Path,
    totals: _Totals,
    splits: list[SplitSummary],
    *,
    job: JobManifest | None,
    samples: list[Sample],
) -> Inspection:
    manifests = [info.manifest for info in totals.infos]
    described = [manifest for manifest in manifests if manifest is not None]
    complete = len(described) == len(manifests)
    documents = sum(info.documents for info in totals.infos)
    tokens = sum(info.tokens for info in totals.infos)
    return Inspection(
        prefix=str(prefix),
        shards=len(totals.infos),
        documents=documents,
        tokens=tokens,
        text_bytes=sum(manifest.text_bytes for manifest in described) if complete else None,
        mean_document_tokens=tokens / documents,
        min_document_tokens=totals.shortest,
        max_document_tokens=totals.longest,
        dtype=", ".join(sorted({info.dtype for info in totals.infos})),
        largest_token_id=totals.largest_id,
        histogram=totals.histogram(),
        splits=splits,
        manifest_matches=False if totals.altered else True if complete else None,
        altered_files=totals.altered,
        job=job,
        samples=samples,
    )


def _opened(shard: Path, tokenizer: Tokenizer | None) -> ShardInfo:
    info = open_shard(shard)
    if tokenizer is None:
        return info
    # First: of another tokenizer, ids outside the vocabulary are only a consequence.
    check_tokenizer(info, tokenizer.sha256)
    return open_shard(shard, vocab_size=tokenizer.vocab_size)


def _draw(infos: list[ShardInfo], tokenizer: Tokenizer, count: int, seed: int) -> list[Sample]:
    """Documents drawn from all shards, in the order of the corpus."""
    total = sum(info.documents for info in infos)
    numbers = sorted(random.Random(seed).sample(range(total), min(count, total)))
    drawn, first = [], 0
    for info in infos:
        inside = [number - first for number in numbers if first <= number < first + info.documents]
        first += info.documents
        drawn += [_sample(info, number, tokenizer) for number in inside]
    return drawn


def _sample(info: ShardInfo, document: int, tokenizer: Tokenizer) -> Sample:
    index = read_index(Path(f"{info.prefix}.idx"))
    begin, end = index.boundaries[document : document + 2].tolist()
    tokens = int(index.lengths[begin:end].sum(dtype=np.int64))
    ids: NDArray[np.integer] = np.fromfile(
        f"{info.prefix}.bin",
        np.dtype(info.dtype).newbyteorder("<"),
        count=min(tokens, _SAMPLE_TOKENS),
        # A document without tokens at the end of the shard has no pointer.
        offset=int(index.pointers[begin]) if tokens else 0,
    )
    text = tokenizer.decode(ids.tolist())
    return Sample(shard=str(info.prefix), document=document, tokens=tokens, text=text)
