"""Whole reports, from rows to files."""

import math
import re
from pathlib import Path

import pytest

from megatron_mup.errors import DataError
from megatron_mup.transfer.report.build import Report, make_report
from megatron_mup.transfer.report.source import Reported
from megatron_mup.transfer.runs import Status
from tests.transfer.report.sample_rows import a_row, arm_rows, two_arms

COMMAND = "megatron-mup sweep report out"


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Report:
    """Two arms, one that transfers and one that leaves the grid."""
    folder = tmp_path_factory.mktemp("report")
    runs = Reported(rows=tuple(two_arms()), table="out/runs.csv")
    return make_report(runs, folder, title="muP & SP", command=COMMAND)


def chapters(report: Report) -> dict[str, str]:
    """Text below each heading of level 2."""
    parts = report.markdown.read_text(encoding="utf-8").split("\n## ")
    return {part.split("\n", 1)[0]: part.split("\n", 1)[1] for part in parts[1:]}


def test_a_report_is_markdown_a_page_and_figures(report):
    folder = report.page.parent

    assert sorted(str(path.relative_to(folder)) for path in folder.rglob("*.*")) == [
        "figures/arms.png",
        "figures/arms.svg",
        "figures/loss_curves.png",
        "figures/loss_curves.svg",
        "figures/optima.png",
        "figures/optima.svg",
        "report.html",
        "report.md",
    ]
    assert {path.name for path in report.figures} == {
        path.name for path in (folder / "figures").iterdir()
    }


def test_the_report_starts_with_the_verdicts_and_ends_with_how_it_was_made(report):
    found = chapters(report)

    assert list(found) == [
        "Does the learning rate transfer?",
        "What to run next",
        "Before you believe it",
        "Loss against learning rate",
        "Where the optimum lies",
        "The arms side by side",
        "Arm mup",
        "Arm sp",
        "Definitions",
        "How this was made",
    ]
    verdicts = found["Does the learning rate transfer?"]
    assert "168 runs at width 64, 128, 256 and 512 (hidden size)" in verdicts
    assert "90% intervals" in verdicts
    assert re.search(r"^- \*\*mup: transfers\.\*\* ", verdicts, re.MULTILINE)
    assert re.search(r"^- \*\*sp: does not transfer\.\*\* ", verdicts, re.MULTILINE)
    assert COMMAND in found["How this was made"]


def test_the_table_of_an_arm_has_a_line_for_each_size_and_what_is_known_of_it(report):
    found = chapters(report)
    optima = re.findall(r"^\| (\d+) \| (-\d\.\d\d) \[", found["Arm mup"], re.MULTILINE)

    assert [size for size, _ in optima] == ["64", "128", "256", "512"]
    assert [float(value) for _, value in optima] == pytest.approx(
        [-5.6, -5.65, -5.7, -5.75], abs=0.15
    )
    assert "21 |" in found["Arm mup"] or "15 |" in found["Arm mup"]
    for name in ("shift per doubling", "zero-shot penalty", "E", "kappa", "L(inf)", "R(inf)"):
        assert f"| {name} |" in found["Arm mup"]
    assert found["Arm mup"].count("our definition, after arXiv:2605.21486") == 3


def test_an_optimum_at_the_edge_is_no_number(report):
    lines = [line for line in chapters(report)["Arm sp"].splitlines() if line.startswith("| 512 ")]

    (line,) = lines
    optimum = line.split(" | ")[1]
    assert "[" not in optimum
    assert "lowest learning rate" in line
    assert "may lie below it" in chapters(report)["Before you believe it"]


def test_a_prediction_says_what_it_does_without(report):
    table = chapters(report)["Where the optimum lies"]
    stays, leaves = (line for line in table.splitlines() if re.match(r"\| (mup|sp) ", line))

    assert stays.endswith("|  |")
    assert "without width 512, whose optimum is not known" in leaves
    assert "outside the learning rates that were run" in leaves


def test_both_files_say_the_same_words(report):
    page = report.page.read_text(encoding="utf-8")

    for heading in chapters(report):
        assert f"<h2>{heading}</h2>" in page
    assert "<title>muP &amp; SP</title>" in page
    assert page.count("<svg") == 3


def test_the_page_needs_no_other_file_and_no_network(report):
    page = report.page.read_text(encoding="utf-8")

    assert re.findall(r'(?:src|href)="(?!#|data:)[^"]*"', page) == []
    assert "@import" not in page
    assert "url(http" not in page
    ids = re.findall(r'\sid="([^"]+)"', page)
    assert len(ids) == len(set(ids))
    assert set(re.findall(r'href="#([^"]+)"', page)) <= set(ids)


