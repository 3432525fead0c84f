"""The report's words: verdicts, metrics, figures and what to run next, from a study.

Nothing is claimed that a fit does not support: where an estimate is missing its reason is said.
Must not touch files.
"""

from __future__ import annotations

from collections.abc import Sequence

from megatron_mup.transfer.fits import Estimate, Minimum
from megatron_mup.transfer.report.cautions import arm_cautions, minimum_notes, study_cautions
from megatron_mup.transfer.report.document import (
    Block,
    Bullets,
    Document,
    Figure,
    Heading,
    Paragraph,
    Table,
)
from megatron_mup.transfer.report.provenance import provenance
from megatron_mup.transfer.report.study import Arm, Study, has_uneven_seeds, short_option
from megatron_mup.transfer.report.wording import (
    OUR_DEFINITION,
    UNITS,
    Show,
    cell_text,
    counted,
    estimate_text,
    learning_rate,
    listed,
    nats,
    octaves,
    plain,
    reason_of,
    sentence,
    size_text,
)
from megatron_mup.transfer.runs import Status


def write_contents(
    study: Study,
    *,
    title: str,
    command: str = "",
    source: str = "",
    notes: Sequence[str] = (),
    incomplete: bool = False,
) -> Document:
    """Say everything that the report says.

    Args:
        study: fitted runs.
        title: of the report.
        command: that makes it.
        source: table that the runs come from.
        notes: what to say of the runs, first of all that warns.
        incomplete: the sweep asks for runs that have not ended, which the notes name.
    """
    blocks: list[Block] = [
        *_verdicts(study),
        *_next_steps(study, incomplete=incomplete),
        *_cautions(study, notes),
        *_curves(study),
        *_optima(study),
        *_comparison(study),
        *_further_axes(study),
    ]
    for arm in study.arms:
        blocks += _arm_chapter(study, arm)
    blocks += _definitions(study)
    blocks += provenance(study, command=command, source=source)
    return Document(title, tuple(blocks))


def _verdicts(study: Study) -> list[Block]:
    items = [
        Paragraph(sentence(arm.verdict.because), f"{arm.name}: {arm.verdict.outcome}.")
        for arm in study.arms
    ]
    sizes = listed(size_text(size) for size in study.sizes)
    counts = UNITS.get(study.axis, study.axis)
    scaled = f"{study.axis} {sizes}" + (f" ({counts})" if counts != study.axis else "")
    return [
        Heading("Does the learning rate transfer?"),
        Paragraph(
            f"{len(study.rows):,} runs at {scaled}. Brackets are {study.level:.0%} intervals; "
            "losses are nats per token of held-out text; learning rates are log2."
        ),
        Bullets(tuple(items)),
    ]


def _next_steps(study: Study, *, incomplete: bool) -> list[Block]:
    items = [
        Paragraph(sentence(step), f"{arm.name}:")
        for arm in study.arms
        for step in arm.verdict.next_steps
    ]
    if incomplete:
        first = "First the runs that the sweep still asks for, named below: they may be those here."
        items.insert(0, Paragraph(first))
    elif not items:
        items = [Paragraph("The verdicts ask for no further runs.")]
    return [Heading("What to run next"), Bullets(tuple(items))]


def _cautions(study: Study, notes: Sequence[str]) -> list[Block]:
    items = [Paragraph(sentence(text)) for text in (*notes, *study_cautions(study))]
    items += [
        Paragraph(sentence(text), f"{arm.name}:")
        for arm in study.arms
        for text in arm_cautions(arm, study.axis)
    ]
    return [Heading("Before you believe it"), Bullets(tuple(items))] if items else []


def _curves(study: Study) -> list[Block]:
    repeats = "seeds" if study.seeds_known else "runs"
    caption = (
        f"Faint points are runs, full points means over {repeats}{_corrected(study)}, thick lines "
        "the fitted curves over the learning rates that they use, white diamonds the minima with "
        f"their {study.level:.0%} intervals; a diamond without a bar has none, and a black arrow "
        "is a side without a bound. A hollow point with an arrow is the lowest one, at the edge of "
        "the usable learning rates: the optimum may lie "
        "beyond. Arrows in the strip at the top are means above the axis, crosses are diverged "
        f"runs: bold where all {repeats} diverged, thin where some did. The strip has a row for "
        f"each size.{_not_drawn(study)}"
    )
    return [
        Heading("Loss against learning rate"),
        Figure("loss_curves", "Validation loss against log2 learning rate, by arm", caption),
    ]


