"""The tokenizer: the reference ids of a text, and the text of ids, without losing a character.

Notation: a piece is an entry of the vocabulary, an id its number, eod the id that ends a document.
A model is a sentencepiece ``.model`` file or a Hugging Face ``tokenizer.json``; the library that
defines it makes the reference ids, which every faster engine must meet (see ``engines``).
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import sentencepiece
from numpy.typing import NDArray

from megatron_mup.errors import DataError

SPACE_SYMBOL = "\u2581"
"""What sentencepiece writes for a space, so that a literal one needs care."""

_JSON_NAME = "tokenizer.json"
# Of vocab.json, merges.txt, tokenizer_config.json and the like, which lie beside a tokenizer.json.
_PARTIAL_SUFFIXES = (".json", ".txt")
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+(?<!\.model)(?<!\.json)")

TokenizerKind = Literal["sentencepiece", "huggingface"]


@dataclass(frozen=True)
class Encoded:
    """The ids of several texts."""

    ids: NDArray[np.int32] | NDArray[np.uint32]
    """The ids of all texts end to end."""

    lengths: NDArray[np.int64]
    """Number of ids of each text."""


def join_encoded(ids_of_texts: Sequence[NDArray[np.int32]]) -> Encoded:
    """Put the ids of texts end to end.

    Args:
        ids_of_texts: The ids of each text.

    Returns:
        The same ids in one array.
    """
    lengths = np.fromiter(map(len, ids_of_texts), np.int64, len(ids_of_texts))
    ids = np.concatenate(ids_of_texts) if ids_of_texts else np.empty(0, np.int32)
    return Encoded(ids, lengths)


class Codec(Protocol):
    """What a tokenizer library does for ``Tokenizer``."""

    def encode(self, texts: list[str]) -> list[NDArray[np.int32]]:
        """Return the ids of each text."""

    def decode(self, ids: list[int]) -> str:
        """Return the text of ids inside the vocabulary."""

    def piece(self, token: int) -> str:
        """Return the spelling of an id."""


@dataclass(frozen=True)
class Tokenizer:
    """A loaded model; ``load_tokenizer`` makes one."""

    kind: TokenizerKind
    """The library that defines the model."""

    vocab_size: int
    """The largest id plus 1."""

    eod: int
    """Id of the end-of-document token."""

    eod_token: str
    """Its piece, with which ``tokenizer_from_bytes`` finds it again."""

    bos: int | None
    """Id of the beginning-of-sequence token; None if the model has none."""

    sha256: str
    """Hex digest of the model file; what a shard's manifest names."""

    model: bytes = field(repr=False)
    """The model file's bytes, from which a worker process rebuilds the tokenizer."""

    _codec: Codec = field(repr=False, compare=False)

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
        return [ids.tolist() for ids in self._codec.encode(list(texts))]

    def encode_flat(self, texts: Sequence[str]) -> Encoded:
        """Return the ids of the texts end to end, without bos and eod.

        Args:
            texts: Texts that UTF-8 can encode.

        Returns:
            The same ids as ``encode_batch``, in one array.
        """
        return join_encoded(self._codec.encode(list(texts)))

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of ``ids``.

        Args:
            ids: Ids in [0, vocab_size); bos and eod stand for no text.

        Returns:
            The text; bytes that are not UTF-8 become U+FFFD.

        Raises:
            DataError: An id is outside the vocabulary.
        """
        # Asked here, because the libraries' own errors do not say which id and what to do.
        outside = [token for token in ids if not 0 <= token < self.vocab_size]
        if outside:
            raise DataError(
                f"token id {outside[0]} is outside the tokenizer's vocabulary of {self.vocab_size};"
                " pass the --tokenizer-model that made these ids"
            )
        return self._codec.decode([int(i) for i in ids if i not in (self.bos, self.eod)])


def load_tokenizer(path: Path, *, eod_token: str | None = None) -> Tokenizer:
    """Load a sentencepiece model or a Hugging Face tokenizer.json.

    Args:
        path: The model file. The end-of-document token of a tokenizer.json is, unless
            ``eod_token`` names it, the ``eos_token`` of the tokenizer_config.json beside it.
        eod_token: The piece that ends a document; None takes the model's own.

    Returns:
        The tokenizer.

    Raises:
        DataError: The file is missing, is no tokenizer, or has no end-of-document token.
    """
    model = read_model(path)
    if eod_token is None and is_tokenizer_json(model):
        eod_token = _configured_eos(path.with_name("tokenizer_config.json"))
    return tokenizer_from_bytes(model, name=str(path), eod_token=eod_token)


def read_model(path: Path) -> bytes:
    """Return the bytes of a tokenizer's model file, of any kind.

    Args:
        path: What ``--tokenizer-model`` named.

    Returns:
        The bytes, as they are.

    Raises:
        DataError: It is no file that can be read; the message names the one that was meant.
    """
    try:
        model = path.read_bytes()
    except OSError as error:
        raise DataError(
            f"cannot read the tokenizer model {path}: {error.strerror or error}; {_meant(path)}"
        ) from error
    beside = path.with_name(_JSON_NAME)
    is_part = path.suffix in _PARTIAL_SUFFIXES and not is_tokenizer_json(model)
    if is_part and path.name != _JSON_NAME and beside.is_file():
        raise DataError(f"{path} is only a part of a tokenizer; pass {beside} to --tokenizer-model")
    return model


def _meant(path: Path) -> str:
    """What to pass instead of something that is no file."""
    if path.is_dir():
        found = [path / _JSON_NAME, *sorted(path.glob("*.model"))]
        found = [file for file in found if file.is_file()]
        if found:
            return f"pass {found[0]} to --tokenizer-model"
        return f"it is a folder that holds neither a {_JSON_NAME} nor a .model; pass such a file"
    if _HUB_NAME.fullmatch(str(path)) and not path.parent.exists():
        return (
            "if it is the name of a model on a hub: nothing is downloaded here; download the "
            f"model's {_JSON_NAME} and pass the path of that file to --tokenizer-model"
        )
    return (
        "pass the .model file of `megatron-mup data tokenizer`, or a tokenizer.json, to "
        "--tokenizer-model"
    )


def tokenizer_from_bytes(
    model: bytes, *, name: str = "<memory>", eod_token: str | None = None
) -> Tokenizer:
    """Build a tokenizer from the bytes of its model file.

    Args:
        model: The bytes of a sentencepiece model or of a tokenizer.json.
        name: What to call the model in messages.
        eod_token: The piece that ends a document; None takes sentencepiece's eos, or the only
            usual one of a tokenizer.json.

    Returns:
        The tokenizer.

    Raises:
        DataError: The bytes are no tokenizer, or it has no end-of-document token.
    """
    if is_tokenizer_json(model):
        # Only here, so that a worker with a sentencepiece model does not load the other library.
        from megatron_mup.data.huggingface_tokenizer import load_huggingface

        codec, vocab_size, eod, bos = load_huggingface(model, name=name, eod_token=eod_token)
        return _assembled("huggingface", codec, model, ids=(vocab_size, eod, bos))
    processor = _load_processor(model, name)
    eod, bos = _sentencepiece_eod(processor, name, eod_token), int(processor.bos_id())
    ids = (int(processor.vocab_size()), eod, bos if bos >= 0 else None)
    return _assembled("sentencepiece", _SentencePieceCodec(processor), model, ids=ids)


def _assembled(
    kind: TokenizerKind, codec: Codec, model: bytes, *, ids: tuple[int, int, int | None]
) -> Tokenizer:
    """Build the tokenizer; ``ids`` are the vocabulary's size, eod and bos."""
    vocab_size, eod, bos = ids
    return Tokenizer(
        kind=kind,
        vocab_size=vocab_size,
        eod=eod,
        eod_token=codec.piece(eod),
        bos=bos,
        sha256=hashlib.sha256(model).hexdigest(),
        model=model,
        _codec=codec,
    )


