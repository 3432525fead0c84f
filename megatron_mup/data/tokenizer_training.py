"""Training a sentencepiece tokenizer, and measuring how well it compresses unseen text.

The ids are unk 0, bos 1, eos 2 (the end of a document), the newline 3, then the special tokens,
the byte pieces and the learned pieces, and last the unused ones that pad the vocabulary. There is
no padding id: GPT training packs documents. The corpus is read once, whatever its size.
"""

from __future__ import annotations

import hashlib
import heapq
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import sentencepiece

from megatron_mup.data.documents import check_fraction, read_documents, splits_of
from megatron_mup.data.inputs import InputFile, find_inputs
from megatron_mup.data.publication import check_writable, explained_failure, published
from megatron_mup.data.tokenizer import SPACE_SYMBOL, Tokenizer, tokenizer_from_bytes
from megatron_mup.errors import DataError

ModelType = Literal["bpe", "unigram"]

MAX_SENTENCE_BYTES = 4096
"""Longer training sentences are cut here; sentencepiece would drop them (default limit 4192)."""

MEASURED_BYTES = 64 << 20
"""Held-out text on which compression is measured at most."""

DEFAULT_SAMPLE_BYTES = 1 << 30
"""Text to train on. *Assumption*: pieces hardly change with more; sentencepiece holds it all."""

_BYTE_PIECES = 256
_RESERVED = ("<unk>", "<s>", "</s>")
_UNUSED = "<unused_{}>"
_CONTROL = 3
"""sentencepiece's type of a piece that no text gives."""


@dataclass(frozen=True)
class TokenizerReport:
    """What ``train_tokenizer`` made and how well it compresses."""

    model_path: Path
    """The published sentencepiece model."""

    vocab_size: int
    """Number of ids."""

    sha256: str
    """Hex digest of the model file."""

    unused_ids: int
    """Ids at the end that no text gives; they pad the vocabulary."""

    training_documents: int
    """Documents that the model was trained on."""

    training_bytes: int
    """UTF-8 bytes of their text."""

    held_out_documents: int
    """Documents that were kept from training and encoded for the measurement; a sample of at most
    ``MEASURED_BYTES``."""

    held_out_bytes_per_token: float | None
    """UTF-8 bytes of the held-out text for each token; None without held-out text."""


