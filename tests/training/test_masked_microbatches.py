"""One division by the whole step's count, however the unmasked tokens fall into microbatches."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from megatron_mup.training.batches import Batch, micro_batches
from megatron_mup.training.step import train_step
from tests.random_samples import RandomSamples
from tests.training.test_step import fresh_state


def masked(rows_at_a_time: int) -> Iterator[Batch]:
    """Four rows of 16 positions, of which 1, 2, 14 and 16 carry a loss."""
    samples = RandomSamples(96, 16)
    batches = micro_batches(samples, first=0, batch_size=4, micro_batch_size=rows_at_a_time)
    kept = iter([1, 2, 14, 16])
    for batch in batches:
        for row in batch["loss_mask"]:
            row[next(kept) :] = 0.0
        yield batch


@pytest.mark.parametrize("denominator", ["tokens", "positions"])
def test_the_gradient_does_not_depend_on_how_rows_are_cut_into_microbatches(
    denominator: str,
) -> None:
    norms = []
    for rows in (4, 2, 1):
        options = (f"loss_denominator={denominator}", f"micro_batch_size={rows}")
        with fresh_state(*options) as state:
            report = train_step(state, masked(rows), 4 // rows)
            assert report.loss_sum_and_tokens.tolist()[1] == 33
            norms.append(report.grad_norm)
    assert norms[1:] == pytest.approx([norms[0]] * 2, rel=1e-5)
