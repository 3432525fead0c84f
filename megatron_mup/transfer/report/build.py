"""Make a report: fit the runs, draw the figures, write Markdown and the page.

Files appear under their names when they are whole; a second report replaces the first.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from megatron_mup.data.publication import check_writable, explained_failure, publish_text
from megatron_mup.transfer.fits import Verdict
from megatron_mup.transfer.report.contents import axis_figure, optima_table, write_contents
from megatron_mup.transfer.report.document import Document, Table
from megatron_mup.transfer.report.figure_arms import draw_arms
from megatron_mup.transfer.report.figure_axes import draw_axis
from megatron_mup.transfer.report.figure_curves import draw_curves
from megatron_mup.transfer.report.figure_optima import draw_optima
from megatron_mup.transfer.report.figure_style import write_figure
from megatron_mup.transfer.report.markdown import to_markdown
from megatron_mup.transfer.report.page import to_html
from megatron_mup.transfer.report.source import Reported
from megatron_mup.transfer.report.study import Study, study_rows


@dataclass(frozen=True, kw_only=True)
class Report:
    """A report that was written.

    Attributes:
        markdown: ``report.md``.
        page: ``report.html``, which needs no other file.
        figures: ``figures/*.svg`` and ``*.png``.
        verdicts: name of each arm -> what its runs say.
        optima: one line for each arm and size.
        notes: what to say of the rows that it was made of.
    """

    markdown: Path
    page: Path
    figures: tuple[Path, ...]
    verdicts: Mapping[str, Verdict]
    optima: Table
    notes: tuple[str, ...]


def make_report(
    runs: Reported, folder: Path, *, title: str, level: float = 0.9, command: str = ""
) -> Report:
    """Fit runs and write their report.

    Args:
        runs: of one sweep, of one scaled axis.
        folder: of the report; made if missing.
        title: of the report.
        level: probability that the intervals hold, between 0 and 1.
        command: that makes this report, to be printed in it.

    Returns:
        Where everything is, and the verdicts.

    Raises:
        DataError: there is nothing to report, or the folder cannot be written.
    """
    markdown, page = folder / "report.md", folder / "report.html"
    figures = folder / "figures"
    check_writable([markdown, page, figures / "x"], overwrite=True, option="--out")
    study = study_rows(runs.rows, level=level, seeds_known=runs.seeds_known)
    document = _document(study, runs, title=title, command=command)
    drawings = {}
    with explained_failure(folder, "--out"):
        for name, draw in _figures(study).items():
            drawings[name] = write_figure(draw, figures, name)
        publish_text(markdown, to_markdown(document))
        publish_text(page, to_html(document, drawings))
    return Report(
        markdown=markdown,
        page=page,
        figures=tuple(figures / f"{name}.{kind}" for name in drawings for kind in ("svg", "png")),
        verdicts={arm.name: arm.verdict for arm in study.arms},
        optima=optima_table(study),
        notes=runs.notes,
    )


def _document(study: Study, runs: Reported, *, title: str, command: str) -> Document:
    return write_contents(
        study,
        title=title,
        command=command,
        source=runs.table,
        notes=runs.notes,
        incomplete=runs.incomplete,
    )


def _figures(study: Study) -> dict[str, Callable[[], Any]]:
    """What draws each figure, by the name that the contents give it."""
    drawn: dict[str, Callable[[], Any]] = {
        "loss_curves": partial(draw_curves, study),
        "optima": partial(draw_optima, study),
        "arms": partial(draw_arms, study),
    }
    for index, option in enumerate(study.further_axes):
        drawn[axis_figure(index)] = partial(draw_axis, study, option)
    return drawn
