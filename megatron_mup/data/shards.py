"""Token shards: the ``.bin``/``.idx`` format of megatron-core, its manifest, and their checks.

A shard is named by its prefix P: ``P.bin`` holds the token ids of all documents end to end,
``P.idx`` the layout, and ``P.json`` (the manifest, ours; absent for shards made elsewhere) says
what the shard was made of. Everything is little-endian:

    .idx = magic (9 bytes), version u64 = 1, dtype code u8, sequences n u64, boundaries d u64,
           lengths i32[n] in tokens, pointers i64[n] in bytes, document boundaries i64[d]

with d = documents + 1. Source: megatron-core 0.19.2, ``core/datasets/indexed_dataset.py``.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from megatron_mup.data.tokenizer import Tokenizer
from megatron_mup.errors import DataError

INDEX_MAGIC = b"MMIDIDX\x00\x00"
INDEX_HEADER = struct.Struct("<9sQBQQ")
DTYPE_CODES = {1: "uint8", 2: "int8", 3: "int16", 4: "int32", 5: "int64", 8: "uint16"}
"""Megatron's codes of the integer types; 6 and 7 are floats, which hold no token ids."""

# 8 to 32 MB at a time.
_CHUNK_TOKENS = 1 << 22
_SAMPLE_TOKENS = 64
_REMAKE = "make the shard again with `megatron-mup data preprocess --overwrite`"


@dataclass(frozen=True, kw_only=True)
class ShardManifest:
    """What a shard was made of; stored as ``P.json``."""

    format_version: int
    """Version of this record; 1."""

    documents: int
    """Documents in the shard."""

    skipped_empty_documents: int
    """Documents of the inputs, over all splits, that were left out because they held no text."""

    tokens: int
    """Token ids in the shard, end-of-document tokens included."""

    text_bytes: int
    """UTF-8 bytes of the documents' text."""

    largest_token_id: int
    """The largest id in the shard."""

    dtype: str
    """NumPy's name of the ids' type."""

    bin_bytes: int
    """Size of the .bin file."""

    bin_sha256: str
    """Hex digest of the .bin file."""

    tokenizer_sha256: str
    """Hex digest of the tokenizer model file."""

    vocab_size: int
    """Number of ids of the tokenizer."""

    eod: int
    """Id of the end-of-document token."""

    append_eod: bool
    """Whether each document ends with ``eod``."""

    inputs: list[str]
    """The input files as they were named."""


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


@dataclass(frozen=True, kw_only=True)
class ShardSummary:
    """What ``inspect_shard`` found by reading every token."""

    prefix: str
    """The shard's name without .bin or .idx."""

    documents: int
    """Number of documents."""

    tokens: int
    """Number of token ids."""

    mean_document_tokens: float
    """Mean length of a document in tokens."""

    min_document_tokens: int
    """Length of the shortest document in tokens."""

    max_document_tokens: int
    """Length of the longest document in tokens."""

    dtype: str
    """NumPy's name of the ids' type."""

    largest_token_id: int
    """The largest id that occurs."""

    manifest_matches: bool | None
    """Whether the manifest's digest is that of the .bin file; None without a manifest."""

    sample: str | None
    """The decoded beginning of the first document; None without a tokenizer."""


@dataclass(frozen=True)
class _Index:
    dtype: str
    lengths: NDArray[np.int32]
    boundaries: NDArray[np.int64]

    @property
    def tokens(self) -> int:
        return int(self.lengths.sum(dtype=np.int64))


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
    bin_path = _file(prefix, ".bin")
    index = _read_index(_file(prefix, ".idx"))
    _check_size(bin_path, index)
    manifest = _read_manifest(prefix)
    if manifest is not None and (manifest.tokens, manifest.dtype) != (index.tokens, index.dtype):
        raise DataError(
            f"{prefix}.json: describes {manifest.tokens} tokens of {manifest.dtype}, its .idx "
            f"{index.tokens} of {index.dtype}: the files are of different runs; {_REMAKE}"
        )
    if vocab_size is not None:
        # Reading a large shard through takes minutes at every start; the manifest takes none.
        largest = manifest.largest_token_id if manifest else _largest_id(prefix, index.dtype)
        if largest >= vocab_size:
            raise DataError(
                f"{bin_path}: holds token id {largest}, the model's vocab_size is {vocab_size} "
                "(ids 0 to vocab_size - 1); set model.vocab_size to the tokenizer's size or "
                "preprocess with the model's tokenizer"
            )
    return ShardInfo(
        prefix=prefix,
        documents=len(index.boundaries) - 1,
        tokens=index.tokens,
        dtype=index.dtype,
        manifest=manifest,
    )