def _not_drawn(study: Study) -> str:
    """Which runs a figure of final losses lacks, for a caption."""
    early = sum(row.status is Status.STOPPED_EARLY for row in study.rows)
    if not early:
        return ""
    return f" Not drawn, as they have no final loss: {counted(early, 'run')} stopped early."


def _corrected(study: Study) -> str:
    """What means over unequal seeds are, for a caption."""
    if not any(has_uneven_seeds(curve) for arm in study.arms for curve in arm.curves):
        return ""
    return (
        " (where seeds are missing, corrected by how those that ran differ from the others at the "
        "learning rates that they share, because the fit has a level for each seed)"
    )


def _optima(study: Study) -> list[Block]:
    caption = (
        f"Optimal learning rate with its {study.level:.0%} interval. Hollow points with an arrow "
        "are bounds: the optimum lies on the arrow's side. Lines and bands are the fitted trend "
        f"and where the optimum of one more size would lie; {study.axis} "
        f"{size_text(study.next_size)} was not run."
    )
    rows = tuple(
        (
            arm.name,
            cell_text(found := arm.predictions[-1][1], octaves),
            "" if found.value is None else learning_rate(found.value),
            "; ".join(_prediction_notes(study, arm)),
        )
        for arm in study.arms
    )
    head = ("arm", f"log2 LR at {study.axis} {size_text(study.next_size)}", "LR", "note")
    return [
        Heading("Where the optimum lies"),
        Figure("optima", f"Optimal learning rate against {study.axis}, by arm", caption),
        Table(head, rows),
    ]


def _prediction_notes(study: Study, arm: Arm) -> list[str]:
    """What the prediction at the next size does without."""
    found = arm.predictions[-1][1]
    notes = [reason_of(found)] if found.reason is not None else []
    if found.value is None:
        return notes
    unknown = [size_text(m.size) for m in arm.minima if m.log2_lr.value is None]
    if unknown:
        notes.append(f"without {study.axis} {listed(unknown)}, whose optimum is not known")
    rates = [row.log2_lr for row in arm.rows]
    if not min(rates) <= found.value <= max(rates):
        notes.append("outside the learning rates that were run")
    return notes


def _comparison(study: Study) -> list[Block]:
    largest = size_text(study.sizes[-1])
    caption = (
        f"Left: loss at the optimum of each {study.axis}. Right: zero-shot penalty, the loss of "
        f"{study.zero_shot} above its own best; a hollow point with an arrow is a lower bound."
    )
    head = (
        "arm",
        "verdict",
        "shift per doubling (octaves)",
        "zero-shot penalty (nats)",
        f"best loss at {study.axis} {largest}",
        "R(inf) (nats)",
    )
    rows = tuple(
        (
            arm.name,
            arm.verdict.outcome,
            cell_text(arm.transfer.shift_per_doubling, octaves),
            cell_text(arm.transfer.zero_shot_penalty, nats),
            _loss_at(arm, study.sizes[-1]),
            cell_text(_asymptotic_penalty(study, arm), nats),
        )
        for arm in study.arms
    )
    return [
        Heading("The arms side by side"),
        Figure("arms", f"Best loss against {study.axis} and zero-shot penalty, by arm", caption),
        Table(head, rows),
    ]


def _loss_at(arm: Arm, size: float) -> str:
    return next((cell_text(m.loss, nats) for m in arm.minima if m.size == size), "not run")


def _asymptotic_penalty(study: Study, arm: Arm) -> Estimate:
    missing = Estimate(value=None, reason="no arm's loss has a fitted limit")
    return study.comparison.asymptotic_penalty.get(arm.name, missing)


def _further_axes(study: Study) -> list[Block]:
    blocks: list[Block] = []
    for index, option in enumerate(study.further_axes):
        short = short_option(option)
        caption = (
            f"Optimum and best loss at each value of {option}, with {study.level:.0%} intervals; "
            "a hollow point with an arrow is a bound. Values stand at equal distances."
        )
        alt = f"Optimal learning rate and best loss against {short}"
        blocks += [Heading(f"Against {short}"), Figure(axis_figure(index), alt, caption)]
    return blocks


def axis_figure(index: int) -> str:
    """Name of the figure of one further axis."""
    return f"further_axis_{index + 1}"


