"""Order, ratio and interval of an alternating measurement."""

from __future__ import annotations

import pytest
import torch

from megatron_mup.benchmark.measure import Pairs, alone, alternate, ratio, unpaired_ratio
from megatron_mup.errors import ConfigError
from megatron_mup.training.batches import Batch

BATCHES: list[Batch] = [{"tokens": torch.tensor([number])} for number in range(3)]


class Recorder:
    """A contestant of fixed cost on a clock that only contestants move."""

    def __init__(self, name: str, seconds: float, log: list[tuple[str, int]]) -> None:
        self.name, self.seconds, self.log = name, seconds, log

    def __call__(self, batch: Batch) -> float:
        self.log.append((self.name, int(batch["tokens"])))
        CLOCK[0] += self.seconds
        return 0.0


CLOCK = [0.0]


def test_the_order_turns_round_and_a_pair_shares_its_batch() -> None:
    log: list[tuple[str, int]] = []
    first, second = Recorder("a", 3.0, log), Recorder("b", 2.0, log)
    pairs = alternate(first, second, BATCHES, pairs=4, clock=lambda: CLOCK[0])
    measured = log[6:]
    assert measured[:4] == [("a", 0), ("b", 0), ("b", 1), ("a", 1)]
    assert measured[4:] == [("a", 2), ("b", 2), ("b", 0), ("a", 0)]
    assert pairs == Pairs((3.0, 3.0, 3.0, 3.0), (2.0, 2.0, 2.0, 2.0))


def test_a_constant_ratio_has_an_interval_of_no_width() -> None:
    result = ratio(Pairs((3.0, 6.0, 1.5), (2.0, 4.0, 1.0)))
    numbers = (result.value, result.low, result.high)
    assert numbers == pytest.approx((1.5, 1.5, 1.5), rel=1e-12)
    assert (result.first_seconds, result.second_seconds, result.pairs) == (3.0, 2.0, 3)


def test_the_interval_has_the_width_of_the_normal_one() -> None:
    # Log ratios of standard deviation 0.1: the 95% interval of 400 pairs is +-0.0098 wide; the
    # trimmed mean of normal values is 3% less precise.
    generator = torch.Generator().manual_seed(0)
    logs = (0.05 + 0.1 * torch.randn(400, generator=generator, dtype=torch.float64)).tolist()
    result = ratio(Pairs(tuple(2.718281828459045**value for value in logs), (1.0,) * 400))
    assert result.low < 1.0513 < result.high
    assert result.high - result.low == pytest.approx(2 * 0.0101 * 1.0513, rel=0.15)


def test_a_burst_of_foreign_work_does_not_move_the_ratio() -> None:
    first = [1.1] * 38 + [9.0, 9.0]
    assert ratio(Pairs(tuple(first), (1.0,) * 40)).value == pytest.approx(1.1, rel=1e-12)


def test_steps_that_were_not_paired_have_the_ratio_of_their_middles() -> None:
    # A drift of a factor of 2 between the halves is in both, and in the interval.
    first, second = (3.0, 3.0, 6.0, 6.0) * 5, (2.0, 2.0, 4.0, 4.0) * 5
    result = unpaired_ratio(Pairs(first, second))
    assert result.value == pytest.approx(1.5, rel=1e-12)
    assert result.low < 1.4 < 1.6 < result.high
    assert unpaired_ratio(Pairs((3.0,) * 4, (2.0,) * 4)).high == pytest.approx(1.5)


def test_a_contestant_alone_is_warmed_up_and_timed() -> None:
    log: list[tuple[str, int]] = []
    seconds = alone(Recorder("a", 3.0, log), BATCHES, steps=4, clock=lambda: CLOCK[0])
    assert seconds == (3.0, 3.0, 3.0, 3.0)
    assert [number for _, number in log] == [0, 0, 0, 0, 1, 2, 0]


def test_one_pair_has_no_interval() -> None:
    step = Recorder("a", 1.0, [])
    with pytest.raises(ConfigError, match="--pairs is 1; an interval needs at least 2"):
        alternate(step, step, BATCHES, pairs=1)
