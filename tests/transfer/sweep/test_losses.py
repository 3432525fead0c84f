"""Mean of the last losses, and spikes."""

from __future__ import annotations

import math

from megatron_mup.transfer.sweep.losses import count_spikes, final_train_loss

# Median 3.0; absolute deviations 0.1 and 0: half of each 20, so that their median is 0.05.
_CALM = [3.0, 3.1] * 10


def test_the_last_tenth_is_averaged_and_rounded_up() -> None:
    assert final_train_loss([9.0] * 18 + [2.0, 4.0]) == 3.0
    assert final_train_loss([9.0] * 19 + [2.0, 4.0]) == (9.0 + 2.0 + 4.0) / 3
    assert final_train_loss([5.0]) == 5.0
    assert final_train_loss([9.0] * 18 + [2.0, math.nan]) == 2.0
    assert math.isnan(final_train_loss([]))


def test_a_loss_above_five_robust_deviations_is_a_spike() -> None:
    # Median 3.05, median deviation 0.05: the threshold is 3.05 + 5 * 1.4826 * 0.05 = 3.420650.
    assert count_spikes([*_CALM, 3.42]) == 0
    assert count_spikes([*_CALM, 3.4207]) == 1
    assert count_spikes([*_CALM, 3.4207, 3.0, 9.0]) == 2
    assert count_spikes([*_CALM, 1.0]) == 0


def test_a_spike_needs_twenty_steps_before_it_and_a_finite_loss() -> None:
    assert count_spikes([*_CALM[:-1], 9.0]) == 0
    assert count_spikes([*_CALM, math.nan, math.inf]) == 0
