"""Engines: faster libraries that make the same ids as the tokenizer's own.

The reference is the library that defines the model (``tokenizer``). A faster engine is taken only
where it is known to agree: on a sample of the corpus and on hard strings before the run
(``choose_engine``), and on one document of 1024 during it (``audit``). The ids therefore never
depend on the engine. The libraries themselves are in ``fast_engines``.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol

from megatron_mup.data.engine_models import EngineUnavailableError
from megatron_mup.data.fast_engines import (
    build_gigatoken,
    build_splintr,
    fast_engines_for,
    gigatoken_model,
    model_facts,
)
from megatron_mup.data.tokenizer import Encoded, Tokenizer
from megatron_mup.errors import DataError

logger = logging.getLogger(__name__)

REFERENCE = "reference"
"""Name of the engine that defines the ids."""

AUDITED_SHARE = 1024
"""One document of so many is encoded a second time, by the reference, during a run."""

_AUDIT_BYTES = slice(20, 22)
"""The bytes of the SHA-256 digest that choose; the split uses the first 8, duplicates the first
16."""

WORTHWHILE_SPEEDUP = 1.25
"""An engine that gains less on the sample is not taken: it starts more slowly, and the reference is
exact by definition (our choice)."""

# Less text than this tells nothing about speed.
_TIMED_CHARACTERS = 100_000

_SHOWN_CHARACTERS = 40
_SHOWN_IDS = 8
_TRIED_PIECES = 512
_BATCH = 64

HARD_STRINGS = (
    "",
    " ",
    "  leading and trailing  ",
    "a b  c   d    e     f      g" + " " * 70 + "h",
    "\n",
    "\n\n\n a\n \n  b\n",
    "a\rb\r\nc\r\r\n",
    "\ttab\t\ttab\v\f",
    "nul \0 and \x01\x02\x1b\x7f\x85",
    "</s>",
    "a</s>b <s>c<unk>d<pad> <0x0A><0xE2> <|endoftext|> [INST]",
    "<unused_0> <|im_start|>user\n<|im_end|>",
    "\u2581",
    "a\u2581b \u2581\u2581 c",
    "\u00e9 e\u0301 \u1e9b\u0323 \ufb01 \u212b \u00c5 A\u030a",
    "\u00a0no-break\u2003em\u3000wide\u200bzero\u200d\ufeff",
    "\U0001f600\U0001f468\u200d\U0001f469\u200d\U0001f467 \U0001f1e9\U0001f1ea \u2764\ufe0f",
    "\u4e2d\u6587\u6587\u672c\u3002\u65e5\u672c\u8a9e\u30c6\u30ad\u30b9\u30c8 \ud55c\uad6d\uc5b4",
    "\u0627\u0644\u0639\u0631\u0628\u064a\u0629 \u05e9\u05dc\u05d5\u05dd \u0939\u093f\u0928\u094d",
    "\u0378\U000e0fff\ufffe\uffff\U0010ffff\ue000\ufffd",
    "Zalgo a\u0300\u0301\u0302\u0303\u0304\u0305\u0306",
    "def f(x):\n    return {'a': [1, 2.5e-10, 0xFF], \"b\": x ** 2}  # comment\n\n\n",
    "1234567890 3.14159 1,000,000 2024-01-31 $5 50%",
    "It's o'clock, don't we'll I'VE \u2018quoted\u2019 \u2014 dash\u2026",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa",
    "https://example.com/a_b-c?d=e&f=%20#g  user@host C:\\dir\\file.txt",
)
"""Texts on which tokenizers are known to differ."""


class EngineOption(StrEnum):
    """The values of --engine."""

    auto = "auto"
    reference = "reference"
    gigatoken = "gigatoken"
    splintr = "splintr"


class Engine(Protocol):
    """Something that encodes texts."""

    name: str

    def encode_flat(self, texts: list[str]) -> Encoded:
        """Return the ids of the texts end to end, without bos and eod."""


class _Reference:
    """The tokenizer's own library."""

    name = REFERENCE

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer

    def encode_flat(self, texts: list[str]) -> Encoded:
        return self._tokenizer.encode_flat(texts)


