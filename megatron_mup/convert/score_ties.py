"""Whether two cuts of a text by a Unigram model differ by rounding alone.

sentencepiece adds the scores of pieces in 32 bits from the beginning of a text. Between two places
where both cuts have a boundary, its choice is the best one but for its roundings there, each at
most half the distance of 32-bit numbers at the sum so far. What differs by more is another
tokenizer. Reads no text.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import numpy as np

NORMAL, BYTE = 1, 6
"""Types of pieces in a sentencepiece model: learned from text, and one byte."""

_UNKNOWN_PENALTY = 10.0
"""sentencepiece's price of a character without a piece, above that of the rarest piece."""


def is_tie(proto: Any, expected: Sequence[int], found: Sequence[int]) -> bool:
    """Compare two cuts of one text, span by span.

    Args:
        proto: The parsed model file of a Unigram model.
        expected: The ids by sentencepiece.
        found: The ids by scores added in 64 bits.

    Returns:
        Whether each span on which they differ scores the same, as far as sentencepiece can tell.
    """
    own_ends, other_ends = (
        {end: count for count, end in enumerate(accumulate(_bytes(proto, ids)), start=1)}
        for ids in (expected, found)
    )
    if list(own_ends)[-1:] != list(other_ends)[-1:]:
        return False
    unknown = _UNKNOWN_PENALTY + max(
        abs(piece.score) for piece in proto.pieces if piece.type == NORMAL
    )
    before, own_first, other_first = 0.0, 0, 0
    for end in (end for end in own_ends if end in other_ends):
        own = expected[own_first : own_ends[end]]
        other = found[other_first : other_ends[end]]
        before += _size(proto, own, unknown)
        if own != other and not _scores_alike(proto, own, other, before):
            return False
        own_first, other_first = own_ends[end], other_ends[end]
    return True


def _bytes(proto: Any, ids: Sequence[int]) -> list[int]:
    """Bytes of text that each piece stands for; of a special piece, those of its name."""
    pieces = [proto.pieces[token] for token in ids]
    return [1 if piece.type == BYTE else len(piece.piece.encode()) for piece in pieces]


def _size(proto: Any, ids: Sequence[int], unknown: float) -> float:
    """A bound on what the pieces add to the size of sentencepiece's sum."""
    pieces = zip((proto.pieces[token] for token in ids), _bytes(proto, ids), strict=True)
    return sum(
        abs(piece.score) if piece.type == NORMAL else unknown * length for piece, length in pieces
    )


def _scores_alike(proto: Any, own: Sequence[int], other: Sequence[int], total: float) -> bool:
    if any(proto.pieces[token].type != NORMAL for token in (*own, *other)):
        return False
    scores = [sum(proto.pieces[token].score for token in ids) for ids in (own, other)]
    difference = float(abs(scores[0] - scores[1]))
    half_step = float(np.spacing(np.float32(total + difference))) / 2
    return difference <= half_step * (len(own) + len(other))
