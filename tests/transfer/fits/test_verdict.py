"""What may be said of a transfer, and what to run next."""

from __future__ import annotations

from dataclasses import replace

import pytest

from megatron_mup.transfer.fits import Estimate, Transfer, judge
from tests.transfer.fits.test_metrics import SIZES, known, minimum, transfer_of


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
        "more seeds around 2^-6 at width 128 (its optimum lies between 2^-6.80 and 2^-5.20)",
        "a fourth width, such as 512",
    )


def test_three_sizes_with_two_known_optima_do_not_show_a_transfer() -> None:
    """A line through two optima cannot be contradicted, whatever else was run."""
    start = transfer((-0.1, 0.1), (0.0, 0.01))
    edge = replace(
        minimum(128.0, -3.0),
        edge="high",
        log2_lr=Estimate(value=None, low=-4.0, reason="edge"),
        lowest=(-3.0, 3.0),
    )
    minima = (start.minima[0], edge, start.minima[2])
    verdict = judge(replace(start, sizes=(64.0, 128.0, 256.0), minima=minima))
    assert verdict.outcome == "cannot tell"
    assert verdict.because.endswith(
        "What keeps it open: 2 of 3 sizes have a known optimum, and 3 show a trend."
    )
    assert verdict.next_steps[0] == "add learning rates above 2^-3 at width 128"


def test_a_size_without_an_optimum_may_contradict_three_that_have_one() -> None:
    """Its only step is at the edge: the other optima are known to 0.08 octaves."""
    start = transfer((-0.1, 0.1), (0.0, 0.01))
    unknown = Estimate(value=None, low=-4.0, reason="edge")
    edge = replace(minimum(128.0, -3.0), edge="high", log2_lr=unknown, lowest=(-3.0, 3.0))
    minima = (start.minima[0], edge, *start.minima[2:])
    verdict = judge(replace(start, minima=minima))
    assert verdict.outcome == "cannot tell"
    assert verdict.because.endswith("What keeps it open: the optimum is not known at width 128.")
    assert verdict.next_steps == ("add learning rates above 2^-3 at width 128",)


def test_a_curve_that_misses_its_points_carries_no_transfer() -> None:
    start = transfer((-0.1, 0.1), (0.0, 0.01))
    bent = replace(start.minima[1], misfit="bent")
    verdict = judge(replace(start, minima=(start.minima[0], bent, *start.minima[2:])))
    assert verdict.outcome == "cannot tell"
    assert "the fitted curve misses its points at width 128" in verdict.because
    narrowed = replace(bent, narrowed=True)
    kept = replace(start, minima=(start.minima[0], narrowed, *start.minima[2:]))
    assert judge(kept).outcome == "transfers"
    assert judge(kept).next_steps == (
        "learning rates half an octave to either side of 2^-6 at width 128",
    )
    assert judge(start).next_steps == ()


def test_what_keeps_it_open_is_named_with_its_number() -> None:
    """Penalty 0.0156 of a loss of 3.0 is 0.52%."""
    verdict = judge(transfer((-0.31, 0.2), (0.0, 0.0156)))
    assert verdict.because.endswith(
        "What keeps it open: the shift may be -0.31, and transfer means less than 0.25 either way; "
        "the cost may be 0.52% of the loss, and transfer means less than 0.5%."
    )


def test_half_octaves_come_before_seeds_where_points_are_too_few() -> None:
    """Three points an octave apart fix a parabola and leave nothing to test it."""
    wide = transfer((-0.5, 0.5), (0.0, 0.1))
    few = replace(wide.minima[0], points=3, window=(-7.0, -5.0))
    fine = replace(wide.minima[1], points=3, window=(-6.5, -5.5))
    steps = judge(replace(wide, minima=(few, fine, *wide.minima[2:]))).next_steps
    assert steps[0] == (
        "learning rates half an octave to either side of 2^-6 at width 64 (3 points do not fix the "
        "curve's shape)"
    )
    assert not any("half an octave" in step and "width 128" in step for step in steps)
    assert len(steps) == 1
    vague = replace(wide.minima[2], log2_lr=known(-6.0, error=0.2))
    steps = judge(replace(wide, minima=(few, fine, vague, wide.minima[3]))).next_steps
    assert steps[1:] == (
        "more seeds around 2^-6 at width 256 (its optimum lies between 2^-6.40 and 2^-5.60)",
    )


def test_scatter_between_sizes_asks_for_sizes_and_not_for_seeds() -> None:
    wide = replace(transfer((-0.5, 0.5), (0.0, 0.1)), scatter=0.2)
    assert judge(wide).next_steps == (
        "a further width, such as 1024 (the optima scatter by 0.20 octaves about their line beyond "
        "their errors, which seeds do not narrow)",
    )
    vague = replace(wide.minima[0], log2_lr=known(-6.0, error=0.2))
    assert judge(replace(wide, minima=(vague, *wide.minima[1:]))).next_steps[1:] == (
        "more seeds around 2^-6 at width 64 (its optimum lies between 2^-6.40 and 2^-5.60)",
    )


def test_one_size_asks_for_another() -> None:
    whole = transfer((0.0, 0.0), (0.0, 0.0))
    verdict = judge(replace(whole, sizes=whole.sizes[:1], minima=whole.minima[:1]))
    assert verdict.outcome == "cannot tell"
    assert verdict.because == "width 64 alone says nothing of a transfer."
    assert verdict.next_steps == ("a second width, such as 128",)


def test_runs_that_diverged_beside_the_lowest_loss_bound_the_rates_to_add() -> None:
    wide = transfer((-0.5, 0.5), (0.0, 0.1))
    unknown = Estimate(value=None, low=-11.0, reason="edge")
    gap = replace(
        minimum(64.0, -10.0), edge="high", log2_lr=unknown, beside=-9.0, lowest=(-10.0, 3.0)
    )
    steps = judge(replace(wide, minima=(gap, *wide.minima[1:]))).next_steps
    assert steps[0] == "add learning rates between 2^-10 and 2^-9 at width 64"


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
    assert "learning rates half an octave to either side of 2^-6 at width 128" in steps


def test_two_sizes_can_refute_a_transfer_but_not_show_one() -> None:
    def two(shift: tuple[float, float]) -> Transfer:
        whole = transfer(shift, (0.0, 0.01))
        return replace(whole, sizes=whole.sizes[:2], minima=whole.minima[:2])

    agreeing = judge(two((-0.1, 0.1)))
    assert agreeing.outcome == "cannot tell"
    assert agreeing.because.endswith(
        "What keeps it open: 2 sizes have a known optimum, and 3 show a trend."
    )
    assert agreeing.next_steps == ("a third width, such as 256",)
    assert judge(two((-0.9, -0.7))).outcome == "does not transfer"


def test_no_trend_is_followed_beyond_a_largest_size_without_an_optimum() -> None:
    start = transfer((-0.9, -0.7), (0.0, 0.01))
    last = replace(
        start.minima[3], edge="low", log2_lr=Estimate(value=None, reason="edge"), lowest=(-8.0, 3.0)
    )
    assert judge(replace(start, minima=(*start.minima[:3], last))).next_steps == (
        "add learning rates below 2^-8 at width 512",
        "tune the learning rate at each width",
    )


def test_what_does_not_transfer_is_tuned_or_follows_its_trend() -> None:
    assert judge(transfer((-0.9, -0.7), (0.0, 0.01))).next_steps == (
        "tune the learning rate at each width, or follow the fitted trend of the optimum and "
        "check it at a further width, such as 1024",
    )
