"""``megatron-mup sweep report``."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from megatron_mup.errors import ConfigError, DataError
from megatron_mup.transfer.report.command import make_folder_report, report_command, summary
from megatron_mup.transfer.report.source import mixed_data, table_of
from megatron_mup.transfer.runs import append_row, read_rows, write_parquet
from tests.transfer.report.folders import TEN, TWENTY, folder_of, rows_of_cells
from tests.transfer.report.sample_rows import a_row, arm_rows


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
    rows = read_rows(sweep / "runs.csv")
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
        for lr, loss in ((0.004, 3.2), (0.008, 3.0), (0.016, 3.1), (0.032, "nan"), (0.064, "")):
            lines.append(f"{size},{lr},{loss}")
    (tmp_path / "theirs.csv").write_text("\n".join(lines) + "\n")
    columns = ["width=n_embd", "lr=learning_rate", "loss=val/loss"]

    options = [word for column in columns for word in ("--column", column)]
    code, printed = run(str(tmp_path / "theirs.csv"), *options)
    assert code == 0
    assert printed[0].startswith("2 lines of the table have no loss in the column 'val/loss'")
    text = (tmp_path / "report/report.md").read_text(encoding="utf-8")
    assert "8 runs: 6 finished, 2 diverged" in text
    assert "| seeds | not recorded |" in text


def test_a_missing_table_and_a_wrong_level_are_refused_at_once(tmp_path):
    with pytest.raises(DataError, match="no table of runs"):
        table_of(tmp_path)
    with pytest.raises(ConfigError, match=r"--level 1\.5 is no probability"):
        run(str(tmp_path), "--level", "1.5")


def test_rows_of_an_earlier_yaml_of_the_folder_enter_no_fit(tmp_path):
    # Ten steps end at a loss of 4, twenty at one of 3.
    rows = [*rows_of_cells(TEN, level=4.0), *rows_of_cells(TWENTY)]
    report = make_folder_report(folder_of(tmp_path, TWENTY, rows))
    lines = summary(report)

    assert lines[0] == "10 of 20 rows are left out: of no run that sweep.yaml asks for"
    assert ["3.0000 [" in line for line in lines[3:5]] == [True, True]
    text = report.markdown.read_text(encoding="utf-8")
    assert "10 runs: 10 finished" in text
    assert "- 10 of 20 rows are left out: of no run that sweep.yaml asks for." in text
    # The table itself is used whole.
    whole = make_folder_report(tmp_path / "runs.csv", out=tmp_path / "whole")
    assert whole.notes == ()
    assert "20 runs: 20 finished" in whole.markdown.read_text(encoding="utf-8")


def test_a_folder_without_a_row_of_its_yaml_is_refused(tmp_path):
    folder_of(tmp_path, TWENTY, rows_of_cells(TEN))
    with pytest.raises(DataError, match=r"none of the 10 rows of '.*runs\.csv' is of a run"):
        make_folder_report(tmp_path)
    assert not (tmp_path / "report").exists()


def test_an_arm_on_several_sets_of_shards_is_told_of(tmp_path):
    rows = [a_row(arm="a"), a_row(arm="b"), a_row(arm="b", seed=2, data_sha256="e" * 64)]
    assert mixed_data(rows) == [
        "b: its runs are on 2 different sets of shards (column data_sha256), so that their losses "
        "do not compare"
    ]
    for row in arm_rows("mup", optimum=-6, sizes=(64, 128), seeds=(1,)):
        data = "e" * 64 if row.size == 128 else "d" * 64
        append_row(tmp_path / "runs.csv", replace(row, data_sha256=data))
    code, lines = run(str(tmp_path))
    assert code == 0
    assert lines[0].startswith("mup: its runs are on 2 different sets of shards")
