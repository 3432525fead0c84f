"""docs/sweeps.md: its example is a sweep, and it knows every key and column."""

from __future__ import annotations

import re
from pathlib import Path

import yaml

from megatron_mup.transfer.runs import COLUMNS
from megatron_mup.transfer.sweep.cells import make_cells
from megatron_mup.transfer.sweep.spec import _KEYS, sweep_from_dict

_PAGE = (Path(__file__).parents[3] / "docs" / "sweeps.md").read_text(encoding="utf-8")


def test_the_example_is_a_sweep(tmp_path: Path) -> None:
    (example,) = re.findall(r"```yaml\n(.*?)```", _PAGE, re.DOTALL)
    sweep = sweep_from_dict(yaml.safe_load(example), origin="docs/sweeps.md")
    cells = make_cells(sweep, tmp_path)
    # Two arms, three widths, seven rates, three seeds.
    assert len(cells) == 126
    # 800,000 / (16 x 128), rounded up.
    assert cells[-1].run.training.train_iters == 391


def test_every_key_and_column_is_described() -> None:
    described = set(re.findall(r"`([a-z_0-9]+)[`.]", _PAGE))
    assert set(_KEYS) <= described
    assert set(COLUMNS) <= described
