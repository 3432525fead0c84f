"""Near ties of a Unigram model: where rounding decides how a text is cut.

sentencepiece adds the scores of a document's pieces in 32 bits, from its beginning, so that far
into a document two ways to cut a word whose scores are nearly the same are told apart by rounding
alone. An engine that adds in 64 bits then cuts differently. Such a tie is nearly always between
two pieces and the same text with another boundary ("qu ar", "qua r"; "- --", "-- -"), and those
are known from the vocabulary: a document in which one occurs is left to sentencepiece itself.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from megatron_mup.data.tokenizer import Encoded

NEAR = 0.004
"""Difference of scores (natural logarithms) up to which rounding may decide: each of two sums has
two roundings of half the distance of 32-bit numbers, which is 1/512 up to ``LARGEST_SUM``."""

LARGEST_SUM = 2.0**15
"""Documents whose scores add up to more, about 17,000 characters of English, are left out too."""

_TABLE_BITS = 20


class NearTies:
    """Finds the texts whose pieces hold a near tie."""

    def __init__(self, pieces: Mapping[str, int], scores: NDArray[np.float64]) -> None:
        """Find the near ties of a vocabulary.

        Args:
            pieces: The ids of the learned pieces by their spelling.
            scores: The score of each id.
        """
        self._vocab_size = len(scores)
        # sentencepiece's price of a character without a piece, which is then spelled in bytes.
        unknown = scores.min() - 10.0
        self._prices = -np.where(scores < 0.0, scores, unknown).astype(np.float32)
        self._pairs = _tied_pairs(pieces, scores)
        # Most pairs are ruled out by a table that stays in the processor's cache.
        self._table = np.zeros(1 << _TABLE_BITS, np.bool_)
        first, second = np.divmod(self._pairs, self._vocab_size)
        self._table[_slots(first.astype(np.uint32), second.astype(np.uint32))] = True

    def found_in(self, encoded: Encoded) -> list[int]:
        """Return the numbers of the texts that hold a near tie, or are too long to tell.

        Args:
            encoded: The ids of texts.

        Returns:
            Numbers in ascending order; a text beside one with a near tie may be among them.
        """
        ids = encoded.ids.astype(np.uint32, copy=False)
        if len(ids) == 0:
            return []
        likely = np.flatnonzero(self._table[_slots(ids[:-1], ids[1:])])
        pairs = ids[likely].astype(np.int64) * self._vocab_size + ids[likely + 1]
        tied = likely[np.isin(pairs, self._pairs)]
        ends = np.cumsum(encoded.lengths)
        texts = np.flatnonzero(encoded.lengths)
        totals = np.add.reduceat(self._prices[ids], (ends - encoded.lengths)[texts])
        large = texts[totals > LARGEST_SUM]
        found = np.union1d(np.searchsorted(ends, tied, side="right"), large)
        numbers: list[int] = found.tolist()
        return numbers


def _slots(first: NDArray[np.uint32], second: NDArray[np.uint32]) -> NDArray[np.uint32]:
    # Multiplication by a large odd number spreads neighbours; the high bits are the best mixed.
    mixed = (first * np.uint32(2654435761)) ^ (second * np.uint32(2246822519))
    return mixed >> np.uint32(32 - _TABLE_BITS)


def _tied_pairs(pieces: Mapping[str, int], scores: NDArray[np.float64]) -> NDArray[np.int64]:
    """Return the pairs ``first * vocab_size + second`` that tie with another pair, sorted.

    Pairs A B and C D of the same text are those where C is A + M and B is M + D. They tie where
    C - A and B - D, the differences of the scores that M makes, are nearly the same.
    """
    longer_before: dict[str, list[tuple[int, int]]] = defaultdict(list)
    longer_after: dict[str, list[tuple[int, int]]] = defaultdict(list)
    for piece, number in pieces.items():
        for cut in range(1, len(piece)):
            left, right = piece[:cut], piece[cut:]
            if left in pieces:
                longer_before[right].append((number, pieces[left]))
            if right in pieces:
                longer_after[left].append((number, pieces[right]))
    tied = [np.empty(0, np.int64)]
    for middle in longer_before.keys() & longer_after.keys():
        c, a = np.array(longer_before[middle], np.int64).T
        b, d = np.array(longer_after[middle], np.int64).T
        b_minus_d = scores[b] - scores[d]
        order = np.argsort(b_minus_d)
        b, d, b_minus_d = b[order], d[order], b_minus_d[order]
        c_minus_a = scores[c] - scores[a]
        low = np.searchsorted(b_minus_d, c_minus_a - NEAR, side="left")
        high = np.searchsorted(b_minus_d, c_minus_a + NEAR, side="right")
        for place in np.flatnonzero(high > low):
            near = slice(low[place], high[place])
            tied.append(a[place] * len(scores) + b[near])
            tied.append(c[place] * len(scores) + d[near])
    return np.unique(np.concatenate(tied))
