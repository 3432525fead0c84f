"""One document a sequence, padded or cut, with the loss masked behind its end: arXiv:2404.05728.

Targets are a document's first S tokens, its end-of-document token included; inputs are the targets
shifted right behind a begin token; positions behind the first end of document carry no loss.
Documents are shuffled anew in each epoch by a keyed permutation that is computed one number at a
time, so a corpus of 10^9 documents needs no index in memory.
"""

from __future__ import annotations

import bisect
import hashlib
from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from megatron_mup import platform
from megatron_mup.errors import DataError

_ROUNDS = 6
"""Rounds of the Feistel network; four make a pseudorandom permutation (Luby and Rackoff 1988)."""


def shuffled(index: int, size: int, *, key: str) -> int:
    """Where a keyed permutation of ``range(size)`` takes one number.

    A Feistel network over the next even number of bits; numbers that leave the range are sent
    through again (cycle walking), four times at most on average.

    Args:
        index: number below ``size``.
        size: how many there are.
        key: names the permutation.

    Returns:
        Another number below ``size``, a different one for each index.
    """
    half = max(1, (max(size - 1, 1).bit_length() + 1) // 2)
    mask = (1 << half) - 1
    while True:
        left, right = index >> half, index & mask
        for number in range(_ROUNDS):
            digest = hashlib.blake2b(f"{key}/{number}/{right}".encode(), digest_size=8).digest()
            left, right = right, left ^ (int.from_bytes(digest, "little") & mask)
        index = left << half | right
        if index < size:
            return index


class PaddedDocuments:
    """Samples of one document each.

    Args:
        prefixes: token shards.
        seq_length: S.
        eod: end-of-document token; pads as well.
        bos: token in front of the inputs.
        seed: of the shuffle.
        samples: how many samples are asked for; documents repeat after an epoch.

    Raises:
        DataError: the shards hold no document.
    """

    def __init__(
        self,
        prefixes: Sequence[str],
        *,
        seq_length: int,
        eod: int,
        bos: int,
        seed: int,
        samples: int,
    ) -> None:
        platform.prepare()
        from megatron.core.datasets.indexed_dataset import IndexedDataset

        self._shards: list[Any] = [IndexedDataset(prefix) for prefix in prefixes]
        counts = [len(shard.document_indices) - 1 for shard in self._shards]
        self._ends = list(accumulate(counts))
        self.documents = self._ends[-1] if self._ends else 0
        if self.documents < 1:
            raise DataError(f"the shards {list(prefixes)} hold no document; preprocess more text")
        self._seq_length, self._eod, self._bos = seq_length, eod, bos
        self._seed, self._samples = seed, samples

    def __len__(self) -> int:
        """Number of samples."""
        return self._samples

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """The sample with this number: tokens, labels, loss_mask, position_ids, each [S]."""
        epoch, number = divmod(index, self.documents)
        document = shuffled(number, self.documents, key=f"{self._seed}/{epoch}")
        return self._sample(self._tokens(document))

    def _tokens(self, document: int) -> NDArray[np.int64]:
        """The first S tokens of a document; sequences of one document follow each other."""
        place = bisect.bisect_right(self._ends, document)
        shard = self._shards[place]
        local = document - (self._ends[place - 1] if place else 0)
        parts, missing = [], self._seq_length
        for sequence in range(*shard.document_indices[local : local + 2].tolist()):
            length = min(missing, int(shard.sequence_lengths[sequence]))
            if length > 0:
                parts.append(shard.get(sequence, offset=0, length=length))
                missing -= length
        return np.concatenate([*parts, []]).astype(np.int64)

    def _sample(self, document: NDArray[np.int64]) -> dict[str, Tensor]:
        labels = np.full(self._seq_length, self._eod, dtype=np.int64)
        labels[: len(document)] = document
        ends = np.flatnonzero(labels == self._eod)
        mask = np.zeros(self._seq_length, dtype=np.float32)
        mask[: ends[0] + 1 if len(ends) else self._seq_length] = 1.0
        tokens = np.concatenate([[self._bos], labels[:-1]])
        return {
            "tokens": torch.from_numpy(tokens),
            "labels": torch.from_numpy(labels),
            "loss_mask": torch.from_numpy(mask),
            "position_ids": torch.arange(self._seq_length),
        }
