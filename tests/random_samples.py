"""Samples of random tokens, for tests that need no text."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor


class RandomSamples:
    """Packed random tokens with a full loss mask; the same for every process."""

    def __init__(self, vocab_size: int, seq_length: int, count: int = 64, seed: int = 0) -> None:
        generator = np.random.default_rng(seed)
        # Squared uniform ranks, so that a model has a unigram distribution to learn.
        ranks = generator.random((count, seq_length + 1)) ** 2
        self.tokens = torch.from_numpy((ranks * vocab_size).astype(np.int64))

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int) -> Mapping[str, Tensor]:
        row = self.tokens[index]
        return {
            "tokens": row[:-1],
            "labels": row[1:],
            "loss_mask": torch.ones(len(row) - 1),
            "position_ids": torch.arange(len(row) - 1),
        }
