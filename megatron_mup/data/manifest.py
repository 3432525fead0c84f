"""Manifests: what shards were made of, stored beside them.

Each shard P has ``P.json`` (``ShardManifest``); a whole job with ``--output-prefix O`` has
``O.manifest.json`` (``JobManifest``), which is written last. Neither holds a date, a host or a
number of workers: the same inputs and options give the same bytes everywhere.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

from megatron_mup.errors import DataError

FORMAT_VERSION = 2
_LARGEST_BYTES = 1 << 28
_REMAKE = "make the shards again with `megatron-mup data preprocess --overwrite`"


@dataclass(frozen=True, kw_only=True)
class InputRange:
    """The part of one input file that a shard's documents come from."""

    file: str
    """The input file as it was named; "-" is standard input."""

    start: int
    """Position of the first document: its byte offset in the decompressed JSON lines, its row in a
    Parquet file, 0 for a text file."""

    stop: int
    """Position of the last document."""

    documents: int
    """Documents of the shard that come from this file."""


@dataclass(frozen=True, kw_only=True)
class ShardManifest:
    """What a shard was made of; stored as ``P.json``."""

    format_version: int
    """Version of this record; 2."""

    documents: int
    """Documents in the shard."""

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

    idx_sha256: str
    """Hex digest of the .idx file."""

    tokenizer_sha256: str
    """Hex digest of the tokenizer model file."""

    vocab_size: int
    """Number of ids of the tokenizer."""

    eod: int
    """Id of the end-of-document token."""

    append_eod: bool
    """Whether each document ends with ``eod``."""

    inputs: list[InputRange]
    """Where the documents come from, in order."""


@dataclass(frozen=True, kw_only=True)
class ShardEntry:
    """A shard in the job's manifest."""

    name: str
    """File name of the shard without .bin or .idx; it lies beside the manifest."""

    documents: int
    tokens: int
    text_bytes: int
    bin_bytes: int
    bin_sha256: str
    idx_sha256: str


@dataclass(frozen=True, kw_only=True)
class JobManifest:
    """What one preprocessing job read and made; stored as ``O.manifest.json``."""

    format_version: int
    """Version of this record; 2."""

    options: dict[str, Any]
    """The options that decide the output, by name."""

    inputs: list[str]
    """The input files in order."""

    tokenizer_sha256: str
    """Hex digest of the tokenizer model file."""

    vocab_size: int
    """Number of ids of the tokenizer."""

    eod: int
    """Id of the end-of-document token."""

    empty_documents: int
    """Documents without text, left out."""

    duplicate_documents: int
    """Exact copies of an earlier document, left out."""

    rejected_documents: dict[str, int]
    """Bad documents left out, by reason."""

    rejected_places: list[str]
    """The first of them: FILE:LINE, reason and detail."""

    splits: dict[str, list[ShardEntry]]
    """The shards of each split ("train", "valid", "test") in order."""


def job_manifest_path(output_prefix: Path) -> Path:
    """Where the manifest of a whole job lies."""
    return Path(f"{output_prefix}.manifest.json")


def manifest_text(manifest: ShardManifest | JobManifest) -> str:
    """Return a manifest as it is stored."""
    return json.dumps(dataclasses.asdict(manifest), indent=2) + "\n"


def read_shard_manifest(path: Path) -> ShardManifest:
    """Read ``P.json``.

    Raises:
        DataError: It is missing or not a shard's manifest of this version.
    """
    record = _read(path, ShardManifest, what="a shard's manifest")
    ranges = [InputRange(**entry) for entry in record["inputs"]]
    return ShardManifest(**record | {"inputs": ranges})


def read_job_manifest(path: Path) -> JobManifest:
    """Read ``O.manifest.json``.

    Raises:
        DataError: It is missing or not a job's manifest of this version.
    """
    record = _read(path, JobManifest, what="a job's manifest")
    splits = {
        name: [ShardEntry(**entry) for entry in entries]
        for name, entries in record["splits"].items()
    }
    # The names are opened beside the manifest, so none may lead elsewhere.
    names = [entry.name for entries in splits.values() for entry in entries]
    outside = [name for name in names if name in ("", ".", "..") or Path(name).name != name]
    if outside:
        raise DataError(f"{path}: not a job's manifest (shard name {outside[0]!r}); {_REMAKE}")
    return JobManifest(**record | {"splits": splits})


def _read(path: Path, kind: type[Any], *, what: str) -> dict[str, Any]:
    """Read a record whose names and types are exactly those of a dataclass.

    Raises:
        DataError: The file cannot be read, or holds something else.
    """
    try:
        if path.stat().st_size > _LARGEST_BYTES:
            raise ValueError(f"larger than {_LARGEST_BYTES >> 20} MiB")
        record = json.loads(path.read_bytes())
        version = record.get("format_version")
        if version == 1 and version is not True:
            raise DataError(
                f"{path}: has format version 1, this version reads {FORMAT_VERSION}; {_REMAKE}, "
                "or delete the file: a shard without a manifest is read through at every start"
            )
        if version != FORMAT_VERSION or not _fits(record, kind):
            raise ValueError(f"not a record of format version {FORMAT_VERSION}")
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}; {_REMAKE}") from error
    # Deep nesting ends the parser with RecursionError.
    except (ValueError, AttributeError, RecursionError) as error:
        raise DataError(f"{path}: not {what} ({error}); {_REMAKE}") from error
    checked: dict[str, Any] = record
    return checked


def _fits(value: object, hint: Any) -> bool:
    """Whether a JSON value has exactly the type that an annotation names.

    Exactly, because JSON would let true pass for 1 and 1.0 for a count.
    """
    if hint is Any:
        return True
    if dataclasses.is_dataclass(hint):
        hints = get_type_hints(hint)
        return (
            isinstance(value, dict)
            and value.keys() == hints.keys()
            and all(_fits(value[name], hints[name]) for name in hints)
        )
    origin, parts = get_origin(hint), get_args(hint)
    if origin is list:
        return isinstance(value, list) and all(_fits(item, parts[0]) for item in value)
    if origin is dict:
        return isinstance(value, dict) and all(_fits(item, parts[1]) for item in value.values())
    if type(value) is not hint:
        return False
    # Every number of a manifest counts something.
    return not isinstance(value, int) or value >= 0
