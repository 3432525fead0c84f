"""docs/sweeps.md: its examples are sweeps, and it knows every key and column."""

from __future__ import annotations

import re
from pathlib import Path

import yaml

from megatron_mup.transfer.runs import COLUMNS
from megatron_mup.transfer.sweep.cells import make_cells
from megatron_mup.transfer.sweep.spec import _KEYS, Sweep, sweep_from_dict

_PAGE = (Path(__file__).parents[3] / "docs" / "sweeps.md").read_text(encoding="utf-8")

_EXAMPLES: list[str] = re.findall(r"```yaml\n(.*?)```", _PAGE, re.DOTALL)


def _sweep(text: str) -> Sweep:
    return sweep_from_dict(yaml.safe_load(text), origin="docs/sweeps.md")


def test_the_example_is_a_sweep(tmp_path: Path) -> None:
    cells = make_cells(_sweep(_EXAMPLES[0]), tmp_path)
    # Two arms, three widths, seven rates, three seeds.
    assert len(cells) == 126
    # 800,000 / (16 x 128), rounded up.
    assert cells[-1].run.training.train_iters == 391


def test_the_further_examples_are_keys_of_a_sweep() -> None:
    example, *further = _EXAMPLES
    sweep = _sweep(example)
    assert (sweep.refine, sweep.stop_early) == (None, None)
    sweep = _sweep("\n".join(_EXAMPLES))
    # All that the page adds to its example.
    assert len(further) == 2
    assert sweep.refine is not None
    assert (sweep.refine.max_cells, sweep.refine.widest) == (60, (-14.0, 2.0))
    assert sweep.stop_early is not None
    assert (sweep.stop_early.after, sweep.stop_early.margin) == (0.5, 1.0)


def test_every_key_and_column_is_described() -> None:
    described = set(re.findall(r"`([a-z_0-9]+)[`.]", _PAGE))
    assert set(_KEYS) <= described
    assert set(COLUMNS) <= described