@dataclass(frozen=True, kw_only=True)
class TokenizerOptions:
    """How to train a tokenizer."""

    vocab_size: int
    """Number of ids, special and byte pieces included, before padding."""

    model_type: ModelType = "bpe"
    """Algorithm of sentencepiece: byte-pair encoding or a unigram language model."""

    byte_fallback: bool = True
    """Spell unknown characters in bytes; without it they become unk and are lost."""

    character_coverage: float = 0.9995
    """Share of the text's characters that get a piece of their own (sentencepiece's default)."""

    input_sentence_size: int = 0
    """Lines to sample for training from a huge corpus; 0 takes all."""

    sample_bytes: int = DEFAULT_SAMPLE_BYTES
    """UTF-8 bytes of documents to train on, chosen by their hashes; 0 takes all."""

    special_tokens: tuple[str, ...] = ()
    """Strings such as chat markers that are one id wherever a text has them, and never split
    (sentencepiece's user-defined symbols)."""

    pad_vocab_to_multiple: int = 1
    """The vocabulary is enlarged to a multiple of this: by learned pieces as far as the text gives
    them, then by unused ones."""

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
        least = 5 + (_BYTE_PIECES if self.byte_fallback else 0) + len(self.special_tokens)
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
        if self.sample_bytes < 0:
            raise DataError(f"--sample-bytes is {self.sample_bytes}; pass 0 (all) or more")
        if self.pad_vocab_to_multiple < 1:
            raise DataError(
                f"--pad-vocab-to-multiple is {self.pad_vocab_to_multiple}; pass 1 (none) or more"
            )
        if self.num_threads < 1:
            raise DataError(f"--num-threads is {self.num_threads}; pass at least 1")
        check_fraction(self.held_out_fraction, "--held-out-fraction")
        _check_special_tokens(self.special_tokens)

    @property
    def padded_vocab_size(self) -> int:
        """The vocabulary's size after padding."""
        multiple = self.pad_vocab_to_multiple
        return -(-self.vocab_size // multiple) * multiple


def _check_special_tokens(tokens: Sequence[str]) -> None:
    for number, token in enumerate(tokens):
        problem = None
        if not token or any(letter.isspace() or letter in (SPACE_SYMBOL, "\0") for letter in token):
            problem = "is empty or holds white space, which sentencepiece rewrites"
        elif token in _RESERVED or token.startswith(("<0x", _UNUSED.split("{")[0])):
            problem = "is one of the model's own pieces"
        elif token in tokens[:number]:
            problem = "is given twice"
        if problem:
            raise DataError(f"--special-token {token!r} {problem}; pass another one")


def train_tokenizer(
    inputs: Sequence[str | Path],
    model_prefix: Path,
    *,
    options: TokenizerOptions,
    json_key: str = "text",
    overwrite: bool = False,
) -> TokenizerReport:
    """Train a sentencepiece model on the documents that are not held out, and publish it.

    Args:
        inputs: Files, globs, folders or "-".
        model_prefix: The model is published as ``<model_prefix>.model``.
        options: How to train.
        json_key: The key of the text in JSON lines, or the column of a Parquet file.
        overwrite: Whether an existing model may be replaced.

    Returns:
        The report, with the compression of the held-out documents.

    Raises:
        DataError: An input or the output is refused, or the text gives no such vocabulary.
    """
    corpus, target = _Corpus(find_inputs(inputs), json_key, options), Path(f"{model_prefix}.model")
    check_writable([target], overwrite=overwrite, option="--model-prefix")
    model, unused = _padded(_train(corpus, options), options)
    tokenizer = tokenizer_from_bytes(model, name=str(target))
    held_out, bytes_per_token = _measure(tokenizer, corpus.held_out)
    with explained_failure(target, "--model-prefix"), published(target) as stream:
        stream.write(model)
    return TokenizerReport(
        model_path=target,
        vocab_size=tokenizer.vocab_size,
        sha256=tokenizer.sha256,
        unused_ids=unused,
        training_documents=corpus.documents,
        training_bytes=corpus.text_bytes,
        held_out_documents=held_out,
        held_out_bytes_per_token=bytes_per_token,
    )


class _Sample:
    """The documents with the lowest hashes that fit into a number of bytes.

    The choice depends on the documents alone, not on their order, and is made in one pass with the
    memory of the sample.
    """

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes, self._bytes, self._seen = max_bytes, 0, 0
        # The highest hash on top, as the first to go.
        self._heap: list[tuple[int, int, bytes]] = []
        self._bound = 1 << 64

    def add(self, digest: bytes, raw: bytes) -> None:
        """Offer a document: the SHA-256 digest of its text, and the text in UTF-8."""
        # Other bytes than those that hold documents out.
        place = int.from_bytes(digest[8:16], "big")
        # What is above a document that had to go has no room either, or the order would matter.
        if place >= self._bound:
            return
        heapq.heappush(self._heap, (-place, -self._seen, raw))
        self._seen += 1
        self._bytes += len(raw)
        # One document always stays: a sample without text could not be trained on.
        while self._bytes > self._max_bytes and len(self._heap) > 1:
            highest, _, gone = heapq.heappop(self._heap)
            self._bytes -= len(gone)
            self._bound = -highest

    def take(self) -> Iterator[bytes]:
        """Yield the documents in the order in which they came, and forget them."""
        kept = sorted(self._heap, key=lambda entry: entry[1])
        self._heap, self._bytes = [], 0
        while kept:
            yield kept.pop()[2]


class _Corpus:
    """The training sentences; remembers the error that sentencepiece would swallow."""

    def __init__(
        self, inputs: Sequence[InputFile], json_key: str, options: TokenizerOptions
    ) -> None:
        self._inputs, self._json_key, self._options = inputs, json_key, options
        self.held_out = _Sample(MEASURED_BYTES)
        self.documents = self.text_bytes = 0
        self.error: DataError | None = None

    def sentences(self) -> Iterator[str]:
        """Read the corpus once: yield the training sentences, and collect the held-out text."""
        try:
            for raw in self._chosen():
                self.documents += 1
                self.text_bytes += len(raw)
                yield from split_sentences(raw.decode("utf-8"))
        except DataError as error:
            self.error = error

    def _chosen(self) -> Iterator[bytes]:
        limit = self._options.sample_bytes
        if limit == 0:
            yield from (raw for _, raw in self._for_training())
            return
        sample = _Sample(limit)
        for digest, raw in self._for_training():
            sample.add(digest, raw)
        yield from sample.take()

    def _for_training(self) -> Iterator[tuple[bytes, bytes]]:
        fraction = self._options.held_out_fraction
        for document in read_documents(self._inputs, json_key=self._json_key):
            raw = document.text.encode("utf-8")
            digest = hashlib.sha256(raw).digest()
            # Only text that the tokenizer has not seen says how it will do on new text.
            if splits_of([digest], valid_fraction=fraction, test_fraction=0.0)[0]:
                self.held_out.add(digest, raw)
            elif raw:
                yield digest, raw


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


def _train(corpus: _Corpus, options: TokenizerOptions) -> bytes:
    """Return the trained model, or explain why there is none."""
    failure: RuntimeError | None = None
    model = b""
    try:
        model = _run_trainer(corpus.sentences(), options)
    except RuntimeError as error:
        failure = error
    # First: the trainer's own failure is then only a consequence of the broken input.
    if corpus.error is not None:
        raise corpus.error
    if corpus.documents == 0:
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
        vocab_size=options.padded_vocab_size,
        # What the text cannot give is padded afterwards.
        hard_vocab_limit=options.padded_vocab_size == options.vocab_size,
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
        user_defined_symbols=["\n", *options.special_tokens],
        minloglevel=2,
    )
    return buffer.getvalue()


def _padded(model: bytes, options: TokenizerOptions) -> tuple[bytes, int]:
    """Append unused pieces up to the padded size; return the model and their number."""
    # Only here: protobuf is slow to import, and only a padded model needs it.
    from sentencepiece import sentencepiece_model_pb2

    proto = sentencepiece_model_pb2.ModelProto()
    proto.ParseFromString(model)
    unused = options.padded_vocab_size - len(proto.pieces)
    if unused == 0:
        return model, 0
    if len(proto.pieces) < options.vocab_size:
        raise DataError(
            f"sentencepiece cannot make --vocab-size {options.vocab_size} from this text: it gives "
            f"{len(proto.pieces)} pieces; pass a smaller --vocab-size or more text"
        )
    for number in range(unused):
        proto.pieces.add(piece=_UNUSED.format(number), score=0.0, type=_CONTROL)
    proto.trainer_spec.vocab_size = options.padded_vocab_size
    return proto.SerializeToString(deterministic=True), unused


def _measure(tokenizer: Tokenizer, held_out: _Sample) -> tuple[int, float | None]:
    """Return the number of held-out documents, and their UTF-8 bytes for each token."""
    count = text_bytes = tokens = 0
    for raw in held_out.take():
        count += 1
        text_bytes += len(raw)
        tokens += len(tokenizer.encode_flat([raw.decode("utf-8")]).ids)
    return count, text_bytes / tokens if tokens else None
