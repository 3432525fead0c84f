"""Token shards: the ``.bin``/``.idx`` format of megatron-core, its manifest, and their checks.

A shard is named by its prefix P: ``P.bin`` holds the token ids of all documents end to end,
``P.idx`` the layout, and ``P.json`` (the manifest, ours; absent for shards made elsewhere) says
what the shard was made of. Everything is little-endian:

    .idx = magic (9 bytes), version u64 = 1, dtype code u8, sequences n u64, boundaries d u64,
           lengths i32[n] in tokens, pointers i64[n] in bytes, document boundaries i64[d]

with d = documents + 1. Source: megatron-core 0.19.2, ``core/datasets/indexed_dataset.py``.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from megatron_mup.data.manifest import ShardManifest, job_manifest_path, read_shard_manifest
from megatron_mup.errors import DataError

INDEX_MAGIC = b"MMIDIDX\x00\x00"
INDEX_HEADER = struct.Struct("<9sQBQQ")
DTYPE_CODES = {1: "uint8", 2: "int8", 3: "int16", 4: "int32", 5: "int64", 8: "uint16"}
"""Megatron's codes of the integer types; 6 and 7 are floats, which hold no token ids."""

# 8 to 32 MB at a time.
_CHUNK_TOKENS = 1 << 22
_CHUNK_SEQUENCES = 1 << 20
_REMAKE = "make the shard again with `megatron-mup data preprocess --overwrite`"


@dataclass(frozen=True, kw_only=True)
class ShardInfo:
    """A shard that ``open_shard`` found whole."""

    prefix: Path
    """The shard's name without .bin or .idx."""

    documents: int
    """Number of documents."""

    tokens: int
    """Number of token ids."""

    dtype: str
    """NumPy's name of the ids' type."""

    manifest: ShardManifest | None
    """The shard's record; None for a shard made elsewhere."""


@dataclass(frozen=True)
class ShardIndex:
    """The contents of an .idx file, mapped into memory and found consistent."""

    dtype: str
    """NumPy's name of the ids' type."""

    lengths: NDArray[np.int32]
    """Tokens of each sequence."""

    pointers: NDArray[np.int64]
    """Byte offset of each sequence in the .bin file."""

    boundaries: NDArray[np.int64]
    """Number of each document's first sequence, and the number of sequences."""

    @property
    def documents(self) -> int:
        """Number of documents."""
        return len(self.boundaries) - 1

    @property
    def tokens(self) -> int:
        """Number of token ids."""
        return int(self.lengths.sum(dtype=np.int64))

    def document_tokens(self) -> Iterator[NDArray[np.int64]]:
        """Yield the lengths of all documents in tokens, a million documents at a time."""
        for first in range(0, self.documents, _CHUNK_SEQUENCES):
            # A document may be several sequences (--split-sentences).
            bounds = self.boundaries[first : first + _CHUNK_SEQUENCES + 1]
            lengths = self.lengths[bounds[0] : bounds[-1]]
            ends = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
            yield np.diff(ends[bounds - bounds[0]])


def open_shard(prefix: Path, *, vocab_size: int | None = None) -> ShardInfo:
    """Check that a shard is whole and that a model can embed its ids.

    Args:
        prefix: The shard's name without .bin or .idx.
        vocab_size: Rows of the model's embedding; None leaves the ids unchecked. The largest id
            is taken from the manifest; a shard without one is read through.

    Returns:
        The shard's facts.

    Raises:
        DataError: A file is missing, damaged or truncated, the two or the manifest disagree, the
            shard is empty, or it holds an id outside [0, vocab_size).
    """
    bin_path = existing_file(prefix, ".bin")
    index = read_index(existing_file(prefix, ".idx"))
    _check_size(bin_path, index)
    manifest = _manifest(prefix)
    tokens = index.tokens
    if manifest is not None:
        _check_same_run(prefix, manifest, (index.documents, tokens, index.dtype))
    if vocab_size is not None:
        # Reading a large shard through takes minutes at every start; the manifest takes none.
        largest = manifest.largest_token_id if manifest else largest_id(prefix, index.dtype)
        if largest >= vocab_size:
            raise DataError(
                f"{bin_path}: holds token id {largest}, the model's vocab_size is {vocab_size} "
                "(ids 0 to vocab_size - 1); set model.vocab_size to the tokenizer's size or "
                "preprocess with the model's tokenizer"
            )
    return ShardInfo(
        prefix=prefix,
        documents=index.documents,
        tokens=tokens,
        dtype=index.dtype,
        manifest=manifest,
    )


def _check_same_run(prefix: Path, manifest: ShardManifest, found: tuple[int, int, str]) -> None:
    if (manifest.documents, manifest.tokens, manifest.dtype) != found:
        documents, tokens, dtype = found
        raise DataError(
            f"{prefix}.json: describes {manifest.tokens} tokens of {manifest.dtype} in "
            f"{manifest.documents} documents, its .idx {tokens} of {dtype} in {documents}: the "
            f"files are of different runs; {_REMAKE}"
        )


