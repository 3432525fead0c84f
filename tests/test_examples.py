"""The examples' tables come from their data, and their configurations are valid."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest

from megatron_mup.config_io import load_config
from megatron_mup.transfer.picture import curves_of, table_lines
from megatron_mup.transfer.records import read_records

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*/config.yaml")), ids=str)
def test_every_example_configuration_is_valid(path: Path) -> None:
    assert load_config(path).table.rows


def test_quickstart_table_is_made_from_its_runs() -> None:
    folder = EXAMPLES / "quickstart"
    records = read_records(folder / "runs.csv")
    text = (folder / "quickstart.md").read_text(encoding="utf-8")
    lines = table_lines(curves_of(records), math.inf)
    assert text.startswith("\n".join(lines))
    commits = {record.commit for record in records}
    assert len(commits) == 1
    assert "+" not in commits.pop()


def test_quickstart_readme_quotes_its_runs() -> None:
    folder = EXAMPLES / "quickstart"
    losses = {
        (row.cell.parameterization, row.cell.width, row.cell.log2_lr): row.validation_loss
        for row in read_records(folder / "runs.csv")
    }
    readme = (folder / "README.md").read_text(encoding="utf-8")
    best = {
        name: min(loss for key, loss in losses.items() if key[:2] == (name, 128))
        for name in ("mup", "sp")
    }
    moved = losses["sp", 128, -4.0]
    assert f"({moved:.3f} instead of {best['sp']:.3f})" in readme
    assert f"{moved - best['sp']:.2f} nats under SP" in readme
    assert f"({losses['mup', 128, -4.0]:.3f}," in readme
    assert losses["mup", 128, -4.0] == best["mup"]
    assert re.search(rf"\({best['sp']:.3f} against {best['mup']:.3f}\)", readme)
