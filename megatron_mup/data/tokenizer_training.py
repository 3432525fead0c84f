"""Training a sentencepiece tokenizer, and measuring how well it compresses unseen text.

The ids are unk 0, bos 1, eos 2 (the end of a document), then the newline, the byte pieces and the
learned pieces. There is no padding id: GPT training packs documents.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import sentencepiece

from megatron_mup.data.documents import (
    Document,
    check_fraction,
    check_inputs,
    is_held_out,
    read_documents,
)
from megatron_mup.data.publication import check_writable, published
from megatron_mup.data.tokenizer import Tokenizer, tokenizer_from_bytes
from megatron_mup.errors import DataError

ModelType = Literal["bpe", "unigram"]

MAX_SENTENCE_BYTES = 4096
"""Longer training sentences are cut here; sentencepiece would drop them (default limit 4192)."""

_BYTE_PIECES = 256


@dataclass(frozen=True)
class TokenizerReport:
    """What ``train_tokenizer`` made and how well it compresses."""

    model_path: Path
    """The published sentencepiece model."""

    vocab_size: int
    """Number of ids."""

    sha256: str
    """Hex digest of the model file."""

    training_documents: int
    """Documents that the model was trained on."""

    held_out_documents: int
    """Documents that were kept from training and encoded for the measurement."""

    held_out_bytes_per_token: float | None
    """UTF-8 bytes of the held-out text for each token; None without held-out text."""


@dataclass(frozen=True, kw_only=True)
class TokenizerOptions:
    """How to train a tokenizer."""

    vocab_size: int
    """Number of ids, special and byte pieces included."""

    model_type: ModelType = "bpe"
    """Algorithm of sentencepiece: byte-pair encoding or a unigram language model."""

    byte_fallback: bool = True
    """Spell unknown characters in bytes; without it they become unk and are lost."""

    character_coverage: float = 0.9995
    """Share of the text's characters that get a piece of their own (sentencepiece's default)."""

    input_sentence_size: int = 0
    """Lines to sample for training from a huge corpus; 0 takes all."""

    num_threads: int = 1
    """Threads for training; sentencepiece's unigram pieces depend on it, BPE's do not."""

    held_out_fraction: float = 0.05
    """Share of documents kept from training; the same documents as preprocessing's split."""

    def __post_init__(self) -> None:
        """Check each option.

        Raises:
            DataError: An option's value is outside its range.
        """
        if self.model_type not in ("bpe", "unigram"):
            raise DataError(f"--model-type is {self.model_type!r}; pass bpe or unigram")
        # unk, bos, eos, the newline and one character, and the bytes if asked for.
        least = 5 + (_BYTE_PIECES if self.byte_fallback else 0)
        if self.vocab_size < least:
            raise DataError(f"--vocab-size is {self.vocab_size}; pass at least {least} ids")
        if not 0.98 <= self.character_coverage <= 1.0:
            raise DataError(
                f"--character-coverage is {self.character_coverage}; pass 0.98 to 1 (the range "
                "that sentencepiece accepts)"
            )
        if self.input_sentence_size < 0 or 0 < self.input_sentence_size <= 100:
            raise DataError(
                f"--input-sentence-size is {self.input_sentence_size} lines; pass 0 (all) or "
                "more than 100"
            )
        if self.num_threads < 1:
            raise DataError(f"--num-threads is {self.num_threads}; pass at least 1")
        check_fraction(self.held_out_fraction, "--held-out-fraction")


def train_tokenizer(
    inputs: Sequence[Path],
    model_prefix: Path,
    *,
    options: TokenizerOptions,
    json_key: str = "text",
    overwrite: bool = False,
) -> TokenizerReport:
    """Train a sentencepiece model on the documents that are not held out, and publish it.

    Args:
        inputs: Text and JSON-lines files; with the same options they give the same file.
        model_prefix: The model is published as ``<model_prefix>.model``.
        options: How to train.
        json_key: The key of the text in JSON lines.
        overwrite: Whether an existing model may be replaced.

    Returns:
        The report, with the compression of the held-out documents.

    Raises:
        DataError: An input or the output is refused, or the text gives no such vocabulary.
    """
    check_inputs(inputs)
    target = Path(f"{model_prefix}.model")
    check_writable([target], overwrite=overwrite, option="--model-prefix")
    sentences = _Sentences(inputs, json_key, options.held_out_fraction)
    tokenizer = tokenizer_from_bytes(_train(sentences, options), name=str(target))
    again = read_documents(inputs, json_key=json_key)
    documents, text_bytes, tokens = _measure(tokenizer, again, options.held_out_fraction)
    with published(target) as stream:
        stream.write(tokenizer.model)
    return TokenizerReport(
        model_path=target,
        vocab_size=tokenizer.vocab_size,
        sha256=tokenizer.sha256,
        training_documents=sentences.documents,
        held_out_documents=documents,
        held_out_bytes_per_token=text_bytes / tokens if tokens else None,
    )


