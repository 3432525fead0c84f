"""The tokenizer: applying a sentencepiece model without losing a character.

Notation: a piece is an entry of the vocabulary, an id its number, eod the id that ends a document
(sentencepiece's eos). ``tokenizer_training`` makes the models; no other module knows sentencepiece.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import sentencepiece

from megatron_mup.errors import DataError

_SPACE_SYMBOL = "\u2581"


@dataclass(frozen=True)
class Tokenizer:
    """A loaded sentencepiece model; ``load_tokenizer`` makes one."""

    vocab_size: int
    """Number of ids; every id is below it."""

    eod: int
    """Id of the end-of-document token (sentencepiece's eos)."""

    bos: int | None
    """Id of the beginning-of-sequence token; None if the model has none."""

    sha256: str
    """Hex digest of the model file; what a shard's manifest names."""

    model: bytes = field(repr=False)
    """The model file's bytes, from which a worker process rebuilds the tokenizer."""

    _processor: Any = field(repr=False, compare=False)
    _space_symbol_ids: tuple[int, ...] = field(repr=False, compare=False)

    def encode(self, text: str) -> list[int]:
        """Return the ids of ``text``, without bos and eod.

        Args:
            text: Any text that UTF-8 can encode.

        Returns:
            Ids in [0, vocab_size).
        """
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the ids of each text, without bos and eod.

        Args:
            texts: Texts that UTF-8 can encode.

        Returns:
            One list of ids in [0, vocab_size) for each text.
        """
        if not self._space_symbol_ids:
            return self._encode_plain(list(texts))
        # sentencepiece writes a space as U+2581, so a literal U+2581 would come back as a space.
        # It is spelled in byte pieces instead: decoded bytes are never taken for a space.
        parts_of_texts = [text.split(_SPACE_SYMBOL) for text in texts]
        encoded = iter(self._encode_plain([part for parts in parts_of_texts for part in parts]))
        ids_of_texts = []
        for parts in parts_of_texts:
            ids = next(encoded)
            for _ in parts[1:]:
                ids = [*ids, *self._space_symbol_ids, *next(encoded)]
            ids_of_texts.append(ids)
        return ids_of_texts

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of ``ids``.

        Args:
            ids: Ids in [0, vocab_size); bos and eod stand for no text.

        Returns:
            The text; bytes that are not UTF-8 become U+FFFD.

        Raises:
            DataError: An id is outside the vocabulary.
        """
        # Asked here, because sentencepiece's own error does not say which id and what to do.
        outside = [token for token in ids if not 0 <= token < self.vocab_size]
        if outside:
            raise DataError(
                f"token id {outside[0]} is outside the tokenizer's vocabulary of {self.vocab_size};"
                " pass the --tokenizer-model that made these ids"
            )
        return str(self._processor.decode([int(token) for token in ids]))

    def _encode_plain(self, texts: list[str]) -> list[list[int]]:
        # One thread: parallelism comes from worker processes.
        encoded: list[list[int]] = self._processor.encode(texts, out_type=int, num_threads=1)
        return encoded


def load_tokenizer(path: Path) -> Tokenizer:
    """Load a sentencepiece model.

    Args:
        path: The model file.

    Returns:
        The tokenizer.

    Raises:
        DataError: The file is missing, is not a sentencepiece model, or has no eos piece.
    """
    try:
        model = path.read_bytes()
    except OSError as error:
        raise DataError(
            f"cannot read the tokenizer model {path}: {error.strerror or error}; pass the .model "
            "file of `megatron-mup data tokenizer` to --tokenizer-model"
        ) from error
    return tokenizer_from_bytes(model, name=str(path))


def tokenizer_from_bytes(model: bytes, *, name: str = "<memory>") -> Tokenizer:
    """Build a tokenizer from the bytes of a sentencepiece model.

    Args:
        model: The model file's bytes.
        name: What to call the model in messages.

    Returns:
        The tokenizer.

    Raises:
        DataError: The bytes are not a sentencepiece model, or it has no eos piece.
    """
    processor: Any = sentencepiece.SentencePieceProcessor()
    # Damaged bytes raise or return False, by the kind of damage.
    try:
        loaded = processor.LoadFromSerializedProto(model)
    except RuntimeError:
        loaded = False
    if not loaded:
        raise DataError(
            f"{name} is not a sentencepiece model ({len(model)} bytes); pass the .model file of "
            "`megatron-mup data tokenizer` to --tokenizer-model"
        )
    if processor.eos_id() < 0:
        raise DataError(
            f"{name} has no eos piece, which ends a document; train one with "
            "`megatron-mup data tokenizer`"
        )
    return Tokenizer(
        vocab_size=int(processor.vocab_size()),
        eod=int(processor.eos_id()),
        bos=int(processor.bos_id()) if processor.bos_id() >= 0 else None,
        sha256=hashlib.sha256(model).hexdigest(),
        model=model,
        _processor=processor,
        _space_symbol_ids=_space_symbol_ids(processor),
    )


def _space_symbol_ids(processor: Any) -> tuple[int, ...]:
    """Return the byte pieces that spell U+2581; nothing for a model without byte pieces."""
    # The byte pieces' names are sentencepiece's own.
    pieces = (f"<0x{byte:02X}>" for byte in _SPACE_SYMBOL.encode("utf-8"))
    ids = tuple(int(processor.piece_to_id(piece)) for piece in pieces)
    return ids if all(processor.is_byte(token) for token in ids) else ()