def _arm_chapter(study: Study, arm: Arm) -> list[Block]:
    head = (
        study.axis,
        "optimum (log2 LR)",
        "LR",
        "best loss (nats)",
        "curvature (nats per octave^2)",
        "LRs",
        "runs",
        "diverged",
        "notes",
    )
    rows = tuple(_minimum_row(arm, minimum) for minimum in arm.minima)
    across: Block = Table(("across sizes", "value", "meaning"), _metric_rows(study, arm))
    if len(rows) == 1:
        only = f"{study.axis} {size_text(arm.minima[0].size)}"
        across = Paragraph(f"All runs are at {only}: there is nothing to compare across sizes.")
    return [Heading(f"Arm {arm.name}"), Table(head, rows), across]


def _minimum_row(arm: Arm, minimum: Minimum) -> tuple[str, ...]:
    best = minimum.log2_lr
    return (
        size_text(minimum.size),
        cell_text(best, octaves),
        "" if best.value is None else learning_rate(best.value),
        cell_text(minimum.loss, nats),
        cell_text(minimum.curvature, plain),
        str(minimum.points),
        str(minimum.runs),
        str(minimum.diverged),
        "; ".join(minimum_notes(arm, minimum)),
    )


def optima_table(study: Study) -> Table:
    """Optimum and loss of every arm and size, for a terminal."""
    rows = tuple(
        (arm.name, *_minimum_row(arm, minimum)[:4]) for arm in study.arms for minimum in arm.minima
    )
    return Table(("arm", study.axis, "optimum (log2 LR)", "LR", "best loss (nats)"), rows)


def _metric_rows(study: Study, arm: Arm) -> tuple[tuple[str, str, str], ...]:
    metrics = [*_measured(arm, study.axis), *_extrapolated(study, arm)]
    return tuple(
        (name, estimate_text(estimate, show), meaning) for name, estimate, show, meaning in metrics
    )


_Metric = tuple[str, Estimate, Show, str]
"""Name, estimate, how its numbers are written, and what it means."""


def _measured(arm: Arm, axis: str) -> list[_Metric]:
    """What compares the sizes that were run."""
    found = arm.transfer
    smallest, largest = size_text(found.sizes[0]), size_text(found.sizes[-1])
    shift = f"octaves of the optimum per doubling of the {axis}"
    penalty = f"nats that {largest} loses at the optimum of {smallest}"
    return [
        ("shift per doubling", found.shift_per_doubling, octaves, shift),
        ("total shift", found.total_shift, octaves, f"octaves from {smallest} to {largest}"),
        ("zero-shot penalty", found.zero_shot_penalty, nats, penalty),
    ]


def _extrapolated(study: Study, arm: Arm) -> list[_Metric]:
    """What power laws across the sizes say."""
    found = arm.transfer
    miss = "octaves by which the smaller sizes miss the largest's optimum"
    free = "alpha - 2 beta + gamma; below 0: transfer becomes free"
    above = "L(inf) above the best arm's, nats"
    return [
        ("E", found.extrapolation_error, octaves, f"{miss}; {OUR_DEFINITION}"),
        ("alpha", found.alpha, plain, "best loss = L(inf) + A size^-alpha"),
        ("beta", found.beta, plain, "|optimum - its limit| = B size^-beta"),
        ("gamma", found.gamma, plain, "curvature = C size^gamma"),
        ("kappa", found.kappa, plain, f"{free}; {OUR_DEFINITION}"),
        ("L(inf)", found.asymptotic_loss, nats, "limit of the best loss, nats"),
        ("R(inf)", _asymptotic_penalty(study, arm), nats, f"{above}; {OUR_DEFINITION}"),
    ]


def _definitions(study: Study) -> list[Block]:
    best = study.comparison.best
    against = f" The best arm is {best}." if best is not None else ""
    return [
        Heading("Definitions"),
        Paragraph(
            f"E, kappa and R(inf): {OUR_DEFINITION}. E is the error, in octaves, of predicting the "
            "largest size's optimum from the smaller ones. kappa is the exponent with which the "
            "excess loss of the extrapolated learning rate, relative to the loss still to be "
            "gained, scales with size. R(inf) is an arm's fitted limit of the loss minus the "
            f"lowest of all arms.{against} 'Not identifiable' means that the runs cannot tell the "
            "number; the reason is given."
        ),
    ]