def engine_model(tokenizer: Tokenizer, name: str) -> bytes | None:
    """Translate a model for an engine, where that takes longer than all else of its start.

    Args:
        tokenizer: The tokenizer.
        name: What ``choose_engine`` returned.

    Returns:
        For ``build_engine`` in other processes; None if there is nothing to translate.
    """
    return gigatoken_model(tokenizer) if name == "gigatoken" else None


def build_engine(tokenizer: Tokenizer, name: str, model: bytes | None = None) -> Engine:
    """Load an engine into this process.

    Args:
        tokenizer: The tokenizer that it replaces.
        name: What ``choose_engine`` returned.
        model: What ``engine_model`` returned; None translates the model here if need be.

    Returns:
        The engine.

    Raises:
        DataError: The engine's package is missing, or it cannot take this model.
    """
    if name == REFERENCE:
        return _Reference(tokenizer)
    try:
        if name == "gigatoken":
            return build_gigatoken(tokenizer, model)
        if name == "splintr":
            return build_splintr(tokenizer)
    except EngineUnavailableError as error:
        raise DataError(f"--engine {name} cannot be used: {error}; pass --engine auto") from error
    raise DataError(f"--engine is {name!r}; pass one of {', '.join(EngineOption)}")


def choose_engine(tokenizer: Tokenizer, option: EngineOption, sample: Sequence[str]) -> str:
    """Choose the engine of a run, after a comparison with the reference.

    Args:
        tokenizer: The tokenizer.
        option: What the user asked for; auto takes the fast engine for the model's type if it is
            installed and agrees on everything, else the reference, and logs why.
        sample: The first documents of the corpus.

    Returns:
        The name for ``build_engine``.

    Raises:
        DataError: The engine that the user named is missing, not for this model, or disagrees.
    """
    if option is EngineOption.reference:
        return REFERENCE
    if option is EngineOption.auto:
        return _choose_automatically(tokenizer, sample)
    difference = find_difference(tokenizer, build_engine(tokenizer, option.value), sample)
    if difference is not None:
        raise DataError(
            f"--engine {option.value} makes other ids than the reference: {difference}; pass "
            "--engine auto or --engine reference"
        )
    return option.value


def _choose_automatically(tokenizer: Tokenizer, sample: Sequence[str]) -> str:
    reasons = []
    try:
        for name in fast_engines_for(tokenizer, model_facts(tokenizer)):
            try:
                engine = build_engine(tokenizer, name)
            except DataError as error:
                reasons.append(str(error))
                continue
            found = compare(tokenizer, engine, sample)
            if found.difference is not None:
                logger.warning(
                    "engine %s makes other ids than the reference and is not used: %s",
                    name,
                    found.difference,
                )
            elif found.characters >= _TIMED_CHARACTERS and found.speedup < WORTHWHILE_SPEEDUP:
                reasons.append(
                    f"engine {name} gains too little ({found.speedup:.2f} times as fast)"
                )
            else:
                return name
    except EngineUnavailableError as error:
        reasons.append(str(error))
    logger.info(
        "tokenizing with the reference engine: %s",
        "; ".join(reasons) or "no fast engine gains on this type of model",
    )
    return REFERENCE


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """An engine beside the reference on a sample of the corpus."""

    difference: str | None
    """The first difference in words; None if there is none."""

    characters: int
    """Length of the sample."""

    speedup: float
    """The reference's CPU time for the sample, divided by the engine's."""


