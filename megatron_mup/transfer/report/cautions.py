"""What a reader must know before believing a number: edges, one seed, three points, mixed runs.

Must not compute estimates: it reads the runs and the fits, and says what they do not support.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from megatron_mup.transfer.fits import Curve, Minimum
from megatron_mup.transfer.report.study import Arm, Study, divergence_of, means_of
from megatron_mup.transfer.report.wording import (
    counted,
    listed,
    reason_of,
    shortened,
    size_text,
)
from megatron_mup.transfer.runs import Row, Status

FEWEST_POINTS = 4
"""Learning rates that a curve of three coefficients needs for one to be left to test it."""

MIXED = (
    ("planned_steps", "step counts"),
    ("data_sha256", "data"),
    ("validation_tokens", "amounts of held-out text"),
    ("commit", "commits"),
    ("version", "versions"),
    ("torch", "versions of torch"),
    ("megatron_core", "versions of megatron-core"),
)
"""Fields of a row that should be one within an arm and size, and what they are called."""


def minimum_notes(arm: Arm, minimum: Minimum) -> list[str]:
    """Remarks on one curve, for its line of the table.

    Args:
        arm: that the curve is of.
        minimum: of the curve.
    """
    notes = []
    if minimum.misfit is not None:
        notes.append(minimum.misfit)
    curve = next(curve for curve in arm.curves if curve.size == minimum.size)
    rates = len(means_of(curve))
    if not rates:
        notes.append("every run diverged")
    elif _few_points(minimum):
        notes.append(
            f"{counted(minimum.points, 'learning rate')} in the fit: nothing is left to test it"
        )
    # An edge's reason says all; loss and curvature lack for the same one.
    told = [minimum.log2_lr, minimum.loss, minimum.curvature][: 1 if minimum.edge else 3]
    if not arm.seeds_known:
        # A fit takes unknown seeds for one, and says so of the loss.
        notes.append("seeds not known, so that the loss has no interval")
        told = [estimate for estimate in told if estimate is not minimum.loss]
    elif len(set(curve.seeds)) == 1:
        notes.append("one seed")
    notes += _divergence_notes(arm, curve, minimum)
    notes += minimum.notes
    notes += [reason_of(estimate) for estimate in told if estimate.reason is not None]
    notes += _without_loss(arm.rows_at(minimum.size))
    return list(dict.fromkeys(notes))


def _divergence_notes(arm: Arm, curve: Curve, minimum: Minimum) -> list[str]:
    """Learning rates that the fit leaves out because some of their runs diverged, or beyond such.

    The window of a fit ends at a learning rate at which any run diverged (``fits.window``).
    """
    lost = divergence_of(curve)
    some = [(at, count, runs) for at, count, runs in lost if count < runs]
    noun = "seed" if arm.seeds_known else "run"
    said = [f"{count} of {counted(runs, noun)} diverged at 2^{at:g}" for at, count, runs in some]
    notes = []
    if said:
        left_out = "that learning rate is" if len(said) == 1 else "these learning rates are"
        notes.append(f"{listed(said)}: {left_out} left out of the fit")
    beyond = _beyond(curve, minimum)
    if beyond:
        shown = listed(f"2^{at:g}" for at in beyond)
        notes.append(f"{shown}: left out of the fit, as runs nearer to the lowest loss diverged")
    return notes


def _beyond(curve: Curve, minimum: Minimum) -> list[float]:
    """Learning rates without a diverged run that one with such parts from the lowest loss."""
    lost = {at for at, _, _ in divergence_of(curve)}
    if minimum.lowest is None:
        return []
    best = minimum.lowest[0]
    return [
        at
        for at, _ in means_of(curve)
        if at not in lost and any(min(at, best) < other < max(at, best) for other in lost)
    ]


def _without_loss(rows: Iterable[Row]) -> list[str]:
    """Runs that enter no fit."""
    found = [row.status for row in rows]
    failed, stopped = found.count(Status.FAILED), found.count(Status.STOPPED_EARLY)
    notes = [f"{counted(failed, 'run')} failed"] if failed else []
    return [*notes, f"{counted(stopped, 'run')} stopped early"] if stopped else notes


def arm_cautions(arm: Arm, axis: str) -> list[str]:
    """Sentences on a whole arm.

    Args:
        arm: to look at.
        axis: what is scaled.
    """
    at = f"at {axis}"
    minima = arm.minima
    said = [
        (
            _sizes(minima, _at_high_edge),
            f"the lowest loss {at} {{}} is at the highest usable "
            "learning rate: the optimum may lie above it",
        ),
        (
            _sizes(minima, _at_low_edge),
            f"the lowest loss {at} {{}} is at the lowest usable "
            "learning rate: the optimum may lie below it",
        ),
        (
            _sizes(minima, _few_points),
            f"the fit {at} {{}} has fewer than {FEWEST_POINTS} learning "
            "rates, so nothing is left to test its shape",
        ),
        (_sizes(minima, _misfit), f"the fitted curve does not describe the points {at} {{}}"),
        (_sizes(minima, _unknown), f"the runs {at} {{}} do not tell where the optimum lies"),
        (_one_seed(arm), f"one seed {at} {{}}: how much another seed would differ is not measured"),
        (
            _unknown_seeds(arm),
            f"the seeds {at} {{}} are not known (--column seed=NAME names their column): runs at "
            "one learning rate count as repeats, and how much another seed would differ is not "
            "measured",
        ),
        (_missing(arm), f"no run {at} {{}} has a final loss"),
    ]
    sentences = [text.format(found) for found, text in said if found]
    return [*sentences, *_mixed(arm, axis)]


def _at_high_edge(minimum: Minimum) -> bool:
    return minimum.edge == "high"


def _at_low_edge(minimum: Minimum) -> bool:
    return minimum.edge == "low"


def _unknown(minimum: Minimum) -> bool:
    return minimum.log2_lr.value is None and minimum.edge is None and minimum.runs > 0


def _few_points(minimum: Minimum) -> bool:
    return minimum.edge is None and 0 < minimum.points < FEWEST_POINTS


def _misfit(minimum: Minimum) -> bool:
    return minimum.misfit is not None


def _sizes(minima: Sequence[Minimum], holds: Callable[[Minimum], bool]) -> str:
    return listed(size_text(minimum.size) for minimum in minima if holds(minimum))


def _one_seed(arm: Arm) -> str:
    single = [c for c in arm.curves if len(set(c.seeds)) == 1]
    return listed(size_text(curve.size) for curve in single if arm.seeds_known)


def _unknown_seeds(arm: Arm) -> str:
    return "" if arm.seeds_known else listed(size_text(curve.size) for curve in arm.curves)


def _missing(arm: Arm) -> str:
    fitted = {curve.size for curve in arm.curves if means_of(curve)}
    return listed(size_text(size) for size in sorted({r.size for r in arm.rows} - fitted))


def _mixed(arm: Arm, axis: str) -> list[str]:
    """Runs of one curve that are no repeats of each other."""
    sentences = []
    for field, called in MIXED:
        mixed = {
            size: values
            for size in sorted({row.size for row in arm.rows})
            if len(values := sorted({str(getattr(row, field)) for row in arm.rows_at(size)})) > 1
        }
        if mixed:
            # Digests are long; twelve digits name them as well as all.
            shown = shortened([value[:12] for values in mixed.values() for value in values])
            where = f"{axis} {listed(size_text(size) for size in mixed)}"
            sentences.append(
                f"runs at {where} mix {called} ({shown}): a curve should differ in learning rate "
                "and seed alone"
            )
    return sentences


def study_cautions(study: Study) -> list[str]:
    """Sentences on the comparison of arms: what besides the arm differs between their runs."""
    sentences = [
        f"none of the runs of {name} finished or diverged: it is left out"
        for name in study.left_out
    ]
    for size in study.sizes:
        tokens = {row.tokens for row in study.rows if row.size == size and row.status in _WHOLE}
        if len(tokens) > 1:
            shown = shortened([f"{count:,}" for count in sorted(tokens)])
            sentences.append(
                f"finished runs of {study.axis} {size_text(size)} were trained on different "
                f"numbers of tokens ({shown}): their losses are not comparable"
            )
    data = sorted({row.data_sha256[:12] for row in study.rows if row.data_sha256})
    if len(data) > 1:
        sentences.append(f"arms or sizes used different data ({shortened(data)})")
    return sentences


_WHOLE = (Status.FINISHED,)