class _Sentences:
    """The training sentences; remembers the error that sentencepiece would swallow."""

    def __init__(self, inputs: Sequence[Path], json_key: str, held_out_fraction: float) -> None:
        self._inputs, self._json_key, self._fraction = inputs, json_key, held_out_fraction
        self.documents = 0
        self.error: DataError | None = None

    def __iter__(self) -> Iterator[str]:
        try:
            for document in read_documents(self._inputs, json_key=self._json_key):
                if document.text and not is_held_out(document.text, self._fraction):
                    self.documents += 1
                    yield from split_sentences(document.text)
        except DataError as error:
            self.error = error


def split_sentences(text: str) -> Iterator[str]:
    """Yield the pieces of ``text`` that sentencepiece may learn from.

    Args:
        text: A document.

    Yields:
        The non-empty lines without their newline, cut at character boundaries into parts of at
        most ``MAX_SENTENCE_BYTES`` UTF-8 bytes.
    """
    for line in text.split("\n"):
        # A character takes at most 4 bytes, so a part of this many characters always fits.
        step = MAX_SENTENCE_BYTES if line.isascii() else MAX_SENTENCE_BYTES // 4
        for start in range(0, len(line), step):
            yield line[start : start + step]


def _train(sentences: _Sentences, options: TokenizerOptions) -> bytes:
    """Return the trained model, or explain why there is none."""
    failure: RuntimeError | None = None
    model = b""
    try:
        model = _run_trainer(iter(sentences), options)
    except RuntimeError as error:
        failure = error
    # First: the trainer's own failure is then only a consequence of the broken input.
    if sentences.error is not None:
        raise sentences.error
    if sentences.documents == 0:
        raise DataError(
            "no text to train a tokenizer on: the inputs hold no non-empty document outside the "
            "held-out share; pass more --input or --held-out-fraction 0"
        )
    if failure is not None:
        raise DataError(
            f"sentencepiece cannot make --vocab-size {options.vocab_size} from this text: "
            f"{str(failure).rsplit('] ', 1)[-1].strip()}"
        ) from failure
    return model


def _run_trainer(sentences: Iterator[str], options: TokenizerOptions) -> bytes:
    # Into memory rather than to a file: sentencepiece records a file's name in the model, which
    # would then differ from folder to folder.
    buffer = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=sentences,
        model_writer=buffer,
        vocab_size=options.vocab_size,
        model_type=options.model_type,
        byte_fallback=options.byte_fallback,
        character_coverage=options.character_coverage,
        input_sentence_size=options.input_sentence_size,
        num_threads=options.num_threads,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=-1,
        # Every character counts in code: nothing is folded, added or dropped, and runs of
        # spaces may become one piece.
        normalization_rule_name="identity",
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        # sentencepiece trains on lines and so never sees a newline; without a piece of its
        # own each would be spelled as a byte, or lost where there are no byte pieces.
        user_defined_symbols=["\n"],
        minloglevel=2,
    )
    return buffer.getvalue()


def _measure(
    tokenizer: Tokenizer, documents: Iterator[Document], fraction: float
) -> tuple[int, int, int]:
    """Return the number of held-out documents, of their UTF-8 bytes and of their tokens."""
    count = text_bytes = tokens = 0
    for document in documents:
        # Only text that the tokenizer has not seen says how it will do on new text.
        if not is_held_out(document.text, fraction):
            continue
        count += 1
        text_bytes += len(document.text.encode("utf-8"))
        tokens += len(tokenizer.encode(document.text))
    return count, text_bytes, tokens