def check_tokenizer(shard: ShardInfo, sha256: str) -> None:
    """Refuse a shard of another tokenizer.

    Args:
        shard: The shard; one without a manifest is not refused.
        sha256: Hex digest of the tokenizer's model file.

    Raises:
        DataError: The manifest names another tokenizer.
    """
    if shard.manifest and shard.manifest.tokenizer_sha256 != sha256:
        raise DataError(
            f"{shard.prefix}: made with the tokenizer {shard.manifest.tokenizer_sha256[:12]}..., "
            f"not with {sha256[:12]}... (SHA-256); pass the right --tokenizer-model"
        )


def token_count(prefix: Path) -> int:
    """Number of ids of a shard by the size of its .bin file; nothing else is read.

    Raises:
        DataError: A file is missing, or the .idx file does not begin as one.
    """
    bin_path = existing_file(prefix, ".bin")
    dtype, _, _ = _read_header(existing_file(prefix, ".idx"))
    return bin_path.stat().st_size // np.dtype(dtype).itemsize


def check_one_tokenizer(shards: Iterable[ShardInfo]) -> None:
    """Refuse shards that were made with different tokenizers.

    Args:
        shards: Shards of one run; those without a manifest cannot tell.

    Raises:
        DataError: Two of them differ.
    """
    first: ShardInfo | None = None
    for shard in shards:
        if shard.manifest is None:
            continue
        first = first or shard
        if first.manifest and shard.manifest.tokenizer_sha256 != first.manifest.tokenizer_sha256:
            raise DataError(
                f"{first.prefix} and {shard.prefix} were made with different tokenizers "
                f"({first.manifest.tokenizer_sha256[:12]}... and "
                f"{shard.manifest.tokenizer_sha256[:12]}..., SHA-256); preprocess both with one "
                "--tokenizer-model"
            )


def unigram_entropy(train_prefix: Path, valid_prefix: Path, vocab_size: int) -> float:
    """Return the loss of the best possible predictor that ignores context.

    It is the entropy of the held-out tokens under their own empirical unigram distribution,
    H = -sum_v p_v ln p_v with p_v the share of id v in ``valid_prefix``, end-of-document tokens
    included. The cross-entropy under the training tokens' distribution is never smaller (Gibbs),
    so a model below H has certainly learned more than token frequencies.

    Args:
        train_prefix: The training shard; only checked, to be of the same tokenizer.
        valid_prefix: The held-out shard.
        vocab_size: Rows of the model's embedding; all ids of both shards are below it.

    Returns:
        The entropy in nats a token.

    Raises:
        DataError: As ``open_shard`` for either shard, or their tokenizers differ.
    """
    valid = open_shard(valid_prefix, vocab_size=vocab_size)
    check_one_tokenizer([open_shard(train_prefix, vocab_size=vocab_size), valid])
    # bincount would allocate up to the largest id, and the manifest may lie about it.
    largest_id(valid_prefix, valid.dtype, valid.manifest)
    counts = np.zeros(vocab_size, dtype=np.int64)
    # Counts and not probabilities are summed: the result is exact whatever the chunks.
    for chunk in read_chunks(valid_prefix, valid.dtype):
        counts += np.bincount(chunk, minlength=vocab_size)
    shares = counts[counts > 0] / counts.sum()
    return float(-(shares * np.log(shares)).sum())


def existing_file(prefix: Path, suffix: str) -> Path:
    """Name of a shard's .bin or .idx file.

    Raises:
        DataError: There is no such file.
    """
    path = Path(f"{prefix}{suffix}")
    if path.is_file():
        return path
    # A relative path means another file in every folder.
    missing = f"no file {path}" + ("" if path.is_absolute() else f" ({path.absolute()})")
    # The commonest slips: a shell completes the file's name; the job is named for its split.
    if prefix.suffix in (".bin", ".idx"):
        raise DataError(f"{missing}; pass the prefix without {prefix.suffix}")
    if job_manifest_path(prefix).is_file():
        raise DataError(
            f"{missing}: {prefix} is the output prefix of a whole job; name one of its "
            f"splits, e.g. {prefix}_train"
        )
    raise DataError(
        f"{missing}; correct the shard's prefix, or make it with `megatron-mup data preprocess`"
    )


def _check_size(bin_path: Path, index: ShardIndex) -> None:
    expected = index.tokens * np.dtype(index.dtype).itemsize
    found = bin_path.stat().st_size
    # Megatron maps the file without looking and would fail, or read past it, in mid-training.
    if found != expected:
        raise DataError(
            f"{bin_path}: expected {expected} bytes ({index.tokens} tokens of {index.dtype} by "
            f"its .idx), found {found}; copy it again or {_REMAKE}"
        )
    if found == 0:
        raise DataError(f"{bin_path}: the shard holds no token; {_REMAKE} from non-empty text")


