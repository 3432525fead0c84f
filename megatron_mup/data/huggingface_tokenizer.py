"""Hugging Face tokenizer.json files, by the library that defines them (``tokenizers``).

Only ``tokenizer`` uses this module, and only for such a file, so that other processes never load
the library. Settings of the file that would change the ids of a corpus are put aside: truncation,
padding, dropout, and tokens added around a text. A special token that is spelled out in a text
becomes its id, as everywhere with these files; other tools rely on it for chat markers.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

import numpy as np
import tokenizers
from numpy.typing import NDArray

from megatron_mup.errors import DataError

_EOD_TOKENS = (
    "</s>",
    "<|endoftext|>",
    "<|end_of_text|>",
    "<eos>",
    "<|eos|>",
    "<\uff5cend\u2581of\u2581sentence\uff5c>",
)
"""Usual spellings of the end of a document (end-of-turn markers are none)."""

_BOS_TOKENS = (
    "<s>",
    "<|begin_of_text|>",
    "<|startoftext|>",
    "<bos>",
    "<\uff5cbegin\u2581of\u2581sentence\uff5c>",
)

_SHOWN_TOKENS = 20


class HuggingFaceCodec:
    """Encodes and decodes with the ``tokenizers`` library."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer

    def encode(self, texts: list[str]) -> list[NDArray[np.int32]]:
        """Return the ids of each text, special tokens that it spells out included."""
        # Text by text: encode_batch would start a thread for each core.
        return [
            np.array(self._tokenizer.encode(text, add_special_tokens=False).ids, np.int32)
            for text in texts
        ]

    def decode(self, ids: list[int]) -> str:
        """Return the text of ``ids``, special tokens as their spelling."""
        return str(self._tokenizer.decode(ids, skip_special_tokens=False))

    def piece(self, token: int) -> str:
        """Return the spelling of an id."""
        return str(self._tokenizer.id_to_token(token))


def load_huggingface(
    model: bytes, *, name: str, eod_token: str | None
) -> tuple[HuggingFaceCodec, int, int, int | None]:
    """Load a tokenizer.json.

    Args:
        model: The file's bytes.
        name: What to call the file in messages.
        eod_token: The token that ends a document; None takes the only usual one it has.

    Returns:
        The codec, the vocabulary's size (largest id + 1), the id of eod, and that of bos or None.

    Raises:
        DataError: The library refuses the file, or the end-of-document token is not clear.
    """
    try:
        tokenizer: Any = tokenizers.Tokenizer.from_str(corpus_json(model))
        vocabulary: dict[str, int] = tokenizer.get_vocab(with_added_tokens=True)
    # The library raises no narrower kind.
    except Exception as error:
        raise DataError(
            f"{name} is not a tokenizer.json that the tokenizers library {tokenizers.__version__} "
            f"can load ({error}); pass another --tokenizer-model"
        ) from error
    if not vocabulary:
        raise DataError(f"{name} has an empty vocabulary; pass another --tokenizer-model")
    eod = vocabulary[_eod_token(vocabulary, tokenizer, name, eod_token)]
    begins = [vocabulary[token] for token in _BOS_TOKENS if token in vocabulary]
    bos = begins[0] if len(begins) == 1 else None
    return HuggingFaceCodec(tokenizer), max(vocabulary.values()) + 1, eod, bos


def corpus_json(model: bytes) -> str:
    """Return a tokenizer.json without what has no place in tokenizing a corpus.

    Args:
        model: The file's bytes; a JSON object.

    Returns:
        The JSON without truncation, padding, dropout, and tokens added around a text.
    """
    description = json.loads(model)
    description |= {"truncation": None, "padding": None, "post_processor": None}
    if isinstance(description["model"], dict) and "dropout" in description["model"]:
        description["model"]["dropout"] = None
    return json.dumps(description, ensure_ascii=False)


def _eod_token(vocabulary: dict[str, int], tokenizer: Any, name: str, eod_token: str | None) -> str:
    if eod_token is not None:
        if eod_token in vocabulary:
            return eod_token
        raise DataError(
            f"the end-of-document token {eod_token!r} is not in the vocabulary of {name} (special "
            f"tokens: {_special_tokens(tokenizer)}); pass another --eod-token"
        )
    found = [token for token in _EOD_TOKENS if token in vocabulary]
    if len(found) != 1:
        raise DataError(
            f"{name} has {'no' if not found else 'more than one'} usual end-of-document token "
            f"(special tokens: {_special_tokens(tokenizer)}); name the one that ends a document "
            "with --eod-token"
        )
    return found[0]


def _special_tokens(tokenizer: Any) -> str:
    """The added tokens, for a message."""
    added: Iterable[Any] = tokenizer.get_added_tokens_decoder().values()
    names = [token.content for token in added]
    more = f" and {len(names) - _SHOWN_TOKENS} more" if len(names) > _SHOWN_TOKENS else ""
    return (", ".join(names[:_SHOWN_TOKENS]) or "none") + more
