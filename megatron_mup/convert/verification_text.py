"""What a conversion is checked on: real text as token ids, wherever it comes from.

Errors that depend on the position (RoPE) or on rare scores show on text of the model's own length
and not on a few random ids; whoever has nothing better is told so in the report.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from megatron_mup.config import ModelConfig
from megatron_mup.data.blend import parse_blend
from megatron_mup.data.shard_sets import expand
from megatron_mup.data.shards import open_shard, read_chunks
from megatron_mup.errors import DataError

MAX_TOKENS = 2048
"""Tokens that are checked at most. Assumption: enough for a mean over many contexts, and about a
minute per forward pass of a 10B model on a CPU."""

Encode = Callable[[str], Sequence[int]]
"""From a text to its ids, without special tokens."""


@dataclass(frozen=True, kw_only=True)
class CheckedTokens:
    """Sequences for both models.

    Attributes:
        ids: int64 [B, S].
        origin: where they come from, for the report; names no folder.
        text: what they are the tokens of, if it was text.
    """

    ids: Tensor
    origin: str
    text: str | None = None


def tokens_of_text(model: ModelConfig, encode: Encode, text: str, *, origin: str) -> CheckedTokens:
    """The first tokens of a text.

    Args:
        model: whose sequence length and vocabulary count.
        encode: the model's tokenizer.
        text: any text; only as much as is needed is encoded.
        origin: what to call it.

    Raises:
        DataError: it has fewer than two tokens, or ids outside the model's vocabulary.
    """
    # No tokenizer in use makes more than a token of a byte or fewer than one of 64 characters.
    used = text[: 64 * MAX_TOKENS]
    return replace(_cut(model, np.asarray(encode(used), np.int64), origin), text=used)


def tokens_of_file(model: ModelConfig, encode: Encode, path: Path) -> CheckedTokens:
    """The first tokens of a UTF-8 text file; see ``tokens_of_text``."""
    try:
        with path.open(encoding="utf-8", errors="replace") as stream:
            text = stream.read(64 * MAX_TOKENS)
    except OSError as error:
        raise DataError(f"cannot read the text {path}: {error.strerror or error}") from error
    return tokens_of_text(model, encode, text, origin=path.name)


def tokens_of_shards(model: ModelConfig, paths: Sequence[str]) -> CheckedTokens:
    """The first tokens of token shards, as a run's held-out blend names them.

    Args:
        model: whose sequence length and vocabulary count.
        paths: prefixes of shards or sets, or alternately weights and prefixes.

    Raises:
        DataError: the first shard is missing or damaged, or does not fit the model.
    """
    prefixes, _ = parse_blend(paths)
    prefix = expand(Path(prefixes[0]))[0]
    shard = open_shard(prefix, vocab_size=model.padded_vocab_size)
    ids = next(iter(read_chunks(prefix, shard.dtype)))[:MAX_TOKENS]
    return _cut(model, ids.astype(np.int64), f"token shard {prefix.name}")


def built_in_tokens(model: ModelConfig, encode: Encode) -> CheckedTokens:
    """Tokens of a text that comes with Python: its reference on the language.

    Raises:
        DataError: this Python came without it.
    """
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise DataError(
            "this Python has no pydoc_data, whose text would be checked; give a text file"
        ) from error
    text = "\n".join(topics[name] for name in sorted(topics))
    return tokens_of_text(model, encode, text, origin="Python's language reference (pydoc_data)")


def uniform_tokens(model: ModelConfig, *, seed: int = 0) -> CheckedTokens:
    """Ids drawn uniformly from the vocabulary, for a model whose tokenizer is not at hand."""
    generator = np.random.default_rng(seed)
    ids = generator.integers(0, model.vocab_size, MAX_TOKENS, dtype=np.int64)
    return _cut(model, ids, "uniformly drawn ids, NOT text: no tokenizer was given")


def _cut(model: ModelConfig, ids: NDArray[np.int64], origin: str) -> CheckedTokens:
    """Sequences of the model's length; a shorter one if there are fewer ids."""
    if len(ids) < 2:
        raise DataError(f"{origin}: {len(ids)} tokens; the check needs at least 2")
    length = min(max(model.seq_length, 2), MAX_TOKENS, len(ids))
    count = min(MAX_TOKENS, len(ids)) // length
    used = ids[: count * length]
    if used.min() < 0 or used.max() >= model.padded_vocab_size:
        raise DataError(
            f"{origin}: token id {used.max() if used.min() >= 0 else used.min()} is outside the "
            f"model's vocabulary of {model.padded_vocab_size}; use the model's own tokenizer"
        )
    return CheckedTokens(ids=torch.from_numpy(used.reshape(count, length)), origin=origin)
