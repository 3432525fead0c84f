"""The examples' reports come from their tables, and their configurations are valid."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from megatron_mup.config_io import load_config
from megatron_mup.transfer.report.command import make_folder_report
from megatron_mup.transfer.runs import read_rows
from megatron_mup.transfer.sweep.spec import load_sweep

EXAMPLES = Path(__file__).parents[1] / "examples"
_REPORTS = sorted(EXAMPLES.glob("*/report.md"))
_NUMBER = re.compile(r"-?\d+\.\d+")


@pytest.mark.parametrize(
    "path", sorted({*EXAMPLES.glob("*/config.yaml")} - {*EXAMPLES.glob("campaign/*")}), ids=str
)
def test_every_example_configuration_is_valid(path: Path) -> None:
    assert load_config(path).table.rows


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*/sweep.yaml")), ids=str)
def test_every_example_sweep_is_valid(path: Path) -> None:
    assert load_sweep(path).sizes


def _results(report: str) -> str:
    """A report without the part that says how it was made."""
    return report.split("## How this was made", maxsplit=1)[0]


@pytest.mark.parametrize("path", _REPORTS, ids=lambda path: path.parent.name)
def test_a_report_is_made_from_its_table(path: Path, tmp_path: Path) -> None:
    made = _results(make_folder_report(path.parent, out=tmp_path).markdown.read_text("utf-8"))
    kept = _results(path.read_text("utf-8"))
    assert _NUMBER.sub("#", made) == _NUMBER.sub("#", kept)
    found, expected = (list(map(float, _NUMBER.findall(text))) for text in (made, kept))
    # The last digit shown may round the other way on another processor.
    assert found == pytest.approx(expected, abs=0.011, rel=1e-3)


@pytest.mark.parametrize("path", _REPORTS, ids=lambda path: path.parent.name)
def test_the_runs_of_an_example_name_a_clean_commit(path: Path) -> None:
    commits = {row.commit for row in read_rows(path.parent / "runs.csv")}
    assert all(re.fullmatch(r"([\w.]+-)?[0-9a-f]{7,40}", commit) for commit in commits), commits


@pytest.mark.parametrize("path", _REPORTS, ids=lambda path: path.parent.name)
def test_the_readme_of_an_example_quotes_its_verdicts(path: Path) -> None:
    kept = path.read_text("utf-8")
    readme = " ".join((path.parent / "README.md").read_text("utf-8").split())
    verdicts = re.findall(
        r"^- \*\*(\S+: (?:transfers|cannot tell|does not transfer))\.", kept, re.M
    )
    assert verdicts
    assert [verdict for verdict in verdicts if verdict not in readme] == []
    for picture in re.findall(r"!\[[^]]*\]\((\S+)\)", readme):
        assert (path.parent / picture).read_bytes()[:4] == b"\x89PNG"
