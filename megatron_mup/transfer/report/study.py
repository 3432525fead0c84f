"""From rows to what a report shows: arms, their curves, fits and verdicts. Pure, nothing is drawn.

An arm of the report is a variant at one value of every further axis: transfer is measured within
it. A run that failed or was stopped early has no final loss; it is counted and enters no fit.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from megatron_mup.errors import DataError
from megatron_mup.transfer.fits import (
    Comparison,
    Curve,
    Estimate,
    Minimum,
    Transfer,
    Verdict,
    compare_arms,
    fit_minima,
    judge,
    measure_transfer,
    predict_log2_lr,
)
from megatron_mup.transfer.fits.window import read_grid
from megatron_mup.transfer.report.wording import size_text
from megatron_mup.transfer.runs import Row, Status

_FITTED = (Status.FINISHED, Status.DIVERGED)

_Key = tuple[str, tuple[tuple[str, str], ...]]
"""A variant, and its values on further axes."""

BAND_POINTS = 17
"""Sizes at which a prediction is drawn: enough for a smooth band."""


@dataclass(frozen=True, kw_only=True)
class Arm:
    """A variant at one value of every further axis.

    Attributes:
        name: of the variant, with its values on further axes.
        variant: name of the variant alone.
        settings: option -> value on further axes.
        rows: all of its runs.
        curves: one a size, increasing; runs without a final loss are left out.
        minima: of the curves, in the same order.
        transfer: across the sizes.
        verdict: what the transfer says.
        predictions: (size, optimum there) from the smallest size to the one after the largest.
        seeds_known: the rows tell which runs share a seed.
    """

    name: str
    variant: str
    settings: Mapping[str, str]
    rows: tuple[Row, ...]
    curves: tuple[Curve, ...]
    minima: tuple[Minimum, ...]
    transfer: Transfer
    verdict: Verdict
    predictions: tuple[tuple[float, Estimate], ...]
    seeds_known: bool

    def rows_at(self, size: float) -> list[Row]:
        """Runs of one size."""
        return [row for row in self.rows if row.size == size]


@dataclass(frozen=True, kw_only=True)
class Study:
    """All that a report shows.

    Attributes:
        axis: what is scaled.
        level: probability that the intervals hold.
        arms: in the order in which the rows name them.
        comparison: of the arms' asymptotic losses.
        sizes: of all arms, increasing.
        further_axes: option -> its values, in natural order.
        rows: all runs.
        left_out: name of each arm of which no run finished or diverged.
        seeds_known: the rows tell which runs share a seed.
    """

    axis: str
    level: float
    arms: tuple[Arm, ...]
    comparison: Comparison
    sizes: tuple[float, ...]
    further_axes: Mapping[str, tuple[str, ...]]
    rows: tuple[Row, ...]
    left_out: tuple[str, ...]
    seeds_known: bool

    @property
    def zero_shot(self) -> str:
        """What the zero-shot penalty is of, in words; arms may differ in their sizes."""
        if any(arm.transfer.sizes != self.sizes for arm in self.arms):
            return f"the largest {self.axis} at the optimum of the smallest"
        first, last = size_text(self.sizes[0]), size_text(self.sizes[-1])
        return f"{self.axis} {last} at the optimum of {first}"

    @property
    def next_size(self) -> float:
        """The size for which an optimum is predicted: twice the largest."""
        return _next_size(self.sizes)


def study_rows(rows: Sequence[Row], *, level: float = 0.9, seeds_known: bool = True) -> Study:
    """Group the runs and fit every arm.

    Args:
        rows: of one scaled axis.
        level: probability that the intervals hold, between 0 and 1.
        seeds_known: the rows tell which runs share a seed; where not, all runs count as of one.

    Raises:
        DataError: there are no runs or none came to an end, they scale different things, or the
            level is no probability.
    """
    axis, sizes = _check(rows, level)
    options = sorted({option for row in rows for option in row.settings})
    further = {option: _values_of(option, rows) for option in options}
    grouped: dict[_Key, list[Row]] = {}
    for row in rows:
        grouped.setdefault((row.arm, tuple(sorted(row.settings.items()))), []).append(row)
    # A variant's order is the user's; its values on further axes are sorted.
    variants = list(dict.fromkeys(row.arm for row in rows))
    keys = sorted(grouped, key=lambda key: (variants.index(key[0]), _natural_key(key[1])))
    arms = tuple(
        _arm(key, grouped[key], sizes=sizes, level=level, seeds_known=seeds_known)
        for key in keys
        if any(row.status in _FITTED for row in grouped[key])
    )
    return Study(
        axis=axis,
        level=level,
        arms=arms,
        comparison=compare_arms({arm.name: arm.transfer for arm in arms}),
        sizes=sizes,
        further_axes=further,
        rows=tuple(rows),
        left_out=tuple(name for name in map(_name, keys) if name not in {a.name for a in arms}),
        seeds_known=seeds_known,
    )


def _check(rows: Sequence[Row], level: float) -> tuple[str, tuple[float, ...]]:
    """The axis, and the sizes that have a run to fit; what cannot be reported is refused."""
    if not 0 < level < 1:
        raise DataError(f"--level {level} is no probability; give a number between 0 and 1")
    if not rows:
        raise DataError("there are no runs to report; run the sweep first, or give another table")
    axes = sorted({row.axis for row in rows})
    if len(axes) > 1:
        raise DataError(
            f"the runs scale {' and '.join(axes)}; a report is about one axis: give a table of each"
        )
    fitted = [row for row in rows if row.status in _FITTED]
    if not fitted:
        raise DataError(
            f"none of the {len(rows)} runs finished or diverged, so there is nothing to report; "
            "'megatron-mup sweep status' says how they ended"
        )
    return axes[0], tuple(sorted({row.size for row in fitted}))


def _arm(
    key: _Key,
    rows: Sequence[Row],
    *,
    sizes: Sequence[float],
    level: float,
    seeds_known: bool,
) -> Arm:
    curves = curves_of(rows)
    minima = fit_minima(curves, level=level)
    transfer = measure_transfer(minima, curves, level=level)
    return Arm(
        name=_name(key),
        variant=key[0],
        settings=dict(key[1]),
        rows=tuple(rows),
        curves=tuple(curves),
        minima=tuple(minima),
        transfer=transfer,
        verdict=judge(transfer, axis=rows[0].axis),
        predictions=tuple(
            (size, predict_log2_lr(minima, size, level=level))
            for size in _predicted_sizes(sizes[0], _next_size(sizes))
        ),
        seeds_known=seeds_known,
    )


def _name(key: _Key) -> str:
    """A variant with its values on further axes."""
    return ", ".join([key[0], *(f"{short_option(option)} {value}" for option, value in key[1])])


def curves_of(rows: Sequence[Row]) -> list[Curve]:
    """Loss against log2 LR of one arm, by size.

    Args:
        rows: of one arm; those without a final loss are left out.

    Returns:
        A curve for each size that has a run to fit, increasing.
    """
    grouped: dict[float, list[Row]] = {}
    for row in rows:
        if row.status in _FITTED:
            grouped.setdefault(row.size, []).append(row)
    return [
        Curve(
            size=size,
            log2_lrs=tuple(row.log2_lr for row in found),
            # A loss that is not a number is a diverged run's, whatever its status says.
            losses=tuple(_final_loss(row) for row in found),
            seeds=tuple(row.seed for row in found),
        )
        for size, found in sorted(grouped.items())
    ]


def _final_loss(row: Row) -> float:
    finished = row.status is Status.FINISHED and math.isfinite(row.validation_loss)
    return row.validation_loss if finished else math.nan


def means_of(curve: Curve) -> list[tuple[float, float]]:
    """(log2 LR, mean loss over seeds of the runs that did not diverge), by increasing LR.

    Where only some of the seeds ran, the mean is corrected for their levels, as the fit does: with
    one seed at the outer learning rates, that seed's level would look like a misfit.
    """
    runs = list(zip(curve.log2_lrs, curve.losses, curve.seeds, strict=True))
    ended = [run for run in runs if math.isfinite(run[1])]
    log2_lrs, losses, seeds = zip(*ended, strict=True) if ended else ((), (), ())
    grid = read_grid(Curve(size=curve.size, log2_lrs=log2_lrs, losses=losses, seeds=seeds))
    return list(zip(grid.log2_lrs, grid.means, strict=True))


def has_uneven_seeds(curve: Curve) -> bool:
    """Whether some learning rate lacks a seed that ended at another one."""
    found: dict[float, set[int]] = {}
    for log2_lr, loss, seed in zip(curve.log2_lrs, curve.losses, curve.seeds, strict=True):
        if math.isfinite(loss):
            found.setdefault(log2_lr, set()).add(seed)
    return len({frozenset(seeds) for seeds in found.values()}) > 1


def divergence_of(curve: Curve) -> list[tuple[float, int, int]]:
    """(log2 LR, diverged runs, runs) wherever a run diverged, by increasing LR."""
    found: dict[float, list[bool]] = {}
    for log2_lr, loss in zip(curve.log2_lrs, curve.losses, strict=True):
        found.setdefault(log2_lr, []).append(not math.isfinite(loss))
    return [(at, sum(lost), len(lost)) for at, lost in sorted(found.items()) if any(lost)]


def _next_size(sizes: Sequence[float]) -> float:
    return 2 * sizes[-1]


def _predicted_sizes(first: float, last: float) -> list[float]:
    """Evenly spaced on a logarithmic axis, both ends exact."""
    steps = BAND_POINTS - 1
    inner = [first * (last / first) ** (step / steps) for step in range(1, steps)]
    return [first, *inner, last]


def _values_of(option: str, rows: Sequence[Row]) -> tuple[str, ...]:
    found = {row.settings[option] for row in rows if option in row.settings}
    return tuple(sorted(found, key=_natural))


def _natural(value: str) -> tuple[int, float, str]:
    """Numbers by size and before words."""
    try:
        return (0, float(value), value)
    except ValueError:
        return (1, 0.0, value)


def _natural_key(settings: Sequence[tuple[str, str]]) -> list[tuple[str, tuple[int, float, str]]]:
    return [(option, _natural(value)) for option, value in settings]


def short_option(option: str) -> str:
    """An option without its section."""
    return option.rsplit(".", 1)[-1]