def is_tokenizer_json(model: bytes) -> bool:
    """Tell whether these are the bytes of a tokenizer.json: a JSON object with a "model".

    Args:
        model: A model file's bytes.

    Returns:
        False for everything else.
    """
    if not model.lstrip().startswith(b"{"):
        return False
    try:
        return "model" in json.loads(model)
    except (ValueError, RecursionError):
        return False


class _SentencePieceCodec:
    """Encodes with sentencepiece, and keeps a literal U+2581 apart from a space."""

    def __init__(self, processor: Any) -> None:
        self._processor = processor
        self._space_symbol = _space_symbol_ids(processor)

    def encode(self, texts: list[str]) -> list[NDArray[np.int32]]:
        marked = [number for number, text in enumerate(texts) if SPACE_SYMBOL in text]
        if not marked or self._space_symbol is None:
            return self._encode_plain(texts)
        encoded = self._encode_plain(["" if SPACE_SYMBOL in text else text for text in texts])
        for number in marked:
            encoded[number] = self._encode_marked(texts[number], self._space_symbol)
        return encoded

    def decode(self, ids: list[int]) -> str:
        return str(self._processor.decode(ids))

    def piece(self, token: int) -> str:
        return str(self._processor.id_to_piece(token))

    def _encode_marked(self, text: str, symbol: NDArray[np.int32]) -> NDArray[np.int32]:
        # sentencepiece writes a space as U+2581, so a literal U+2581 would come back as a space.
        # It is spelled in byte pieces instead: decoded bytes are never taken for a space.
        first, *others = self._encode_plain(text.split(SPACE_SYMBOL))
        return np.concatenate([first, *(part for other in others for part in (symbol, other))])

    def _encode_plain(self, texts: list[str]) -> list[NDArray[np.int32]]:
        # One thread: parallelism comes from worker processes.
        encoded: list[NDArray[np.int32]] = self._processor.encode(
            texts, out_type="numpy", num_threads=1
        )
        return encoded


