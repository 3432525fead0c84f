"""What may be said of a transfer, and what to run next."""

from __future__ import annotations

from dataclasses import replace

import pytest

from megatron_mup.transfer.fits import Estimate, Transfer, judge
from tests.transfer.fits.test_metrics import SIZES, minimum, transfer_of


def between(low: float, high: float) -> Estimate:
    return Estimate(value=(low + high) / 2.0, low=low, high=high)


def transfer(shift: tuple[float, float], penalty: tuple[float, float]) -> Transfer:
    """Loss 3.0 at the largest size: half a percent is 0.015 nats."""
    start = transfer_of([minimum(n, -6.0) for n in SIZES])
    return replace(start, shift_per_doubling=between(*shift), zero_shot_penalty=between(*penalty))


@pytest.mark.parametrize(
    ("shift", "penalty", "outcome"),
    [
        ((-0.2, 0.1), (0.0, 0.014), "transfers"),
        ((-0.24, 0.24), (0.0, 0.014), "transfers"),
        ((-0.2, 0.26), (0.0, 0.014), "cannot tell"),
        ((-0.26, 0.2), (0.0, 0.014), "cannot tell"),
        ((-0.2, 0.1), (0.0, 0.016), "cannot tell"),
        ((-0.2, 0.1), (0.014, 0.03), "cannot tell"),
        ((-0.2, 0.1), (0.016, 0.03), "does not transfer"),
        ((0.26, 0.5), (0.0, 0.01), "does not transfer"),
        ((-0.5, -0.26), (0.0, 0.01), "does not transfer"),
        ((-0.5, -0.24), (0.0, 0.01), "cannot tell"),
    ],
)
def test_the_thresholds_hold_for_whole_intervals(
    shift: tuple[float, float], penalty: tuple[float, float], outcome: str
) -> None:
    assert judge(transfer(shift, penalty)).outcome == outcome


def test_the_reason_shows_the_numbers() -> None:
    assert judge(transfer((-0.2, 0.1), (0.002, 0.01)), axis="depth").because == (
        "the optimum moves by -0.05 [-0.20, +0.10] octaves of learning rate per doubling of the "
        "depth; the smallest depth's best learning rate costs the largest 0.0060 [0.0020, 0.0100] "
        "nats, 0.20% of its loss."
    )


def test_a_bound_alone_can_show_that_nothing_transfers() -> None:
    bounded = replace(
        transfer((0.0, 0.0), (0.0, 0.0)),
        shift_per_doubling=Estimate(value=None, high=-0.5, reason="edge"),
        zero_shot_penalty=Estimate(value=None, reason="edge"),
    )
    verdict = judge(bounded)
    assert verdict.outcome == "does not transfer"
    assert "at most -0.50 octaves" in verdict.because
    assert "unknown (edge)" in verdict.because


def test_next_steps_name_the_learning_rates_the_sizes_and_the_seeds() -> None:
    wide = transfer((-0.5, 0.5), (0.0, 0.1))
    edge = replace(
        minimum(256.0, -3.0),
        edge="high",
        log2_lr=Estimate(value=None, low=-4.0, reason="edge"),
        lowest=(-3.0, 3.0),
    )
    vague = minimum(128.0, -6.0, error=0.4)
    three = replace(wide, sizes=(64.0, 128.0, 256.0), minima=(minimum(64.0, -6.0), vague, edge))
    assert judge(three).next_steps == (
        "add learning rates above 2^-3 at width 256",
        "more seeds around 2^-6 at width 128 "
        "(its optimum is known to +-0.40 octaves, one standard error)",
        "a fourth width, such as 512",
    )


def test_next_steps_ask_for_repeats_where_there_are_none() -> None:
    wide = transfer((-0.5, 0.5), (0.0, 0.1))
    bare = tuple(
        replace(one, log2_lr=Estimate(value=-6.0), loss=Estimate(value=3.0)) for one in wide.minima
    )
    assert judge(replace(wide, minima=bare)).next_steps == (
        "more seeds (3 a learning rate) around the lowest loss at width 64, 128, 256, 512",
    )


def test_next_steps_refine_a_misfit_and_fill_a_gap_before_divergence() -> None:
    wide = transfer((-0.5, 0.5), (0.0, 0.1))
    gap = replace(
        minimum(64.0, -5.0), edge="high", log2_lr=Estimate(value=None, low=-6.0, high=-4.0)
    )
    bent = replace(minimum(128.0, -6.0), misfit="bent")
    steps = judge(replace(wide, minima=(gap, bent, *wide.minima[2:]))).next_steps
    assert steps[0] == "add learning rates between 2^-6 and 2^-4 at width 64"
    assert "learning rates half an octave apart around 2^-6 at width 128" in steps


def test_two_sizes_can_refute_a_transfer_but_not_show_one() -> None:
    def two(shift: tuple[float, float]) -> Transfer:
        whole = transfer(shift, (0.0, 0.01))
        return replace(whole, sizes=whole.sizes[:2], minima=whole.minima[:2])

    agreeing = judge(two((-0.1, 0.1)))
    assert agreeing.outcome == "cannot tell"
    assert agreeing.because.endswith("; 2 sizes cannot show a trend.")
    assert agreeing.next_steps[-1] == "a third width, such as 256"
    assert judge(two((-0.9, -0.7))).outcome == "does not transfer"


def test_what_does_not_transfer_is_tuned_or_follows_its_trend() -> None:
    assert judge(transfer((-0.9, -0.7), (0.0, 0.01))).next_steps == (
        "tune the learning rate at each width, or follow the fitted trend of the optimum and "
        "check it at a further width, such as 1024",
    )
