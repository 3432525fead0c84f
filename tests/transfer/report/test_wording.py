"""Numbers and estimates as words."""

import pytest

from megatron_mup.transfer.fits import Estimate
from megatron_mup.transfer.report.wording import (
    cell_text,
    counted,
    duration,
    estimate_text,
    learning_rate,
    listed,
    nats,
    octaves,
    plain,
    sentence,
    shortened,
    size_text,
)


@pytest.mark.parametrize(
    ("estimate", "words"),
    [
        (Estimate(value=-4.526, low=-4.71, high=-4.355), "-4.53 [-4.71, -4.36]"),
        (Estimate(value=1.0, low=0.5, high=None, reason="r"), "1.00 [0.50, unbounded] (r)"),
        (Estimate(value=1.0, low=None, high=2.0, reason="r"), "1.00 [unbounded, 2.00] (r)"),
        (Estimate(value=1.0, reason="no repeats"), "1.00 [no interval] (no repeats)"),
        (Estimate(value=None, reason="one size"), "not identifiable: one size"),
        (Estimate(value=None, reason="not identifiable: flat"), "not identifiable: flat"),
        (
            Estimate(value=None, low=-3.0, reason="edge of the grid"),
            "not identifiable: edge of the grid (at least -3.00)",
        ),
        (
            Estimate(value=None, high=-9.0, reason="edge of the grid"),
            "not identifiable: edge of the grid (at most -9.00)",
        ),
        (Estimate(value=None), "not identifiable: the fit gives no reason"),
    ],
)
def test_an_estimate_is_a_number_with_its_interval_or_the_reason_why_not(estimate, words):
    assert estimate_text(estimate, octaves) == words


@pytest.mark.parametrize(
    ("estimate", "words"),
    [
        (Estimate(value=None, reason="r"), "not identifiable"),
        (Estimate(value=None, low=1.0, reason="r"), "at least 1.0000"),
        (Estimate(value=None, low=1.0, high=2.0, reason="r"), "between 1.0000 and 2.0000"),
        (Estimate(value=0.5, low=0.25, high=0.75), "0.5000 [0.2500, 0.7500]"),
    ],
)
def test_a_cell_leaves_the_reason_to_the_notes(estimate, words):
    assert cell_text(estimate, nats) == words


def test_a_rounded_zero_has_no_sign():
    assert plain(-0.0) == "0.00"
    assert (octaves(-0.004), nats(-0.00001)) == ("0.00", "0.0000")
    assert octaves(-0.006) == "-0.01"


@pytest.mark.parametrize(
    ("size", "words"),
    [
        (64.0, "64"),
        (4096.0, "4,096"),
        (2.5, "2.5"),
        (2e9, "2e9"),
        (12_345_678.0, "1.235e7"),
        (1.6e10, "1.6e10"),
    ],
)
def test_sizes_are_written_as_people_write_them(size, words):
    assert size_text(size) == words


def test_lists_counts_and_durations_read_as_sentences():
    assert [listed(items) for items in ([], ["a"], ["a", "b"], ["a", "b", "c"])] == [
        "",
        "a",
        "a and b",
        "a, b and c",
    ]
    assert [counted(1, "run"), counted(1024, "run")] == ["1 run", "1,024 runs"]
    assert [duration(1.7), duration(90), duration(7200), duration(float("nan"))] == [
        "1.7 seconds",
        "1.5 minutes",
        "2.0 hours",
        "not recorded",
    ]
    assert shortened(["b", "a", "b"]) == "b, a"
    assert shortened(list("abcd"), most=2) == "a, b and 2 more"


def test_other_numbers_have_three_digits():
    assert [plain(value) for value in (0.22, 100.0, -0.0758, 12.345)] == [
        "0.220",
        "100",
        "-0.0758",
        "12.3",
    ]


def test_sentences_start_with_a_capital_and_end_once():
    assert [sentence(text) for text in ("it stays", "It moves.", "")] == [
        "It stays.",
        "It moves.",
        ".",
    ]


def test_a_learning_rate_is_two_to_its_logarithm():
    assert learning_rate(-6.0) == "0.0156"
