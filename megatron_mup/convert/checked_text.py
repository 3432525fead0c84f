"""Which text a conversion is verified on: the best that is at hand."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_mup.convert.huggingface_source import HuggingFaceSource
from megatron_mup.convert.megatron_source import MegatronSource
from megatron_mup.convert.verification_text import (
    CheckedTokens,
    built_in_tokens,
    tokens_of_file,
    tokens_of_shards,
    uniform_tokens,
)
from megatron_mup.convert.weights import WeightSource
from megatron_mup.data.blend import parse_blend, valid_paths
from megatron_mup.data.shard_sets import expand
from megatron_mup.data.tokenizer import Tokenizer
from megatron_mup.errors import DataError

_TOKENIZER = "tokenizer.json"


@dataclass(frozen=True, kw_only=True)
class Handling:
    """How to go about a conversion.

    Attributes:
        overwrite: replace an earlier output.
        check: compare the SHA-256 of the source's files, where it lists them, meanwhile.
        verify: compare log-probabilities at the end.
        tokenizer: of the model; turns text into ids.
        any_tokenizer: accept a tokenizer that is not the one that the run recorded.
        text: a text file to verify on; unset means text that Python brings, or without a tokenizer
            the run's held-out shards.
        progress: called with the bytes written so far and in all.
        say: told what is done next.
    """

    overwrite: bool = False
    check: bool = True
    verify: bool = True
    tokenizer: Tokenizer | None = None
    any_tokenizer: bool = False
    text: Path | None = None
    progress: Callable[[int, int], None] | None = None
    say: Callable[[str], None] | None = None


def tokens_for(source: WeightSource, handling: Handling) -> CheckedTokens:
    """What both models predict: the given text, Python's, held-out shards, or drawn ids.

    Raises:
        DataError: a text without a tokenizer, or a text or shard that cannot be read.
    """
    encode = _encoder(source, handling)
    if encode is not None:
        if handling.text is not None:
            return tokens_of_file(source.model, encode, handling.text)
        return built_in_tokens(source.model, encode)
    if handling.text is not None:
        raise DataError(f"--text {handling.text} needs --tokenizer-model to become tokens")
    held_out = _held_out_shards(source)
    if held_out:
        return tokens_of_shards(source.model, held_out)
    return uniform_tokens(source.model)


def _encoder(source: WeightSource, handling: Handling) -> Callable[[str], Sequence[int]] | None:
    """From text to ids: the given tokenizer, or the one that lies beside imported weights."""
    if handling.tokenizer is not None:
        return handling.tokenizer.encode
    file = Path(source.where) / _TOKENIZER
    if not isinstance(source, HuggingFaceSource) or not file.is_file():
        return None
    import tokenizers

    library = tokenizers.Tokenizer.from_file(str(file))

    def encode(text: str) -> Sequence[int]:
        ids: list[int] = library.encode(text, add_special_tokens=False).ids
        return ids

    return encode


def _held_out_shards(source: WeightSource) -> Sequence[str]:
    """The shards of a run that is still where its data is; none otherwise."""
    if not isinstance(source, MegatronSource):
        return ()
    # The blend file, if it was one, may be elsewhere by now.
    with contextlib.suppress(DataError):
        for prefix in parse_blend(valid_paths(source.run))[0]:
            if Path(f"{expand(Path(prefix))[0]}.idx").is_file():
                return [prefix]
    return ()
