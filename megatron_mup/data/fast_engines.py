"""The fast engines: gigatoken (byte-pair encoding) and splintr (Unigram, and tokenizer.json).

Each wraps another package, imported only where the engine is built. A document on which the
package is known to leave the reference goes to the reference instead, so that an engine is exact
by construction where it can be; ``engines`` checks the rest. Only ``engines`` uses this module.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import re
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_mup.data.engine_models import (
    BPE,
    NORMAL,
    UNIGRAM,
    USER_DEFINED,
    EngineUnavailableError,
    bpe_json,
    check_unigram,
    imported,
    parsed_model,
    space_stand_in,
    text_changes,
    unigram_json,
)
from megatron_mup.data.near_ties import NearTies
from megatron_mup.data.tokenizer import SPACE_SYMBOL, Encoded, Tokenizer

UNIGRAM_CHARACTERS = 16384
"""Longer documents of a sentencepiece Unigram model go to the reference without a trial; see
``near_ties``, which would send nearly all of them there."""

GIGATOKEN_REBUILD_BYTES = {"huggingface": 32 << 20, "sentencepiece": 512 << 20}
"""Text after which gigatoken is built anew, by the kind of the tokenizer. It keeps every word it
has seen: the byte-level engine 8 bytes for each byte of text that never repeats, the other a fourth
of a byte for each byte of novels. Building takes 20 ms and 60 ms."""

_MARKER_PREFIX = 3

# Takes texts, returns their ids end to end and the number of ids of each.
RawEncode = Callable[[list[str]], tuple[NDArray[np.uint32], NDArray[np.int64]]]


@dataclass(frozen=True)
class ModelFacts:
    """What a choice of engine needs to know of a model."""

    algorithm: str
    """"BPE", "Unigram", or another model type of tokenizer.json."""

    markers: tuple[str, ...]
    """Spellings with a meaning of their own, which engines treat in different ways."""

    user_pieces: tuple[str, ...]
    """Pieces that are never split."""


def model_facts(tokenizer: Tokenizer) -> ModelFacts:
    """Read a model's facts from its file.

    Args:
        tokenizer: The tokenizer.

    Returns:
        The facts.

    Raises:
        EngineUnavailableError: A sentencepiece model, and the protobuf package is missing.
    """
    if tokenizer.kind == "huggingface":
        description = json.loads(tokenizer.model)
        added = description.get("added_tokens") or []
        return ModelFacts(
            algorithm=str(description["model"].get("type")),
            markers=tuple(token["content"] for token in added if token.get("special")),
            user_pieces=tuple(token["content"] for token in added if not token.get("special")),
        )
    proto = parsed_model(tokenizer)
    names = {UNIGRAM: "Unigram", BPE: "BPE"}
    return ModelFacts(
        algorithm=names.get(proto.trainer_spec.model_type, "word or char"),
        markers=tuple(p.piece for p in proto.pieces if p.type not in (NORMAL, USER_DEFINED)),
        user_pieces=tuple(p.piece for p in proto.pieces if p.type == USER_DEFINED),
    )


def fast_engines_for(tokenizer: Tokenizer, facts: ModelFacts) -> tuple[str, ...]:
    """Name the engines that may be for a model, the best first.

    Args:
        tokenizer: The tokenizer.
        facts: Its facts.

    Returns:
        Names of engines; none for a model type on which no engine gains.
    """
    if tokenizer.kind == "sentencepiece":
        # Not splintr: on Unigram models of sentencepiece it is 0.6 to 1.2 times as fast, measured
        # on English novels, on pieces of them, and on Python sources.
        return ("gigatoken",) if facts.algorithm == "BPE" else ()
    # On byte-level models splintr is as fast, and its memory is bounded.
    return {"BPE": ("splintr", "gigatoken"), "Unigram": ("splintr",)}.get(facts.algorithm, ())


class FastEngine:
    """A fast package, with the reference for the documents that it must not take."""

    def __init__(
        self,
        name: str,
        raw: RawEncode,
        *,
        tokenizer: Tokenizer,
        facts: ModelFacts,
        near_ties: NearTies | None = None,
    ) -> None:
        self.name = name
        self._raw, self._tokenizer, self._near_ties = raw, tokenizer, near_ties
        self._marked = _MarkerSearch(facts.markers)

    def encode_flat(self, texts: list[str]) -> Encoded:
        """Return the ids of the texts end to end, without bos and eod.

        Args:
            texts: Texts that UTF-8 can encode.

        Returns:
            The ids.
        """
        left = [number for number, text in enumerate(texts) if self._is_for_reference(text)]
        taken = texts
        if left:
            taken = list(texts)
            for number in left:
                taken[number] = ""
        fast = Encoded(*self._raw(taken))
        if self._near_ties is not None:
            left = sorted({*left, *self._near_ties.found_in(fast)})
        if not left:
            return fast
        slow = self._tokenizer.encode_flat([texts[number] for number in left])
        return _replaced(fast, slow, left)

    def _is_for_reference(self, text: str) -> bool:
        too_long = self._near_ties is not None and len(text) > UNIGRAM_CHARACTERS
        return too_long or SPACE_SYMBOL in text or self._marked.found_in(text)


def _replaced(fast: Encoded, slow: Encoded, places: list[int]) -> Encoded:
    """Put the reference's ids in the places of these documents."""
    kept = fast.lengths.copy()
    kept[places] = 0
    is_kept = np.repeat(kept == fast.lengths, fast.lengths)
    starts = (np.cumsum(kept) - kept)[places]
    ids = np.insert(fast.ids[is_kept], np.repeat(starts, slow.lengths), slow.ids)
    kept[places] = slow.lengths
    return Encoded(ids.astype(np.uint32, copy=False), kept)


