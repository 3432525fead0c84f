"""The loss's denominator, evaluation, and an update that is left out."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from megatron_mup.config import LossDenominator
from megatron_mup.training.batches import Batch, micro_batches
from megatron_mup.training.processes import Launch, parallel_processes
from megatron_mup.training.state import TrainState, build_state
from megatron_mup.training.step import evaluate_batches, loss_function, train_step
from tests.configurations import tiny
from tests.random_samples import RandomSamples


@contextmanager
def fresh_state(*overrides: str) -> Iterator[TrainState]:
    """A state of one rank."""
    run = tiny("lr_warmup_iters=0", *overrides)
    with parallel_processes(run, Launch()):
        yield build_state(run)


def two_batches() -> Iterator[Batch]:
    """The microbatches of one step."""
    return micro_batches(RandomSamples(96, 16), first=0, batch_size=4, micro_batch_size=2)


def weights(state: TrainState) -> torch.Tensor:
    """All weights, in one vector."""
    return torch.cat([p.detach().flatten() for p in state.model_chunks[0].parameters()]).clone()


@pytest.mark.parametrize(
    ("denominator", "count"), [(LossDenominator.TOKENS, 3), (LossDenominator.POSITIONS, 8)]
)
def test_loss_is_a_sum_with_the_count_that_will_divide_it(
    denominator: LossDenominator, count: int
) -> None:
    losses = torch.arange(8.0).view(2, 4)
    mask = torch.tensor([[0, 1, 0, 0], [0, 1, 0, 1]]).float()

    total, divisor, report = loss_function(mask, denominator, losses)

    assert total.item() == 1 + 5 + 7
    assert (divisor.item(), divisor.dtype) == (count, torch.int)
    # What is reported is per unmasked token either way.
    assert report["lm loss"].tolist() == [13, 3]


@pytest.mark.parametrize(
    "overrides",
    [
        (),
        (
            "use_distributed_optimizer=true",
            "overlap_grad_reduce=true",
            "overlap_param_gather=true",
        ),
    ],
)
def test_evaluation_changes_nothing_and_sees_the_latest_weights(overrides: tuple[str, ...]) -> None:
    with fresh_state(*overrides) as state:
        train_step(state, two_batches(), 2)
        before = weights(state)
        first = evaluate_batches(state, two_batches(), 2)
        again = evaluate_batches(state, two_batches(), 2)
        step = train_step(state, two_batches(), 2)

        assert torch.equal(first, again)
        assert torch.equal(first, step.loss_sum_and_tokens)
        assert all(chunk.training for chunk in state.wrapped_chunks)
        assert not torch.equal(before, weights(state))


def test_vetoed_step_counts_but_leaves_the_weights() -> None:
    asked = []

    def judge(loss_sum_and_tokens: torch.Tensor, norm: float) -> bool:
        asked.append((loss_sum_and_tokens.tolist()[1], norm))
        return True

    with fresh_state() as state:
        before = weights(state)
        report = train_step(state, two_batches(), 2, judge=judge)

        assert not report.updated
        assert state.iteration == 1
        assert asked == [(64, report.grad_norm)]
        assert torch.equal(before, weights(state))


def test_deterministic_steps_repeat_bit_for_bit() -> None:
    norms = []
    for _ in range(2):
        with fresh_state("deterministic_mode=true", "attention_backend=local") as state:
            norms.append([train_step(state, two_batches(), 2).grad_norm for _ in range(3)])

    assert norms[0] == norms[1]
