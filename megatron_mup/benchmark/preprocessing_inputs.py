"""The text that preprocessing is measured on: prepared, or made larger than any memory.

Text that the package treats otherwise than Megatron-LM on purpose is left out and counted: a
literal U+2581, which plain sentencepiece turns into a space, and documents without text.
"""

from __future__ import annotations

import dataclasses
import gzip
import itertools
import json
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from string import ascii_lowercase, ascii_uppercase
from typing import BinaryIO, cast

from megatron_mup.data.corpus import write_corpus
from megatron_mup.data.documents import read_documents
from megatron_mup.data.tokenizer import SPACE_SYMBOL
from megatron_mup.data.tokenizer_training import TokenizerOptions, train_tokenizer
from megatron_mup.errors import DataError

TRAINING_BYTES = 12_000_000
"""Text that a tokenizer is trained on where none is given."""

VOCAB_SIZE = 32_000
"""Its vocabulary."""

DEFAULT_BYTES = 150_000_000
"""Most text of the corpus that every machine has."""


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """A JSON-lines file to measure on."""

    path: Path
    documents: int
    text_bytes: int
    """UTF-8 bytes of all texts."""

    left_out: int
    """Documents without text or with U+2581."""


def prepare_input(source: Path | None, folder: Path) -> Prepared:
    """Write the documents as plain JSON lines.

    Args:
        source: An input of any kind that ``data preprocess`` reads; None takes installed Python
            sources and documentation (``data.corpus``).
        folder: Receives the file.

    Returns:
        The file and what it holds.

    Raises:
        DataError: The source cannot be read or holds no text.
    """
    if source is None:
        source = folder / "corpus.jsonl"
        write_corpus(source, max_bytes=DEFAULT_BYTES, overwrite=True)
    target = folder / "input.jsonl"
    documents = text_bytes = left_out = 0
    with target.open("wb") as stream:
        for document in read_documents([source]):
            if not document.text or SPACE_SYMBOL in document.text:
                left_out += 1
                continue
            stream.write(_line(document.text))
            documents += 1
            text_bytes += len(document.text.encode("utf-8"))
    if not documents:
        raise DataError(f"--input {source} holds no text to measure on; pass another")
    return Prepared(path=target, documents=documents, text_bytes=text_bytes, left_out=left_out)


def train_model(prepared: Prepared, folder: Path, *, model_type: str) -> Path:
    """Train a sentencepiece model on the first ``TRAINING_BYTES`` of the input.

    Args:
        prepared: The input.
        folder: Receives the model.
        model_type: "bpe" or "unigram".

    Returns:
        The model file.

    Raises:
        DataError: The text is too short for ``VOCAB_SIZE`` pieces.
    """
    part = folder / "training.jsonl"
    with prepared.path.open("rb") as lines, part.open("wb") as stream:
        written = 0
        for line in lines:
            if written > TRAINING_BYTES:
                break
            written += stream.write(line)
    options = TokenizerOptions(
        vocab_size=VOCAB_SIZE,
        model_type="unigram" if model_type == "unigram" else "bpe",
        held_out_fraction=0.0,
    )
    return train_tokenizer([part], folder / model_type, options=options).model_path


HEAD_BYTES = 3_000_000
"""Text on which the start of a job is measured: more than the engine's check reads, and a unit of
work for each of two processes."""


def head_of(prepared: Prepared) -> Prepared:
    """Write the beginning of an input beside it, at most ``HEAD_BYTES`` and a quarter of it."""
    return _written(
        prepared,
        [prepared.path.with_name("head.jsonl")],
        _texts(prepared.path),
        head_size(prepared.text_bytes),
    )


def head_size(text_bytes: int) -> int:
    """Most bytes of text in the head of an input of this size."""
    return min(HEAD_BYTES, text_bytes // 4)


def enlarge(prepared: Prepared, targets: list[Path], *, text_bytes: int) -> Prepared:
    """Write an input of any size in which neither lines nor words come again for a long time.

    The corpus is repeated. In its k-th repetition (from 0) the words of each document are rotated
    by k: the first k, as ``str.split(" ")`` cuts, go to its end; and the letters a-z and A-Z are
    moved on by k in the alphabet, so that an engine that remembers words meets new ones.

    Args:
        prepared: The corpus.
        targets: Files to write, all with the same lines; one that ends in .gz is compressed.
        text_bytes: UTF-8 bytes of text at which to stop, after a whole document.

    Returns:
        The first of the files and what each holds.
    """
    return _written(prepared, targets, _moved(prepared.path), text_bytes)


def _written(
    prepared: Prepared, targets: list[Path], texts: Iterator[str], text_bytes: int
) -> Prepared:
    written = documents = 0
    with ExitStack() as stack:
        streams = [stack.enter_context(_opened(target)) for target in targets]
        for text in texts:
            line = _line(text)
            for stream in streams:
                stream.write(line)
            written += len(text.encode("utf-8"))
            documents += 1
            if written >= text_bytes:
                break
    return dataclasses.replace(prepared, path=targets[0], documents=documents, text_bytes=written)


def _opened(target: Path) -> BinaryIO:
    if target.suffix == ".gz":
        # The type stubs do not know that it is one.
        return cast(BinaryIO, gzip.open(target, "wb", compresslevel=1))
    return target.open("wb")


def _moved(path: Path) -> Iterator[str]:
    """Yield the documents again and again, as ``enlarge`` says."""
    for turn in itertools.count():
        shift = turn % 26
        letters = str.maketrans(
            ascii_lowercase + ascii_uppercase,
            "".join(some[shift:] + some[:shift] for some in (ascii_lowercase, ascii_uppercase)),
        )
        for text in _texts(path):
            words = text.split(" ")
            cut = turn % len(words)
            yield " ".join(words[cut:] + words[:cut]).translate(letters)


def _texts(path: Path) -> Iterator[str]:
    with path.open("rb") as lines:
        for line in lines:
            yield json.loads(line)["text"]


def _line(text: str) -> bytes:
    return json.dumps({"text": text}, ensure_ascii=False).encode("utf-8") + b"\n"
