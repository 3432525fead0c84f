"""Preprocessing: documents -> token ids -> published shards.

Owns the order of the work and the writing of shards (their format is in ``shards``). The corpus
streams through: in memory are a few batches of documents and 4 bytes for each finished document.
The output depends on the inputs, the tokenizer and the options, never on the number of workers.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import multiprocessing
import os
from array import array
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from megatron_mup.data.documents import (
    Document,
    check_fraction,
    check_inputs,
    is_held_out,
    read_documents,
)
from megatron_mup.data.publication import (
    check_writable,
    sync_folder,
    sync_stream,
    temporary_name,
)
from megatron_mup.data.shards import DTYPE_CODES, INDEX_HEADER, INDEX_MAGIC, ShardManifest
from megatron_mup.data.tokenizer import Tokenizer, tokenizer_from_bytes
from megatron_mup.errors import DataError

UINT16_VOCAB_LIMIT = 65500
"""Vocabularies below it are stored as uint16, others as int32 (Megatron's DType.optimal_dtype)."""

SHARD_SUFFIXES = (".bin", ".json", ".idx")
"""A shard's files in the order of their publication."""

# Enough text to make up for sending it to another process, small enough for a bounded memory.
_BATCH_DOCUMENTS = 64
_BATCH_CHARACTERS = 1 << 20


@dataclass(frozen=True, kw_only=True)
class PreprocessOptions:
    """How to turn documents into shards."""

    json_key: str = "text"
    """The key of the text in JSON lines."""

    append_eod: bool = True
    """End each document with the tokenizer's end-of-document id."""

    valid_fraction: float = 0.05
    """Share of documents for the held-out shard, by hash of the text; 0 makes one shard."""

    workers: int = 1
    """Processes that tokenize; 1 works in this process."""

    overwrite: bool = False
    """Replace existing shards."""

    def __post_init__(self) -> None:
        """Check each option.

        Raises:
            DataError: An option's value is outside its range.
        """
        check_fraction(self.valid_fraction, "--valid-fraction")
        if self.workers < 1:
            raise DataError(f"--workers is {self.workers}; pass at least 1 process")


def preprocess(
    inputs: Sequence[Path],
    output_prefix: Path,
    *,
    tokenizer: Tokenizer,
    options: PreprocessOptions,
) -> dict[Path, ShardManifest]:
    """Tokenize documents into shards and publish them.

    Documents keep their order; empty ones are left out. The shards are ``<output_prefix>_train``
    and ``_valid``, or ``<output_prefix>`` without a held-out share. They are published after the
    last document; each .idx comes last, so that an interrupted publication cannot be opened.

    Args:
        inputs: Text and JSON-lines files.
        output_prefix: Where the shards go; missing folders are made.
        tokenizer: Encodes the documents.
        options: How to do it.

    Returns:
        The manifest of each shard by its prefix.

    Raises:
        DataError: An input or the output is refused, a split is empty, or writing failed.
    """
    check_inputs(inputs)
    prefixes = _checked_prefixes(output_prefix, options)
    try:
        manifests = _make_shards(inputs, prefixes, tokenizer, options)
    except BrokenProcessPool as error:
        raise DataError(
            f"a tokenizing process died (out of memory?); pass fewer --workers "
            f"({options.workers} now) or split very large documents"
        ) from error
    except OSError as error:
        raise DataError(
            f"cannot write {output_prefix}: {error}; free space or pass another --output-prefix"
        ) from error
    return dict(zip(prefixes, manifests, strict=True))


def _checked_prefixes(output_prefix: Path, options: PreprocessOptions) -> list[Path]:
    """The shards to make, the held-out one last; raises DataError if one cannot be published."""
    ends = ("_train", "_valid") if options.valid_fraction > 0 else ("",)
    prefixes = [Path(f"{output_prefix}{end}") for end in ends]
    targets = [Path(f"{prefix}{end}") for prefix in prefixes for end in SHARD_SUFFIXES]
    check_writable(targets, overwrite=options.overwrite, option="--output-prefix")
    return prefixes


def _make_shards(
    inputs: Sequence[Path],
    prefixes: Sequence[Path],
    tokenizer: Tokenizer,
    options: PreprocessOptions,
) -> list[ShardManifest]:
    documents = read_documents(inputs, json_key=options.json_key)
    with contextlib.ExitStack() as stack:
        writers = [stack.enter_context(_ShardWriter(prefix, tokenizer)) for prefix in prefixes]
        skipped = _fill(writers, documents, tokenizer, options)
        manifests = [
            writer.finish(
                skipped_empty_documents=skipped,
                append_eod=options.append_eod,
                inputs=[str(path) for path in inputs],
            )
            for writer in writers
        ]
        # Only when every shard is complete: a new training shard beside an old held-out one could
        # hold the same documents.
        for writer in writers:
            writer.publish()
    return manifests


class _ShardWriter:
    """One shard in the making, under temporary names; leaving the context removes what is left."""

    def __init__(self, prefix: Path, tokenizer: Tokenizer) -> None:
        self.prefix = prefix
        self.dtype = np.dtype(token_dtype(tokenizer.vocab_size))
        self._tokenizer = tokenizer
        # 4 bytes a document, where a list of ints would take 36.
        self._lengths = array("i")
        self._text_bytes = self._largest = 0
        self._digest = hashlib.sha256()
        self._paths = {end: Path(f"{prefix}{end}") for end in SHARD_SUFFIXES}
        self._bin = temporary_name(self._paths[".bin"]).open("wb")

    def __enter__(self) -> _ShardWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self._bin.close()
        for path in self._paths.values():
            temporary_name(path).unlink(missing_ok=True)

    def add(self, ids: NDArray[np.integer], *, text_bytes: int) -> None:
        """Append one document's ids."""
        # Megatron's files are little-endian on every machine.
        raw = ids.astype(self.dtype.newbyteorder("<"), copy=False).tobytes()
        self._bin.write(raw)
        self._digest.update(raw)
        self._lengths.append(len(ids))
        self._text_bytes += text_bytes
        self._largest = max(self._largest, int(ids.max(initial=0)))

    def finish(
        self, *, skipped_empty_documents: int, append_eod: bool, inputs: list[str]
    ) -> ShardManifest:
        """Complete and sync the temporary files; nothing is published yet."""
        if not self._lengths:
            raise DataError(
                f"no document for {self.prefix}: the inputs hold too few documents with text "
                f"({skipped_empty_documents} were empty); pass more --input, or --valid-fraction "
                "0 for a single shard"
            )
        manifest = ShardManifest(
            format_version=1,
            documents=len(self._lengths),
            skipped_empty_documents=skipped_empty_documents,
            tokens=sum(self._lengths),
            text_bytes=self._text_bytes,
            largest_token_id=self._largest,
            dtype=self.dtype.name,
            bin_bytes=self._bin.tell(),
            bin_sha256=self._digest.hexdigest(),
            tokenizer_sha256=self._tokenizer.sha256,
            vocab_size=self._tokenizer.vocab_size,
            eod=self._tokenizer.eod,
            append_eod=append_eod,
            inputs=inputs,
        )
        sync_stream(self._bin)
        text = json.dumps(dataclasses.asdict(manifest), indent=2) + "\n"
        _write_synced(temporary_name(self._paths[".json"]), text.encode("utf-8"))
        _write_synced(temporary_name(self._paths[".idx"]), index_bytes(self._lengths, self.dtype))
        return manifest

    def publish(self) -> None:
        """Rename the files to their final names, the .idx last."""
        # An old .idx must not describe the new .bin, not even for an instant.
        self._paths[".idx"].unlink(missing_ok=True)
        for path in self._paths.values():
            os.replace(temporary_name(path), path)
        sync_folder(self.prefix.parent)


def token_dtype(vocab_size: int) -> str:
    """Return NumPy's name of the type that Megatron stores ids of such a vocabulary in.

    Args:
        vocab_size: Number of ids.

    Returns:
        "uint16" or "int32".
    """
    return "uint16" if vocab_size < UINT16_VOCAB_LIMIT else "int32"


def index_bytes(lengths: Sequence[int], dtype: np.dtype[np.integer]) -> bytes:
    """Return the contents of the .idx file for documents of one sequence each.

    Args:
        lengths: Each document's length in tokens.
        dtype: Type of the ids in the .bin file.

    Returns:
        The bytes, as megatron-core 0.19.2's IndexedDatasetBuilder writes them.
    """
    code = next(code for code, name in DTYPE_CODES.items() if name == dtype.name)
    count = len(lengths)
    lengths_array = np.asarray(lengths, dtype="<i4")
    # Pointers are where documents begin: the ends of those before.
    ends = np.cumsum(lengths_array, dtype="<i8") * dtype.itemsize
    pointers = np.concatenate([np.zeros(1, dtype="<i8"), ends])[:count]
    boundaries = np.arange(count + 1, dtype="<i8")
    header = INDEX_HEADER.pack(INDEX_MAGIC, 1, code, count, count + 1)
    return b"".join([header, *(part.tobytes() for part in (lengths_array, pointers, boundaries))])


def _write_synced(path: Path, content: bytes) -> None:
    with path.open("wb") as stream:
        stream.write(content)
        sync_stream(stream)


def _fill(
    writers: Sequence[_ShardWriter],
    documents: Iterable[Document],
    tokenizer: Tokenizer,
    options: PreprocessOptions,
) -> int:
    """Write every document to its split's shard; return how many were empty."""
    skipped = 0

    def with_text() -> Iterator[Document]:
        nonlocal skipped
        for document in documents:
            if document.text:
                yield document
            else:
                skipped += 1

    dtype = token_dtype(tokenizer.vocab_size)
    end = np.array([tokenizer.eod] if options.append_eod else [], dtype=dtype)
    for texts, ids_of_texts in _encoded(_batches(with_text()), tokenizer, options.workers):
        for text, ids in zip(texts, ids_of_texts, strict=True):
            # The held-out shard is the last; is_held_out is never true for a share of 0.
            writer = writers[-1 if is_held_out(text, options.valid_fraction) else 0]
            writer.add(np.concatenate([ids, end]), text_bytes=len(text.encode("utf-8")))
    return skipped


def _batches(documents: Iterable[Document]) -> Iterator[list[str]]:
    """Group texts so that a batch is worth sending to another process."""
    batch: list[str] = []
    characters = 0
    for document in documents:
        batch.append(document.text)
        characters += len(document.text)
        if len(batch) == _BATCH_DOCUMENTS or characters >= _BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


Encoded = list[NDArray[np.integer]]


def _encoded(
    batches: Iterable[list[str]], tokenizer: Tokenizer, workers: int
) -> Iterator[tuple[list[str], Encoded]]:
    """Yield each batch with its ids, in order."""
    if workers == 1:
        for batch in batches:
            yield batch, _encode(tokenizer, batch)
        return
    # Spawned, not forked: the caller may hold threads. A bounded queue of futures, because the
    # pools' own map functions would read the whole corpus ahead.
    with ProcessPoolExecutor(
        workers,
        mp_context=multiprocessing.get_context("spawn"),
        initializer=_start_worker,
        initargs=(tokenizer.model,),
    ) as pool:
        pending: deque[tuple[list[str], Future[Encoded]]] = deque()
        # Two batches a worker: one in work, one waiting, so that no worker idles.
        for batch in batches:
            pending.append((batch, pool.submit(_encode_in_worker, batch)))
            if len(pending) == 2 * workers:
                done, future = pending.popleft()
                yield done, future.result()
        while pending:
            done, future = pending.popleft()
            yield done, future.result()


def _encode(tokenizer: Tokenizer, texts: list[str]) -> Encoded:
    dtype = np.dtype(token_dtype(tokenizer.vocab_size))
    return [np.array(ids, dtype=dtype) for ids in tokenizer.encode_batch(texts)]


# Set once in each worker process, so that the model travels once and not with every batch.
_worker_tokenizer: Tokenizer | None = None


def _start_worker(model: bytes) -> None:
    global _worker_tokenizer
    _worker_tokenizer = tokenizer_from_bytes(model)


def _encode_in_worker(texts: list[str]) -> Encoded:
    if _worker_tokenizer is None:
        raise RuntimeError("the worker process was started without its tokenizer")
    return _encode(_worker_tokenizer, texts)
