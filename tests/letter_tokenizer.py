"""A tokenizer that spells each id as one character, for models of any small vocabulary."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from megatron_mup.data.tokenizer import Tokenizer


@dataclass(frozen=True)
class Letters:
    """A codec that spells each id as one character, from 'A' on."""

    def encode(self, texts: list[str]) -> list[NDArray[np.int32]]:
        return [np.array([ord(letter) - 65 for letter in text], np.int32) for text in texts]

    def decode(self, ids: list[int]) -> str:
        return "".join(chr(65 + token) for token in ids)

    def piece(self, token: int) -> str:
        return chr(65 + token)


def letters(vocab_size: int = 90, *, eod: int = 89, sha256: str = "aa") -> Tokenizer:
    return Tokenizer(
        kind="sentencepiece",
        vocab_size=vocab_size,
        eod=eod,
        eod_token=chr(65 + eod),
        bos=None,
        sha256=sha256,
        model=b"",
        _codec=Letters(),
    )