def compare(tokenizer: Tokenizer, engine: Engine, sample: Sequence[str]) -> Comparison:
    """Compare an engine with the reference.

    Args:
        tokenizer: The reference.
        engine: The engine.
        sample: Texts to compare on, besides the hard strings and the model's own pieces.

    Returns:
        Whether they agree, and which is faster on the sample.
    """
    facts = model_facts(tokenizer)
    pieces = [*facts.user_pieces, *facts.markers][:_TRIED_PIECES]
    own = [f"a{piece}b {piece} {piece}{piece}" for piece in pieces]
    difference = _difference(tokenizer, engine, [*HARD_STRINGS, *own])[0]
    engine_seconds = reference_seconds = 0.0
    for start in range(0, len(sample), _BATCH):
        if difference is not None:
            break
        difference, *seconds = _difference(tokenizer, engine, sample[start : start + _BATCH])
        engine_seconds += seconds[0]
        reference_seconds += seconds[1]
    return Comparison(
        difference=difference,
        characters=sum(map(len, sample)),
        speedup=reference_seconds / max(engine_seconds, 1e-9),
    )


def find_difference(tokenizer: Tokenizer, engine: Engine, sample: Sequence[str]) -> str | None:
    """Return the first difference between an engine and the reference; None if there is none."""
    return compare(tokenizer, engine, sample).difference


def _difference(
    tokenizer: Tokenizer, engine: Engine, texts: Sequence[str]
) -> tuple[str | None, float, float]:
    """The first difference in words, and the CPU seconds of the engine and of the reference."""
    begun = time.process_time()
    encoded = engine.encode_flat(list(texts))
    middle = time.process_time()
    wrong = _first_difference(tokenizer, texts, encoded, range(len(texts)))
    seconds = middle - begun, time.process_time() - middle
    if wrong is None:
        return None, *seconds
    text = texts[wrong]
    return _description(text, tokenizer.encode(text), _ids(encoded, wrong)), *seconds


def _description(text: str, expected: list[int], found: list[int]) -> str:
    """Say where two encodings of a text part."""
    pairs = enumerate(zip(expected, found, strict=False))
    first = next((at for at, (a, b) in pairs if a != b), min(len(expected), len(found)))
    shown = text if len(text) <= _SHOWN_CHARACTERS else text[:_SHOWN_CHARACTERS] + "..."
    end = first + _SHOWN_IDS
    return (
        f"the text {shown!r} ({len(text)} characters) gives {found[first:end]} at token {first}, "
        f"the reference {expected[first:end]}"
    )


def is_audited(digest: bytes) -> bool:
    """Tell whether a document is encoded a second time, by the reference.

    Args:
        digest: The SHA-256 digest of the document's text, 32 bytes.

    Returns:
        True for one document of ``AUDITED_SHARE``.
    """
    return int.from_bytes(digest[_AUDIT_BYTES], "big") % AUDITED_SHARE == 0


def audit(
    tokenizer: Tokenizer, texts: list[str], encoded: Encoded, digests: list[bytes]
) -> int | None:
    """Compare the audited documents of a batch with the reference.

    Args:
        tokenizer: The reference.
        texts: The documents.
        encoded: The engine's ids of the documents.
        digests: The SHA-256 digests of their texts, 32 bytes each.

    Returns:
        The index of the first audited document whose ids differ; None if there is none.
    """
    chosen = [number for number, digest in enumerate(digests) if is_audited(digest)]
    return _first_difference(tokenizer, texts, encoded, chosen)


def _first_difference(
    tokenizer: Tokenizer, texts: Sequence[str], encoded: Encoded, chosen: Sequence[int]
) -> int | None:
    """Return the first of the chosen texts whose ids differ from the reference's."""
    # Most batches have none, and sentencepiece takes half a millisecond to encode nothing.
    if not chosen:
        return None
    if len(encoded.lengths) != len(texts) or int(encoded.lengths.sum()) != len(encoded.ids):
        return 0
    reference = tokenizer.encode_flat([texts[number] for number in chosen])
    for place, number in enumerate(chosen):
        if _ids(reference, place) != _ids(encoded, number):
            return number
    return None


def _ids(encoded: Encoded, number: int) -> list[int]:
    end = int(encoded.lengths[: number + 1].sum())
    ids: list[int] = encoded.ids[end - int(encoded.lengths[number]) : end].tolist()
    return ids
