"""``megatron-mup sweep report``."""

import re
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from megatron_mup.errors import ConfigError, DataError
from megatron_mup.transfer.report.command import report_command, rows_of, table_of
from megatron_mup.transfer.runs import append_row, write_parquet
from tests.transfer.report.sample_rows import arm_rows


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a small sweep."""
    folder = tmp_path_factory.mktemp("sweep")
    grid = {"sizes": (64, 128), "seeds": (1, 2), "log2_lrs": (-8, -7, -6, -5, -4)}
    for row in arm_rows("mup", optimum=-6, **grid):
        append_row(folder / "runs.csv", row)
    return folder


def run(*arguments: str) -> tuple[int, list[str]]:
    """Exit code and lines printed."""
    app = typer.Typer()
    app.command()(report_command)
    result = CliRunner().invoke(app, list(arguments))
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.output.splitlines()


def test_the_report_of_a_sweep_lies_in_its_folder(sweep):
    code, lines = run(str(sweep))

    assert code == 0
    assert lines[0] == "| arm | width | optimum (log2 LR) | LR | best loss (nats) |"
    # The sample's optimum is -6 at both widths, with noise.
    assert re.match(r"\| mup \| 64 \| -(5\.9|6\.0)\d \[", lines[2])
    assert re.match(r"\| mup \| 128 \| -(5\.9|6\.0)\d \[", lines[3])
    assert lines[4] == ""
    assert re.match(r"mup: (transfers|cannot tell)\. [A-Z].*\.$", lines[5])
    assert lines[-1] == f"report: {sweep}/report/report.html (also report.md, figures/)"
    text = (sweep / "report/report.md").read_text(encoding="utf-8")
    assert text.startswith("# Learning-rate transfer: sample\n")
    assert f"megatron-mup sweep report {sweep} |" in text
    assert f"{sweep}/runs.csv" in text


def test_level_title_and_folder_can_be_chosen(sweep, tmp_path):
    rows = rows_of(sweep / "runs.csv", [])
    write_parquet(tmp_path / "copy.parquet", rows)

    run(
        str(tmp_path / "copy.parquet"),
        "--out",
        str(tmp_path / "r"),
        "--level",
        "0.8",
        "--title",
        "T",
    )

    text = (tmp_path / "r/report.md").read_text(encoding="utf-8")
    assert text.startswith("# T\n")
    assert "80% intervals" in text
    assert "--level 0.8" in text


def test_a_table_of_another_program_is_read_by_its_columns(tmp_path):
    lines = ["n_embd,learning_rate,val/loss"]
    for size in (64, 128):
        for lr, loss in ((0.004, 3.2), (0.008, 3.0), (0.016, 3.1), (0.032, "nan")):
            lines.append(f"{size},{lr},{loss}")
    (tmp_path / "theirs.csv").write_text("\n".join(lines) + "\n")
    columns = ["width=n_embd", "lr=learning_rate", "loss=val/loss"]

    rows = rows_of(tmp_path / "theirs.csv", columns)

    assert [row.size for row in rows] == [64.0] * 4 + [128.0] * 4
    options = [word for column in columns for word in ("--column", column)]
    code, _ = run(str(tmp_path / "theirs.csv"), *options)
    assert code == 0
    text = (tmp_path / "report/report.md").read_text(encoding="utf-8")
    assert "8 runs: 6 finished, 2 diverged" in text


@pytest.mark.parametrize(
    ("columns", "words"),
    [
        (["width"], "--column 'width' must be NAME=COLUMN"),
        (["width="], "must be NAME=COLUMN"),
        (["lr=a", "lr=b"], "--column lr is given twice: a and b"),
    ],
)
def test_columns_in_another_form_are_refused(tmp_path, columns, words):
    with pytest.raises(ConfigError, match=words):
        rows_of(tmp_path / "t.csv", columns)


def test_a_missing_table_and_a_wrong_level_are_refused_at_once(tmp_path):
    with pytest.raises(DataError, match="no table of runs"):
        table_of(tmp_path)
    with pytest.raises(ConfigError, match=r"--level 1\.5 is no probability"):
        run(str(tmp_path), "--level", "1.5")
