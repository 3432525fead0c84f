"""The example's slopes, verdicts and README come from its saved numbers."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_mup.diagnostics.coordinate_fit import failures, fit_coordinates
from megatron_mup.diagnostics.coordinate_report import read_coordinates, slopes_csv
from megatron_mup.diagnostics.recorder import recorded_modules
from megatron_mup.diagnostics.widths import runs_at_widths
from megatron_mup.run_source import RunSource

EXAMPLE = Path(__file__).parents[2] / "examples" / "coordinate_check"
COLUMNS = {"mup": 1, "sp": 3}


@pytest.mark.parametrize(("folder", "preset"), [("mup", "baseline"), ("sp", "sp_simple")])
def test_the_example_follows_from_its_numbers(folder: str, preset: str) -> None:
    source = RunSource(preset=preset, width=64, head_dim=16, base_width=64)
    run = runs_at_widths(source, [], [64, 512])[512]
    numbers = (EXAMPLE / folder / "coordinates.csv").read_text(encoding="utf-8")
    fits = fit_coordinates(read_coordinates(numbers), run)
    # Least squares may differ in the last bits from one machine to another.
    saved = (EXAMPLE / folder / "slopes.csv").read_text(encoding="utf-8").splitlines()
    assert [line.split(",")[-1] for line in slopes_csv(fits).splitlines()] == [
        line.split(",")[-1] for line in saved
    ]
    failed = set(recorded_modules(run.model)) - {"embedding"} if folder == "sp" else set()
    assert set(failures(fits)) == failed
    readme = (EXAMPLE / "README.md").read_text(encoding="utf-8").splitlines()
    rows = {line.split(" | ")[0].strip("| "): line.strip("| ").split(" | ") for line in readme}
    for fit in fits:
        if fit.step in (1, 4):
            cell = rows[fit.module][COLUMNS[folder] + (fit.step == 4)]
            assert cell.strip() == f"{fit.slope:+.2f} +- {fit.half_width:.2f}"