def read_index(path: Path) -> ShardIndex:
    """Read an .idx file and check it against itself.

    Args:
        path: The file.

    Raises:
        DataError: It is no index, is cut, or contradicts itself.
    """
    dtype, sequences, boundary_count = _read_header(path)
    size = path.stat().st_size
    expected = INDEX_HEADER.size + 12 * sequences + 8 * boundary_count
    if size != expected:
        raise DataError(
            f"{path}: expected {expected} bytes ({sequences} sequences, {boundary_count} "
            f"document boundaries), found {size}; copy it again or {_REMAKE}"
        )
    # Mapped, not read: the index of a large corpus has gigabytes.
    raw = np.memmap(path, dtype=np.uint8, mode="r")[INDEX_HEADER.size :]
    index = ShardIndex(
        dtype,
        lengths=raw[: 4 * sequences].view("<i4"),
        pointers=raw[4 * sequences : 12 * sequences].view("<i8"),
        boundaries=raw[12 * sequences :].view("<i8"),
    )
    if not (_lengths_agree(index) and _boundaries_agree(index)):
        raise DataError(
            f"{path}: lengths, pointers and document boundaries contradict each other; {_REMAKE}"
        )
    return index


def _read_header(path: Path) -> tuple[str, int, int]:
    """The ids' type, the number of sequences and the number of document boundaries."""
    with path.open("rb") as stream:
        header = stream.read(INDEX_HEADER.size)
    if len(header) < INDEX_HEADER.size or not header.startswith(INDEX_MAGIC):
        raise DataError(
            f"{path}: expected {INDEX_HEADER.size} header bytes starting with {INDEX_MAGIC!r}, "
            f"found {header[:9]!r} in a file of {path.stat().st_size} bytes: not an index; "
            f"{_REMAKE}"
        )
    _, version, code, sequences, boundary_count = INDEX_HEADER.unpack(header)
    if version != 1 or code not in DTYPE_CODES:
        raise DataError(
            f"{path}: format version {version} and dtype code {code}; expected version 1 and one "
            f"of {sorted(DTYPE_CODES)} (integers); {_REMAKE}"
        )
    return DTYPE_CODES[code], sequences, boundary_count


def _lengths_agree(index: ShardIndex) -> bool:
    """Whether each sequence begins where the one before it ends."""
    itemsize = np.dtype(index.dtype).itemsize
    end = 0
    for first in range(0, len(index.lengths), _CHUNK_SEQUENCES):
        lengths = index.lengths[first : first + _CHUNK_SEQUENCES]
        pointers = index.pointers[first : first + _CHUNK_SEQUENCES]
        # int64: a sum of int32 lengths overflows at 2^31 tokens.
        ends = end + np.cumsum(lengths, dtype=np.int64) * itemsize
        if (lengths < 0).any() or pointers[0] != end or (pointers[1:] != ends[:-1]).any():
            return False
        end = int(ends[-1])
    return True


def _boundaries_agree(index: ShardIndex) -> bool:
    """Whether the documents divide the sequences."""
    bounds = index.boundaries
    if not len(bounds) or bounds[0] != 0 or bounds[-1] != len(index.lengths):
        return False
    return all(
        # One boundary is shared, so that the step between two pieces is looked at as well.
        bool((np.diff(bounds[first : first + _CHUNK_SEQUENCES + 1]) >= 0).all())
        for first in range(0, len(bounds), _CHUNK_SEQUENCES)
    )


def file_sha256(path: Path) -> str:
    """Hex digest of a file, read in pieces."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def read_chunks(prefix: Path, dtype: str) -> Iterator[NDArray[np.integer]]:
    """Yield a shard's ids in pieces of at most 4 Mi, each read into memory of its own.

    Args:
        prefix: The shard's name without .bin or .idx.
        dtype: NumPy's name of the ids' type.
    """
    # Read, not mapped: pages of a mapping stay with the process until memory is short.
    with Path(f"{prefix}.bin").open("rb") as stream:
        while True:
            chunk = np.fromfile(stream, np.dtype(dtype).newbyteorder("<"), _CHUNK_TOKENS)
            if not len(chunk):
                return
            yield chunk


def _manifest(prefix: Path) -> ShardManifest | None:
    path = Path(f"{prefix}.json")
    return read_shard_manifest(path) if path.is_file() else None


def largest_id(prefix: Path, dtype: str, manifest: ShardManifest | None = None) -> int:
    """Read the largest id of a shard.

    Args:
        prefix: The shard's name without .bin or .idx.
        dtype: NumPy's name of the ids' type.
        manifest: What must agree; None where there is none.

    Raises:
        DataError: An id is negative, or the manifest says otherwise.
    """
    extremes = [(int(chunk.min()), int(chunk.max())) for chunk in read_chunks(prefix, dtype)]
    smallest, largest = min(low for low, _ in extremes), max(high for _, high in extremes)
    if smallest < 0:
        raise DataError(f"{prefix}.bin: holds the negative token id {smallest}; {_REMAKE}")
    if manifest and manifest.largest_token_id != largest:
        raise DataError(
            f"{prefix}.json: says that the largest token id is {manifest.largest_token_id}, the "
            f".bin holds {largest}; {_REMAKE}"
        )
    return largest
