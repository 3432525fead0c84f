"""Samples of padded documents, whose number of unmasked tokens differs from sample to sample."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from tests.random_samples import RandomSamples


class MaskedSamples:
    """Random documents that end early, the rest of the sequence padding without loss."""

    def __init__(self, vocab_size: int, seq_length: int) -> None:
        self.samples = RandomSamples(vocab_size, seq_length)
        self.seq_length = seq_length

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Mapping[str, Tensor]:
        # 1, 12, 7, 2, 13, ... of 16: neighbours, which go to different ranks, differ much.
        length = 1 + index * 11 % self.seq_length
        inside = torch.arange(self.seq_length) < length
        sample = dict(self.samples[index])
        return sample | {"tokens": sample["tokens"] * inside, "loss_mask": inside.float()}
