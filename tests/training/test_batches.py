"""Which samples each step and each rank reads, with literal sample numbers."""

from __future__ import annotations

import pytest
import torch
from megatron.core import parallel_state
from torch import Tensor

from megatron_mup.config import TrainingConfig
from megatron_mup.training.batches import (
    context_parts,
    global_batch_size,
    micro_batches,
    samples_after,
)

KEYS = ("tokens", "labels", "loss_mask", "position_ids")


class NumberedSamples:
    """Sample n holds n in its tokens, n + 100 in its labels."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        if not 0 <= index < self.size:
            raise IndexError(index)
        return {
            "tokens": torch.tensor([index, index]),
            "labels": torch.tensor([index + 100, index + 100]),
            "loss_mask": torch.ones(2),
            "position_ids": torch.tensor([0, 1]),
            "unused": torch.zeros(1),
        }


def training(batch: int, rampup: list[int] | None = None) -> TrainingConfig:
    return TrainingConfig(
        train_iters=1, global_batch_size=batch, micro_batch_size=1, rampup_batch_size=rampup
    )


def numbers(
    size: int = 100, *, first: int, batch: int, micro: int, rank: int = 0, ranks: int = 1
) -> list[list[int]]:
    batches = micro_batches(
        NumberedSamples(size),
        first=first,
        batch_size=batch,
        micro_batch_size=micro,
        data_rank=rank,
        data_size=ranks,
    )
    return [batch["tokens"][:, 0].tolist() for batch in batches]


def test_batch_without_rampup_is_constant() -> None:
    assert [global_batch_size(training(8), seen) for seen in (0, 7, 10**9)] == [8, 8, 8]


@pytest.mark.parametrize(
    ("consumed", "batch"),
    # From 4 to 12 in two increments: one for each half of 20 samples.
    [(0, 4), (9, 4), (10, 8), (19, 8), (20, 12), (10**9, 12)],
)
def test_rampup_grows_after_equal_shares_of_its_samples(consumed: int, batch: int) -> None:
    assert global_batch_size(training(12, [4, 4, 20]), consumed) == batch


def test_samples_after_counts_the_growing_batches() -> None:
    # Steps of 4, 4, 4 (12 consumed), 8 (20 consumed), then 12 each.
    config = training(12, [4, 4, 20])

    assert [samples_after(config, steps) for steps in range(7)] == [0, 4, 8, 12, 20, 32, 44]


def test_samples_after_without_rampup_is_a_product() -> None:
    assert samples_after(training(8), 5) == 40
    assert samples_after(training(8), 0) == 0


def test_one_rank_reads_consecutive_samples_in_microbatches() -> None:
    assert numbers(first=6, batch=6, micro=2) == [[6, 7], [8, 9], [10, 11]]


def test_ranks_take_turns_by_microbatch() -> None:
    assert numbers(first=8, batch=8, micro=2, rank=0, ranks=2) == [[8, 9], [12, 13]]
    assert numbers(first=8, batch=8, micro=2, rank=1, ranks=2) == [[10, 11], [14, 15]]


@pytest.mark.parametrize(("micro", "ranks"), [(1, 1), (1, 4), (2, 2), (4, 1), (4, 2), (8, 1)])
def test_each_step_reads_the_same_samples_in_every_layout(micro: int, ranks: int) -> None:
    read = [
        number
        for rank in range(ranks)
        for rows in numbers(first=24, batch=8, micro=micro, rank=rank, ranks=ranks)
        for number in rows
    ]

    assert sorted(read) == [24, 25, 26, 27, 28, 29, 30, 31]


def test_sample_numbers_wrap_around_the_dataset() -> None:
    assert numbers(5, first=3, batch=4, micro=2) == [[3, 4], [0, 1]]


def test_microbatch_stacks_the_four_tensors_of_training() -> None:
    batch = next(micro_batches(NumberedSamples(9), first=0, batch_size=3, micro_batch_size=3))

    assert tuple(batch) == KEYS
    assert all(tensor.shape == (3, 2) for tensor in batch.values())
    assert batch["labels"][:, 0].tolist() == [100, 101, 102]
    assert batch["position_ids"].tolist() == [[0, 1], [0, 1], [0, 1]]
    assert batch["tokens"].dtype == torch.int64


def test_context_ranks_take_an_early_and_a_late_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    batch = {"tokens": torch.arange(8)[None], "position_ids": torch.arange(8)[None]}
    read = []
    for rank in range(2):
        monkeypatch.setattr(parallel_state, "get_context_parallel_world_size", lambda: 2)
        monkeypatch.setattr(parallel_state, "get_context_parallel_group", lambda: "group")
        monkeypatch.setattr(torch.distributed, "get_world_size", lambda group: 2)
        monkeypatch.setattr(torch.distributed, "get_rank", lambda group, rank=rank: rank)
        (part,) = context_parts(iter([dict(batch)]))
        assert torch.equal(part["tokens"], part["position_ids"])
        read.append(part["position_ids"].tolist())

    # Four chunks of two: 0 and 3, 1 and 2.
    assert read == [[[0, 1, 6, 7]], [[2, 3, 4, 5]]]


def test_batches_pass_unchanged_without_context_parallelism(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(parallel_state, "get_context_parallel_world_size", lambda: 1)
    batches = iter([{"tokens": torch.zeros(1)}])

    assert context_parts(batches) is batches