class _MarkerSearch:
    """Finds out quickly whether a text spells one of many markers."""

    def __init__(self, markers: Sequence[str]) -> None:
        # Three steps, because a model may have 260 markers: most texts have none of their first
        # characters, few have one of their first three.
        self._firsts = sorted({marker[:1] for marker in markers})
        self._groups: dict[str, list[str]] = defaultdict(list)
        for marker in markers:
            self._groups[marker[:_MARKER_PREFIX]].append(marker)
        # Longest first, because a prefix may be the start of another.
        prefixes = sorted(self._groups, key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, prefixes)))

    def found_in(self, text: str) -> bool:
        """Tell whether the text spells a marker."""
        # A loop, and no any(): it is asked of every document.
        for first in self._firsts:
            if first in text:
                break
        else:
            return False
        prefixes = set(self._pattern.findall(text))
        return any(marker in text for prefix in prefixes for marker in self._groups[prefix])


@functools.lru_cache(maxsize=1)
def gigatoken_model(tokenizer: Tokenizer) -> bytes | None:
    """Translate a sentencepiece model for gigatoken, once for all workers.

    Args:
        tokenizer: The tokenizer.

    Returns:
        A tokenizer.json; None where gigatoken reads the model itself.

    Raises:
        EngineUnavailableError: A sentencepiece model, and the protobuf package is missing.
    """
    if tokenizer.kind != "sentencepiece":
        return None
    proto = parsed_model(tokenizer)
    is_bpe = proto.trainer_spec.model_type == BPE and proto.trainer_spec.byte_fallback
    return bpe_json(proto) if is_bpe and not text_changes(proto) else None


def build_gigatoken(tokenizer: Tokenizer, model: bytes | None = None) -> FastEngine:
    """Load the gigatoken engine.

    Args:
        tokenizer: The tokenizer that it replaces.
        model: What ``gigatoken_model`` gave; None asks it.

    Returns:
        The engine.

    Raises:
        EngineUnavailableError: The package is missing or refuses the model.
    """
    gigatoken = imported("gigatoken")
    build: Callable[[], Any]
    if tokenizer.kind == "sentencepiece":
        translated = model or gigatoken_model(tokenizer)

        def build() -> Any:
            if translated is None:
                return gigatoken.Tokenizer.from_sentencepiece(tokenizer.model).backend
            return gigatoken.Tokenizer.from_json(translated).backend
    else:
        from megatron_mup.data.huggingface_tokenizer import corpus_json

        text = corpus_json(tokenizer.model)

        def build() -> Any:
            return gigatoken.Tokenizer.from_json(text).backend

    explained = _refusal_explained("gigatoken", build)
    raw = _Gigatoken(explained, GIGATOKEN_REBUILD_BYTES[tokenizer.kind])
    return FastEngine("gigatoken", raw.encode, tokenizer=tokenizer, facts=model_facts(tokenizer))


class _Gigatoken:
    """Calls gigatoken's backend, and builds it anew before its memory grows."""

    def __init__(self, build: Callable[[], Any], rebuild_bytes: int) -> None:
        self._build, self._rebuild_bytes, self._seen = build, rebuild_bytes, 0
        self._backend = build()

    def encode(self, texts: list[str]) -> tuple[NDArray[np.uint32], NDArray[np.int64]]:
        # One by one: as fast as a batch, which would load Awkward Array (0.2 s) for its result.
        parts = [self._backend.encode(text) for text in texts]
        self._seen += sum(map(len, texts))
        if self._seen > self._rebuild_bytes:
            # Dropped first, so that there are never two.
            self._backend = None
            self._backend, self._seen = self._build(), 0
        lengths = np.fromiter(map(len, parts), np.int64, len(parts))
        return np.concatenate(parts) if parts else np.empty(0, np.uint32), lengths


def build_splintr(tokenizer: Tokenizer) -> FastEngine:
    """Load the splintr engine.

    Args:
        tokenizer: The tokenizer that it replaces.

    Returns:
        The engine.

    Raises:
        EngineUnavailableError: The package is missing or refuses the model.
    """
    # Read at splintr's first use; parallelism comes from worker processes.
    os.environ["RAYON_NUM_THREADS"] = "1"
    splintr = imported("splintr")
    facts = model_facts(tokenizer)
    near_ties = None
    if tokenizer.kind == "sentencepiece":
        proto = parsed_model(tokenizer)
        check_unigram(proto)
        space = space_stand_in(proto)
        description = unigram_json(proto, space)
        facts = dataclasses.replace(facts, markers=(*facts.markers, space))
        near_ties = _near_ties(proto)
    else:
        from megatron_mup.data.huggingface_tokenizer import corpus_json

        description = corpus_json(tokenizer.model).encode("utf-8")
    model = _refusal_explained("splintr", lambda: splintr.from_json_bytes(description))()

    def encode(texts: list[str]) -> tuple[NDArray[np.uint32], NDArray[np.int64]]:
        ids, offsets = model.encode_batch_flat(texts)
        ends = np.frombuffer(offsets, np.int64)
        return np.frombuffer(ids, np.uint32), ends[1:] - ends[:-1]

    return FastEngine("splintr", encode, tokenizer=tokenizer, facts=facts, near_ties=near_ties)


def _near_ties(proto: Any) -> NearTies:
    pieces = enumerate(proto.pieces)
    learned = {piece.piece: number for number, piece in pieces if piece.type == NORMAL}
    return NearTies(learned, np.array([piece.score for piece in proto.pieces]))


def _refusal_explained(engine: str, build: Callable[[], Any]) -> Callable[[], Any]:
    """Turn what a package raises on a model that it does not know into one error."""

    def explained() -> Any:
        try:
            return build()
        except Exception as error:
            raise EngineUnavailableError(f"{engine} does not take this model: {error}") from error

    return explained
