"""The gate, at minima that are written out: each reason to stop, alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pytest

from megatron_mup.config_io import config_from_dict
from megatron_mup.transfer.campaign.fit import Fit, Neighbour
from megatron_mup.transfer.campaign.gate import (
    Stop,
    stops_after_fit,
    stops_before_runs,
)
from megatron_mup.transfer.campaign.likeness import Kind
from megatron_mup.transfer.campaign.spec import GateRules
from megatron_mup.transfer.fits import Estimate, Minimum, Verdict
from megatron_mup.transfer.sweep.spec import TokenBudget, TokenRule
from tests.transfer.campaign.campaigns import campaign_of, target_data

RULES = GateRules()
BUDGET = TokenBudget(rule=TokenRule.FIXED_TOKENS, amount=600)


def minimum(size: float, edge: Literal["low", "high"] | None = None) -> Minimum:
    known = Estimate(value=-6.0, low=-6.1, high=-5.9)
    return Minimum(
        size=size,
        log2_lr=known if edge is None else Estimate(value=None, reason="at an edge"),
        loss=Estimate(value=3.0),
        curvature=Estimate(value=0.1),
        edge=edge,
        window=(-8.0, -4.0),
        points=5,
        runs=15,
        diverged=0,
        noise=0.01,
        misfit=None,
        lowest=(-6.0 if edge is None else -4.0, 3.0),
    )


def fit_of(
    minima: Sequence[Minimum] | None = None,
    outcome: Literal["transfers", "does not transfer", "cannot tell"] = "transfers",
    **prediction: Any,
) -> Fit:
    found = {"value": -6.2, "low": -6.5, "high": -5.9} | prediction
    steps = ("more seeds around 2^-6 at width 64",) if outcome == "cannot tell" else ()
    return Fit(
        minima=tuple(minima or [minimum(32), minimum(64), minimum(128)]),
        verdict=Verdict(outcome=outcome, because="it moves by 0.30.", next_steps=steps),
        scatter=0.0,
        prediction=Estimate(**found),
        runs=45,
    )


def test_a_good_fit_passes() -> None:
    assert stops_after_fit(fit_of(), RULES) == []


def test_a_minimum_at_an_edge_stops_and_names_the_side() -> None:
    minima = [minimum(32), minimum(64), minimum(128), minimum(256, "high")]
    assert stops_after_fit(fit_of(minima), RULES) == [
        Stop(
            why="width 256: the lowest loss lies at the high end of the learning rates, at 2^-4, "
            "so that the optimum may lie outside",
            next_step="add learning rates above it to learning_rate of the sweep",
        )
    ]
    low = stops_after_fit(fit_of([*minima[:3], minimum(256, "low")]), RULES)
    assert "add learning rates below it" in low[0].next_step


def test_widths_at_an_edge_are_told_together_and_what_follows_from_it_is_not() -> None:
    minima = [minimum(32, "high"), minimum(64, "high"), minimum(128)]
    stops = stops_after_fit(fit_of(minima, "cannot tell", value=None, reason="no"), RULES)
    assert [stop.why for stop in stops] == [
        "widths 32, 64: the lowest loss lies at the high end of the learning rates, at 2^-4, so "
        "that the optimum may lie outside"
    ]
    few = stops_after_fit(fit_of(minima[:2]), RULES)
    assert few[1].why.startswith("2 widths, 3 needed")


def test_too_few_known_optima_stop() -> None:
    stops = stops_after_fit(fit_of([minimum(32), minimum(64)]), RULES)
    assert [stop.why for stop in stops] == [
        "2 widths with a known optimum, 3 needed: a line through fewer points than three cannot be "
        "contradicted"
    ]
    assert stops[0].next_step == "add widths to scale.values, such as 128"
    assert stops_after_fit(fit_of([minimum(32), minimum(64)]), replace(RULES, fewest_sizes=2)) == []
    # Three points can contradict a line; somebody wants more all the same.
    (stop,) = stops_after_fit(fit_of(), replace(RULES, fewest_sizes=5))
    assert stop.why == "3 widths with a known optimum, 5 needed"


def test_a_curve_that_misses_its_points_stops_unless_a_narrower_window_fits() -> None:
    words = "the fitted curve misses its points (lack-of-fit test, p = 1e-12)"
    missed = replace(minimum(128), misfit=f"{words}; do not trust the intervals")
    assert stops_after_fit(fit_of([minimum(32), minimum(64), missed]), RULES) == [
        Stop(
            why=f"width 128: {words}; do not trust the intervals",
            next_step="add learning rates half an octave apart around 2^-6",
        )
    ]
    narrowed = replace(missed, narrowed=True)
    assert stops_after_fit(fit_of([minimum(32), minimum(64), narrowed]), RULES) == []


def test_a_width_without_an_optimum_stops_however_many_others_there_are() -> None:
    none = Estimate(value=None, reason="no learning rate at which every run ended well")
    blank = replace(minimum(96), log2_lr=none, lowest=None)
    minima = [minimum(32), minimum(64), blank, minimum(128)]
    assert stops_after_fit(fit_of(minima), RULES) == [
        Stop(
            why="width 96: the best learning rate is unknown: no learning rate at which every run "
            "ended well",
            next_step="lower learning rates for it",
        )
    ]
    flat = replace(minimum(96), log2_lr=Estimate(value=None, reason="not identifiable"))
    (stop,) = stops_after_fit(fit_of([*minima[:2], flat, minima[3]]), RULES)
    assert stop.next_step.startswith("learning rates half an octave apart")
    # One at an edge is told with the edges, and the blank one is told beside it.
    edge = [*minima[:3], minimum(128, "high")]
    assert [stop.why[:9] for stop in stops_after_fit(fit_of(edge), RULES)] == [
        "width 128",
        "width 96:",
    ]


def test_a_width_of_the_yaml_without_a_curve_stops() -> None:
    (stop,) = stops_after_fit(replace(fit_of(), without_curve=(96.0,)), RULES)
    assert stop.why.startswith("width 96: no run finished or diverged")


@pytest.mark.parametrize(
    ("edge", "beyond", "between"),
    [("high", -3.0, "between 2^-4 and 2^-3"), ("low", -5.0, "between 2^-5 and 2^-4")],
)
def test_next_to_a_diverged_run_rates_between_are_wanted(
    edge: Literal["low", "high"], beyond: float, between: str
) -> None:
    fit = fit_of([minimum(32), minimum(64), minimum(128), minimum(256, edge)])
    beside = {256.0: Neighbour(log2_lr=beyond, stopped=False)}
    assert stops_after_fit(replace(fit, neighbours=beside), RULES) == [
        Stop(
            why=f"width 256: the lowest loss, at 2^-4, lies next to the learning rate "
            f"2^{beyond:g} at which a run diverged, so that the optimum may lie between",
            next_step=f"add learning rates {between} to learning_rate of the sweep",
        )
    ]
    beside = {256.0: Neighbour(log2_lr=beyond, stopped=True)}
    (stop,) = stops_after_fit(replace(fit, neighbours=beside), RULES)
    assert "at which a run was stopped early" in stop.why
    assert stop.next_step == (
        f"add learning rates {between} to learning_rate of the sweep, or delete the lines of the "
        "stopped runs in sweep/runs.csv and remove stop_early"
    )


def test_a_wide_interval_stops() -> None:
    assert stops_after_fit(fit_of(low=-6.5, high=-5.5), RULES) == []
    (stop,) = stops_after_fit(fit_of(low=-6.75, high=-5.5), RULES)
    assert stop.why == (
        "the interval of the predicted learning rate, 2^-6.75 to 2^-5.50, is 1.25 octaves wide; "
        "the gate allows 1"
    )
    assert stops_after_fit(fit_of(low=-6.75, high=-5.5), replace(RULES, widest_interval=1.5)) == []


@pytest.mark.parametrize(
    ("sizes", "step"),
    [
        ([32, 64, 128], "a further width, such as 256 or one between: a line through 3 points"),
        (
            [32, 64, 96, 128],
            "more seeds (3 a learning rate) around the lowest loss at width 32, 64",
        ),
    ],
)
def test_few_widths_want_another_one_rather_than_seeds(sizes: list[int], step: str) -> None:
    minima = [minimum(size) for size in sizes]
    (stop,) = stops_after_fit(fit_of(minima, low=-6.75, high=-5.5), RULES)
    assert stop.next_step.startswith(step)


def test_a_wide_interval_wants_what_made_it_wide() -> None:
    """Scatter between widths: no seeds. Three points a curve: half octaves before seeds."""
    known = Estimate(value=-6.0, low=-6.1, high=-5.9, error=0.05)
    loss = Estimate(value=3.0, error=0.01)
    minima = [replace(minimum(size), log2_lr=known, loss=loss) for size in (32, 64, 96, 128)]
    scattered = replace(fit_of(minima, low=-6.75, high=-5.5), scatter=0.3)
    (stop,) = stops_after_fit(scattered, RULES)
    assert stop.next_step.startswith("a further width, such as 256 (the optima scatter by 0.30")
    assert "more seeds" not in stop.next_step
    few = [replace(one, points=3, window=(-7.0, -5.0)) for one in minima[:3]]
    (stop,) = stops_after_fit(fit_of(few, low=-6.75, high=-5.5), RULES)
    halves = "; then learning rates half an octave to either side of 2^-6 at width 32"
    assert halves in stop.next_step
    assert "more seeds" not in stop.next_step


def test_a_missing_bound_or_value_stops_with_its_reason() -> None:
    (stop,) = stops_after_fit(fit_of(low=None, high=None, reason="no repeats"), RULES)
    assert stop.why == "the predicted learning rate 2^-6.20 has no interval: no repeats"
    (stop,) = stops_after_fit(fit_of(low=None), RULES)
    assert stop.why == "the predicted learning rate 2^-6.20 has no interval"
    (stop,) = stops_after_fit(fit_of(value=None, reason="1 size, 2 needed"), RULES)
    assert stop.why.endswith("cannot be predicted: 1 size, 2 needed")


def test_a_learning_rate_that_does_not_transfer_stops_whatever_the_rules_say() -> None:
    rules = replace(RULES, accept_cannot_tell=True)
    assert stops_after_fit(fit_of(outcome="does not transfer"), rules) == [
        Stop(
            why="verdict: does not transfer: it moves by 0.30.",
            next_step="tune the learning rate at the target's own size, or mend the "
            "parameterization",
        )
    ]


def test_a_verdict_that_nobody_can_tell_stops_unless_it_is_accepted() -> None:
    (stop,) = stops_after_fit(fit_of(outcome="cannot tell"), RULES)
    assert stop == Stop(
        why="verdict: cannot tell: it moves by 0.30.",
        next_step="more seeds around 2^-6 at width 64; or set gate.accept_cannot_tell: true and "
        "mind the interval",
    )
    rules = replace(RULES, accept_cannot_tell=True)
    assert stops_after_fit(fit_of(outcome="cannot tell"), rules) == []


@pytest.mark.parametrize(("target", "stopped"), [(512, False), (1024, False), (1056, True)])
def test_a_largest_proxy_far_below_the_target_stops_before_runs(
    tmp_path: Path, target: int, stopped: bool
) -> None:
    proxy = campaign_of(tmp_path).proxies(tmp_path)[-1].run
    data = target_data(model__hidden_size=target, model__num_attention_heads=target // 16)
    run = config_from_dict({"optimizer": {"lr": 1.0}} | data)
    stops = stops_before_runs(proxy, run, widths=[32, 64, 128], rules=RULES, budget=BUDGET)
    # 8 times 128 is 1024.
    assert [stop.next_step for stop in stops] == (
        ["add a width of at least 132 to scale.values, or raise gate.largest_ratio"]
        if stopped
        else []
    )
    loose = replace(RULES, largest_ratio=64.0)
    assert not stops_before_runs(proxy, run, widths=[32, 64, 128], rules=loose, budget=BUDGET)


def test_a_target_narrower_than_all_proxies_stops(tmp_path: Path) -> None:
    proxy = campaign_of(tmp_path).proxies(tmp_path)[-1].run
    data = target_data(model__hidden_size=32, model__num_attention_heads=2)
    run = config_from_dict({"optimizer": {"lr": 1.0}} | data)
    assert not stops_before_runs(proxy, run, widths=[32, 64, 128], rules=RULES, budget=BUDGET)
    (stop,) = stops_before_runs(proxy, run, widths=[48, 64, 128], rules=RULES, budget=BUDGET)
    assert stop.why == (
        "the target's width 32 is below that of the smallest proxy, 48: proxies are to be smaller "
        "than the target"
    )


@pytest.mark.parametrize(
    ("changes", "kinds"),
    [
        ({"training__train_iters": 1000, "schedule__lr_warmup_iters": 200}, ["tokens"]),
        ({"model__num_layers": 2}, ["depth"]),
        # The same tokens in half the steps.
        (
            {
                "training__global_batch_size": 8,
                "training__train_iters": 5,
                "schedule__lr_warmup_iters": 1,
            },
            ["batch"],
        ),
        ({"model__seq_length": 32, "training__global_batch_size": 2}, ["sequence"]),
        ({"training__rampup_batch_size": [2, 2, 8]}, ["rampup"]),
    ],
)
def test_extrapolating_in_more_than_width_stops_unless_it_is_accepted(
    tmp_path: Path, changes: dict[str, Any], kinds: list[str]
) -> None:
    proxy = campaign_of(tmp_path).proxies(tmp_path)[-1].run
    run = config_from_dict({"optimizer": {"lr": 1.0}} | target_data(**changes))
    stops = stops_before_runs(proxy, run, widths=[32, 64, 128], rules=RULES, budget=BUDGET)
    told = [stop.next_step.partition("; or put ")[2].split()[0] for stop in stops]
    assert told == kinds
    rules = replace(RULES, accept=tuple(Kind(kind) for kind in kinds))
    assert not stops_before_runs(proxy, run, widths=[32, 64, 128], rules=rules, budget=BUDGET)


def test_two_widths_and_another_rule_stop_before_runs(tmp_path: Path) -> None:
    proxy = campaign_of(tmp_path).proxies(tmp_path)[-1].run
    data = target_data(parameterization__name="sp", schedule__min_lr_ratio=0.1)
    run = config_from_dict({"optimizer": {"lr": 1.0}} | data)
    few, far, other = stops_before_runs(proxy, run, widths=[32, 48], rules=RULES, budget=BUDGET)
    assert far.why.startswith("the target's width 512 is 10.6667 times")
    assert few.why.startswith("2 widths, 3 needed")
    assert other.why == (
        "the target differs from the proxies in more than sizes, layout, precision and length: "
        "parameterization.name mup -> sp; schedule.min_lr_ratio 0.0 -> 0.1"
    )