def _load_processor(model: bytes, name: str) -> Any:
    processor: Any = sentencepiece.SentencePieceProcessor()
    # Damaged bytes raise or return False, by the kind of damage.
    try:
        loaded = processor.LoadFromSerializedProto(model)
    except RuntimeError:
        loaded = False
    if not loaded:
        raise DataError(
            f"{name} is not a sentencepiece model, nor a tokenizer.json ({len(model)} bytes); pass "
            "the .model file of `megatron-mup data tokenizer`, or a tokenizer.json, to "
            "--tokenizer-model"
        )
    return processor


def _sentencepiece_eod(processor: Any, name: str, eod_token: str | None) -> int:
    """Return the id that ends a document: eos, or the piece that the user names."""
    if eod_token is None:
        if processor.eos_id() < 0:
            raise DataError(
                f"{name} has no eos piece, which ends a document; name another piece with "
                "--eod-token, or train a model with `megatron-mup data tokenizer`"
            )
        return int(processor.eos_id())
    eod = int(processor.piece_to_id(eod_token))
    # A piece that is not there gives unk's id.
    if processor.id_to_piece(eod) != eod_token:
        raise DataError(
            f"--eod-token {eod_token!r} is not a piece of {name}; pass one of its pieces, or leave "
            "the option out for the model's eos"
        )
    return eod


def _space_symbol_ids(processor: Any) -> NDArray[np.int32] | None:
    """Return the byte pieces that spell U+2581; None for a model without byte pieces."""
    # The byte pieces' names are sentencepiece's own.
    pieces = (f"<0x{byte:02X}>" for byte in SPACE_SYMBOL.encode("utf-8"))
    ids = [int(processor.piece_to_id(piece)) for piece in pieces]
    return np.array(ids, np.int32) if all(map(processor.is_byte, ids)) else None


def _configured_eos(path: Path) -> str | None:
    """Return the eos_token of a tokenizer_config.json; None without the file or the entry."""
    if not path.exists():
        return None
    try:
        config = json.loads(path.read_bytes())
    except OSError as error:
        raise DataError(
            f"cannot read {path}: {error.strerror or error}; mend it, or pass the end-of-document "
            "token with --eod-token"
        ) from error
    except (ValueError, RecursionError) as error:
        raise DataError(
            f"{path} is broken JSON ({error}); mend it, or pass the end-of-document token with "
            "--eod-token"
        ) from error
    token = config.get("eos_token") if isinstance(config, dict) else None
    # Either the piece itself or the description of an added token.
    token = token.get("content") if isinstance(token, dict) else token
    return token if isinstance(token, str) else None
