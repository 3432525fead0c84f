"""What the gate reads beside the fits: neighbours of an edge, widths without runs, shards."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from megatron_mup.transfer.campaign.fit import Neighbour, fit_proxies, on_shards
from megatron_mup.transfer.campaign.gate import stops_after_fit
from megatron_mup.transfer.campaign.spec import GateRules
from megatron_mup.transfer.runs import Row, Status
from tests.transfer.report.sample_rows import a_row


def curve(size: float, losses: Sequence[float], *, seeds: Sequence[int] = (1, 2, 3)) -> list[Row]:
    """Finished runs at 2^-9, 2^-8, ...; a seed lifts and tilts its curve by thousandths."""
    return [
        a_row(
            size=size,
            log2_lr=-9.0 + place,
            seed=seed,
            validation_loss=loss + 0.001 * seed * (-1) ** place,
        )
        for place, loss in enumerate(losses)
        for seed in seeds
    ]


FALLING = [3.5, 3.3, 3.1, 3.0]
BOWL = [3.5, 3.2, 3.05, 3.0, 3.05, 3.2, 3.5]


def test_a_diverged_or_stopped_neighbour_of_an_edge_is_named() -> None:
    lost = a_row(size=128.0, log2_lr=-5.0, status=Status.DIVERGED, validation_loss=float("nan"))
    stopped = replace(lost, size=64.0, status=Status.STOPPED_EARLY)
    beyond = replace(stopped, log2_lr=-4.0, status=Status.DIVERGED)
    rows = [
        *curve(32.0, FALLING),
        *curve(64.0, FALLING),
        *curve(128.0, FALLING),
        *(lost, stopped, beyond),
    ]
    fit = fit_proxies(rows, 256.0, widths=[32.0, 64.0, 128.0], level=0.9)
    assert [one.edge for one in fit.minima] == ["high", "high", "high"]
    # Nothing was run beyond width 32's.
    assert fit.neighbours == {
        64.0: Neighbour(log2_lr=-5.0, stopped=True),
        128.0: Neighbour(log2_lr=-5.0, stopped=False),
    }


def test_a_width_whose_runs_all_diverged_or_never_ended_stops() -> None:
    lost = [
        replace(row, status=Status.DIVERGED, validation_loss=float("nan"))
        for row in curve(64.0, BOWL)
    ]
    rows = [row for size in (32.0, 128.0, 256.0) for row in curve(size, BOWL)]
    widths = [32.0, 64.0, 96.0, 128.0, 256.0]
    fit = fit_proxies([*rows, *lost], 512.0, widths=widths, level=0.9)
    assert fit.without_curve == (96.0,)
    whys = [stop.why for stop in stops_after_fit(fit, GateRules())]
    assert any(why.startswith("width 96: no run finished or diverged") for why in whys)
    assert any(why.startswith("width 64: the best learning rate is unknown: ") for why in whys)


def test_a_curve_that_is_no_bowl_stops() -> None:
    # Two straight lines that meet at -5.8: no smooth curve goes through rates half an octave apart.
    sizes = [32.0, 64.0, 128.0, 256.0]
    rows = [
        a_row(
            size=size,
            log2_lr=-9.0 + place / 2,
            seed=seed,
            validation_loss=3
            + 0.08 * abs(-9.0 + place / 2 + 5.8)
            + 0.0001 * ((7 * place + 3 * seed * seed) % 5),
        )
        for size in sizes
        for place in range(13)
        for seed in (1, 2, 3)
    ]
    fit = fit_proxies(rows, 512.0, widths=sizes, level=0.9)
    whys = [stop.why for stop in stops_after_fit(fit, GateRules())]
    assert [why.partition(": ")[0] for why in whys[:4]] == [
        "width 32",
        "width 64",
        "width 128",
        "width 256",
    ]
    assert all("do not trust the intervals" in why for why in whys[:4])


def test_the_level_is_of_the_prediction_alone() -> None:
    rows = [row for size in (32.0, 64.0, 128.0) for row in curve(size, BOWL)]
    loose, strict = (
        fit_proxies(rows, 256.0, widths=[32.0, 64.0, 128.0], level=level) for level in (0.5, 0.99)
    )
    assert loose.verdict == strict.verdict
    assert loose.minima == strict.minima
    assert loose.prediction.high is not None
    assert strict.prediction.high is not None
    assert loose.prediction.high < strict.prediction.high


def test_rows_on_other_shards_are_left_out() -> None:
    rows = [a_row(seed=1), a_row(seed=2, data_sha256="e" * 64)]
    assert [row.seed for row in on_shards(rows, "d" * 64)] == [1]