def inspect_shard(prefix: Path, *, tokenizer: Tokenizer | None = None) -> ShardSummary:
    """Read a whole shard and summarize it.

    Args:
        prefix: The shard's name without .bin or .idx.
        tokenizer: Decodes the sample; its vocabulary must hold every id.

    Returns:
        The summary.

    Raises:
        DataError: As ``open_shard``, or the shard was made with another tokenizer.
    """
    info = open_shard(prefix, vocab_size=tokenizer.vocab_size if tokenizer else None)
    manifest = info.manifest
    if tokenizer and manifest and manifest.tokenizer_sha256 != tokenizer.sha256:
        raise DataError(
            f"{prefix}: made with the tokenizer {manifest.tokenizer_sha256[:12]}..., not with "
            f"{tokenizer.sha256[:12]}... (SHA-256); pass the right --tokenizer-model"
        )
    index = _read_index(_file(prefix, ".idx"))
    # A document may be several sequences (--split-sentences): boundaries count those, not tokens.
    starts = np.concatenate([[0], np.cumsum(index.lengths, dtype=np.int64)])
    document_tokens = np.diff(starts[index.boundaries])
    largest = _largest_id(prefix, index.dtype, manifest)
    shown = _token_map(prefix, index.dtype)[: min(int(document_tokens[0]), _SAMPLE_TOKENS)]
    return ShardSummary(
        prefix=str(prefix),
        documents=info.documents,
        tokens=info.tokens,
        mean_document_tokens=float(document_tokens.mean()),
        min_document_tokens=int(document_tokens.min()),
        max_document_tokens=int(document_tokens.max()),
        dtype=info.dtype,
        largest_token_id=largest,
        manifest_matches=_digest(prefix) == manifest.bin_sha256 if manifest else None,
        sample=tokenizer.decode(shown.tolist()) if tokenizer else None,
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
    train = open_shard(train_prefix, vocab_size=vocab_size).manifest
    valid = open_shard(valid_prefix, vocab_size=vocab_size)
    if train and valid.manifest and train.tokenizer_sha256 != valid.manifest.tokenizer_sha256:
        raise DataError(
            f"{train_prefix} and {valid_prefix} were made with different tokenizers "
            f"({train.tokenizer_sha256[:12]}... and {valid.manifest.tokenizer_sha256[:12]}..., "
            "SHA-256); preprocess both with one --tokenizer-model"
        )
    # bincount would allocate up to the largest id, and the manifest may lie about it.
    _largest_id(valid_prefix, valid.dtype, valid.manifest)
    counts = np.zeros(vocab_size, dtype=np.int64)
    # Counts and not probabilities are summed: the result is exact whatever the chunks.
    for chunk in _chunks(valid_prefix, valid.dtype):
        counts += np.bincount(chunk, minlength=vocab_size)
    shares = counts[counts > 0] / counts.sum()
    return float(-(shares * np.log(shares)).sum())


def _file(prefix: Path, suffix: str) -> Path:
    path = Path(f"{prefix}{suffix}")
    if path.is_file():
        return path
    # The commonest slip: a shell completes the file's name.
    if prefix.suffix in (".bin", ".idx"):
        raise DataError(f"no file {path}; pass the prefix without {prefix.suffix}")
    raise DataError(
        f"no file {path}; correct the shard's prefix, or make it with `megatron-mup data "
        "preprocess`"
    )


def _check_size(bin_path: Path, index: _Index) -> None:
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


def _read_index(path: Path) -> _Index:
    """Read an .idx file and check it against itself."""
    size = path.stat().st_size
    with path.open("rb") as stream:
        header = stream.read(INDEX_HEADER.size)
    if len(header) < INDEX_HEADER.size or not header.startswith(INDEX_MAGIC):
        raise DataError(
            f"{path}: expected {INDEX_HEADER.size} header bytes starting with {INDEX_MAGIC!r}, "
            f"found {header[:9]!r} in a file of {size} bytes: not an index; {_REMAKE}"
        )
    _, version, code, sequences, boundary_count = INDEX_HEADER.unpack(header)
    if version != 1 or code not in DTYPE_CODES:
        raise DataError(
            f"{path}: format version {version} and dtype code {code}; expected version 1 and one "
            f"of {sorted(DTYPE_CODES)} (integers); {_REMAKE}"
        )
    expected = INDEX_HEADER.size + 12 * sequences + 8 * boundary_count
    if size != expected:
        raise DataError(
            f"{path}: expected {expected} bytes ({sequences} sequences, {boundary_count} "
            f"document boundaries), found {size}; copy it again or {_REMAKE}"
        )
    # Mapped, not read: the index of a large corpus has gigabytes.
    raw = np.memmap(path, dtype=np.uint8, mode="r")[INDEX_HEADER.size :]
    lengths = raw[: 4 * sequences].view("<i4")
    pointers = raw[4 * sequences : 12 * sequences].view("<i8")
    boundaries = raw[12 * sequences :].view("<i8")
    index = _Index(DTYPE_CODES[code], lengths, boundaries)
    if not _is_consistent(index, pointers):
        raise DataError(
            f"{path}: lengths, pointers and document boundaries contradict each other; {_REMAKE}"
        )
    return index


def _is_consistent(index: _Index, pointers: NDArray[np.int64]) -> bool:
    lengths, boundaries = index.lengths, index.boundaries
    # int64: a sum of int32 lengths overflows at 2^31 tokens.
    ends = np.cumsum(lengths, dtype=np.int64) * np.dtype(index.dtype).itemsize
    return bool(
        (lengths >= 0).all()
        and (pointers[:1] == 0).all()
        and (pointers[1:] == ends[:-1]).all()
        and len(boundaries) > 0
        and boundaries[0] == 0
        and boundaries[-1] == len(lengths)
        and (np.diff(boundaries) >= 0).all()
    )


def _read_manifest(prefix: Path) -> ShardManifest | None:
    path = Path(f"{prefix}.json")
    if not path.is_file():
        return None
    try:
        if path.stat().st_size > 1 << 26:
            raise ValueError("larger than 64 MiB")
        record = json.loads(path.read_bytes())
        types = {field.name: str(field.type) for field in dataclasses.fields(ShardManifest)}
        # Exact types, because JSON would let true pass for 1 and 1.0 for a count.
        found = {name: type(value).__name__ for name, value in record.items()}
        if found != types | {"inputs": "list"} or record["format_version"] != 1:
            raise ValueError("not a record of format version 1")
        if any(type(value) is int and value < 0 for value in record.values()):
            raise ValueError("a negative number")
        return ShardManifest(**record)
    # Deep nesting ends the parser with RecursionError.
    except (ValueError, AttributeError, RecursionError) as error:
        raise DataError(f"{path}: not a shard's manifest ({error}); {_REMAKE}") from error


def _digest(prefix: Path) -> str:
    with _file(prefix, ".bin").open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _token_map(prefix: Path, dtype: str) -> NDArray[np.integer]:
    tokens: NDArray[np.integer] = np.memmap(
        f"{prefix}.bin", dtype=np.dtype(dtype).newbyteorder("<"), mode="r"
    )
    return tokens


def _chunks(prefix: Path, dtype: str) -> Iterator[NDArray[np.integer]]:
    """Yield a shard's tokens in pieces that fit in memory."""
    tokens = _token_map(prefix, dtype)
    for start in range(0, len(tokens), _CHUNK_TOKENS):
        yield tokens[start : start + _CHUNK_TOKENS]


def _largest_id(prefix: Path, dtype: str, manifest: ShardManifest | None = None) -> int:
    """Read the largest id; a negative one, and a manifest that says otherwise, are refused."""
    extremes = [(int(chunk.min()), int(chunk.max())) for chunk in _chunks(prefix, dtype)]
    smallest, largest = min(low for low, _ in extremes), max(high for _, high in extremes)
    if smallest < 0:
        raise DataError(f"{prefix}.bin: holds the negative token id {smallest}; {_REMAKE}")
    if manifest and manifest.largest_token_id != largest:
        raise DataError(
            f"{prefix}.json: says that the largest token id is {manifest.largest_token_id}, the "
            f".bin holds {largest}; {_REMAKE}"
        )
    return largest
