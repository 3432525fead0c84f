"""How many samples steps consume. Imports no megatron, so that a check before the run is quick."""

from __future__ import annotations

from megatron_mup.config import TrainingConfig


def global_batch_size(training: TrainingConfig, consumed_samples: int) -> int:
    """Sequences of the step that follows ``consumed_samples``, ramp-up included.

    Megatron's ``[start, increment, samples]``: the batch grows by ``increment`` after equal shares
    of ``samples``.
    """
    if training.rampup_batch_size is None:
        return training.global_batch_size
    start, increment, samples = training.rampup_batch_size
    increments = (training.global_batch_size - start) // increment
    done = consumed_samples * increments // samples
    return start + increment * min(done, increments)


def samples_after(training: TrainingConfig, steps: int) -> int:
    """Samples that ``steps`` optimizer steps consume from the start."""
    if training.rampup_batch_size is None:
        return steps * training.global_batch_size
    consumed = 0
    for _ in range(steps):
        consumed += global_batch_size(training, consumed)
    return consumed