def test_further_axes_have_a_figure_each_and_an_arm_for_every_value(tmp_path: Path):
    rows = []
    for first in ("0", "1"):
        for second in ("adam", "lion"):
            settings = {"parameterization.power": first, "optimizer.kind": second}
            grid = {"sizes": (64, 128), "seeds": (1, 2), "log2_lrs": (-8, -7, -6, -5, -4)}
            rows += arm_rows("mup", optimum=-6, settings=settings, **grid)

    report = make_report(Reported(rows=tuple(rows)), tmp_path, title="axes")

    found = chapters(report)
    assert {"Against kind", "Against power"} <= set(found)
    assert "Arm mup, kind adam, power 0" in found
    assert (tmp_path / "figures/further_axis_2.svg").is_file()


@pytest.mark.parametrize(
    ("case", "words"),
    [
        ("one run", "cannot tell"),
        ("all diverged", "cannot tell"),
        ("three points, one seed", "nothing is left to test"),
        ("one size", "cannot tell"),
    ],
)
def test_poor_runs_make_a_report_that_claims_nothing(tmp_path: Path, case, words):
    lost = {"validation_loss": math.nan, "train_loss": math.nan}
    rows = {
        "one run": lambda: [a_row()],
        "all diverged": lambda: arm_rows("mup", optimum=-6, status=Status.DIVERGED, **lost),
        "three points, one seed": lambda: arm_rows(
            "mup", optimum=-6, seeds=(1,), log2_lrs=(-7, -6, -5)
        ),
        "one size": lambda: arm_rows("mup", optimum=-6, sizes=(64,)),
    }[case]()

    report = make_report(Reported(rows=tuple(rows)), tmp_path, title="poor")

    assert words in report.markdown.read_text(encoding="utf-8")
    assert {verdict.outcome for verdict in report.verdicts.values()} == {"cannot tell"}


def test_a_caption_says_of_corrected_means_where_seeds_are_missing(tmp_path: Path):
    words = "full points means over seeds (where seeds are missing, corrected by how"
    rows = arm_rows("mup", optimum=-6, sizes=(64,))
    uneven = [row for row in rows if row.seed == 1 or abs(row.log2_lr + 6) <= 1]

    found = make_report(Reported(rows=tuple(uneven)), tmp_path, title="uneven")

    assert words in chapters(found)["Loss against learning rate"]
    even = make_report(Reported(rows=tuple(rows)), tmp_path / "even", title="even")
    assert words not in chapters(even)["Loss against learning rate"]


def test_runs_that_were_stopped_early_are_counted_below_the_figure(tmp_path: Path):
    early = {"status": Status.STOPPED_EARLY, "validation_loss": math.nan}
    rows = arm_rows("mup", optimum=-6, sizes=(64,))
    rows += [a_row(log2_lr=-2.0, seed=seed, **early) for seed in (1, 2)]

    found = chapters(make_report(Reported(rows=tuple(rows)), tmp_path, title="early"))

    words = "Not drawn, as they have no final loss: 2 runs stopped early."
    assert words in found["Loss against learning rate"]
    assert "2 runs stopped early" in found["Arm mup"]


def test_an_arm_of_one_size_has_no_numbers_across_sizes(tmp_path: Path):
    rows = arm_rows("mup", optimum=-6, sizes=(64,))

    found = chapters(make_report(Reported(rows=tuple(rows)), tmp_path, title="one"))

    assert "All runs are at width 64: there is nothing to compare across sizes." in found["Arm mup"]
    assert "across sizes | value" not in found["Arm mup"]


def test_a_caption_speaks_of_runs_where_seeds_are_not_known(tmp_path: Path):
    runs = Reported(rows=tuple(arm_rows("mup", optimum=-6, sizes=(64,))), seeds_known=False)

    text = chapters(make_report(runs, tmp_path, title="x"))["Loss against learning rate"]

    assert "full points means over runs, thick lines" in text
    assert "bold where all runs diverged" in text


def test_a_report_that_could_not_be_written_is_refused_before_the_fits(tmp_path: Path):
    (tmp_path / "taken").write_text("a file")

    with pytest.raises(DataError, match="--out"):
        make_report(Reported(rows=(a_row(),)), tmp_path / "taken", title="x")


def test_nothing_to_report_is_an_error(tmp_path: Path):
    with pytest.raises(DataError, match="no runs to report"):
        make_report(Reported(rows=()), tmp_path, title="x")
