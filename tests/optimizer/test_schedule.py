"""s(t) against written-down values; t counts steps from 0 and step t uses s(t)."""

from __future__ import annotations

import pytest

from megatron_mup.optimizer.schedule import run_factor
from tests.configurations import tiny

_EIGHT = ("train_iters=8",)
_WSD = (*_EIGHT, "lr_decay_style=WSD", "lr_wsd_decay_iters=4", "lr_warmup_iters=2")


def factors(*overrides: str, steps: int) -> list[float]:
    run = tiny(*overrides)
    return [run_factor(run, step) for step in range(steps)]


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (_EIGHT, [1.0, 0.875, 0.75, 0.625, 0.5, 0.375, 0.25, 0.125, 0.0, 0.0]),
        (
            (*_EIGHT, "min_lr_ratio=0.2"),
            [1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.2],
        ),
        # Warmup of 4 from 0.2, then down to 0.1 at 8.
        (
            (*_EIGHT, "lr_warmup_iters=4", "lr_warmup_init_ratio=0.2", "min_lr_ratio=0.1"),
            [0.2, 0.4, 0.6, 0.8, 1.0, 0.775, 0.55, 0.325, 0.1, 0.1],
        ),
        # (1 + cos(pi t/4))/2 after a warmup of 4.
        (
            (*_EIGHT, "lr_warmup_iters=4", "lr_decay_style=cosine"),
            [0.0, 0.25, 0.5, 0.75, 1.0, 0.8535533905932737, 0.5, 0.14644660940672627, 0.0, 0.0],
        ),
        (
            (*_EIGHT, "lr_warmup_iters=4", "lr_decay_style=cosine", "min_lr_ratio=0.1"),
            [0.0, 0.25, 0.5, 0.75, 1.0, 0.8681980515339464, 0.55, 0.23180194846605365, 0.1],
        ),
        (
            (*_EIGHT, "lr_warmup_iters=2", "lr_warmup_init_ratio=0.5", "lr_decay_style=constant"),
            [0.5, 0.75, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0],
        ),
        (
            (*_EIGHT, "lr_decay_iters=4"),
            [1.0, 0.75, 0.5, 0.25, 0.0, 0.0, 0.0, 0.0],
        ),
        ((*_WSD,), [0.0, 0.5, 1.0, 1.0, 1.0, 0.75, 0.5, 0.25, 0.0]),
        (
            (*_WSD, "lr_wsd_decay_style=cosine"),
            [0.0, 0.5, 1.0, 1.0, 1.0, 0.8535533905932737, 0.5, 0.14644660940672627, 0.0],
        ),
        # 2 * 0.5^x - 1 at x = 1/4, 1/2, 3/4.
        (
            (*_WSD, "lr_wsd_decay_style=exponential"),
            [0.0, 0.5, 1.0, 1.0, 1.0, 0.681792830507429, 0.41421356237309515, 0.189207115002721, 0],
        ),
        # 1 - sqrt(x).
        (
            (*_WSD, "lr_wsd_decay_style=minus_sqrt"),
            [0.0, 0.5, 1.0, 1.0, 1.0, 0.5, 0.2928932188134524, 0.1339745962155614, 0.0],
        ),
        (
            (*_WSD, "lr_wsd_decay_style=minus_sqrt", "min_lr_ratio=0.5"),
            [0.0, 0.5, 1.0, 1.0, 1.0, 0.75, 0.6464466094067262, 0.5669872981077807, 0.5],
        ),
    ],
)
def test_schedule_values(overrides: tuple[str, ...], expected: list[float]) -> None:
    assert factors(*overrides, steps=len(expected)) == pytest.approx(expected, abs=1e-12)


def test_the_papers_schedule_starts_and_ends_at_its_ratios() -> None:
    # arXiv:2404.05728: 10,000 of 125,000 steps of warmup, both ratios 1e-4.
    run = tiny(
        "train_iters=125000",
        "lr_warmup_iters=10000",
        "lr_warmup_init_ratio=0.0001",
        "min_lr_ratio=0.0001",
    )
    expected = {0: 1e-4, 5000: 0.50005, 10000: 1.0, 67500: 0.50005, 125000: 1e-4, 125001: 1e-4}
    assert {step: run_factor(run, step) for step in expected} == pytest.approx(expected, rel=1e-12)


def test_the_first_step_is_not_wasted_when_the_warmup_starts_above_zero() -> None:
    assert factors("lr_warmup_iters=4", "lr_warmup_init_ratio=0.01", steps=1) == [0.01]


def test_a_warmup_as_long_as_the_run_never_decays_before_its_end() -> None:
    assert factors("train_iters=2", "lr_warmup_iters=2", steps=3) == [0.0, 0.5, 0.0]
