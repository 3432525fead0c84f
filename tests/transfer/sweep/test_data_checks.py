"""Text and shards that do not serve a sweep are refused before anything runs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from megatron_mup.errors import ConfigError, DataError
from megatron_mup.transfer.sweep.cells import make_cells
from megatron_mup.transfer.sweep.data_checks import (
    check_same_data,
    check_text_options,
    prepare_data,
)
from megatron_mup.transfer.sweep.folder import SweepFolder
from megatron_mup.transfer.sweep.spec import load_sweep
from tests.transfer.sweep.sweeps import SWEEP, cells_of, sweep_of, write_sweep
from tests.transfer.test_runs import ROW


def test_too_few_held_out_tokens_are_refused_before_anything_runs(tmp_path: Path) -> None:
    # 1,600 tokens are held out: 99 sequences of 16 and a label; 25 batches of 4 need 100.
    for eval_tokens, refused in ((24 * 64, False), (25 * 64, True)):
        config = write_sweep(tmp_path, run={"eval_tokens": eval_tokens})
        sweep = load_sweep(config)
        cells = make_cells(sweep, tmp_path)
        folder = SweepFolder(tmp_path / "out")
        if refused:
            with pytest.raises(DataError, match=r"have 1,600 tokens, but .* reads 1,600 positions"):
                prepare_data(sweep, cells, folder=folder, text=(), echo=print)
        else:
            prepare_data(sweep, cells, folder=folder, text=(), echo=print)


def test_bf16_without_a_fast_kernel_is_warned_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("megatron_mup.platform.slow_bf16", lambda: "bf16 is slow")
    for arms, told in (
        ({"a": {}}, []),
        ({"a": {}, "b": {"bf16": True}}, ["warning: bf16 is slow"]),
    ):
        sweep = load_sweep(write_sweep(tmp_path, arms=arms))
        cells, lines = make_cells(sweep, tmp_path), []
        prepare_data(sweep, cells, folder=SweepFolder(tmp_path), text=(), echo=lines.append)
        assert lines == told


def test_text_that_cannot_serve_is_refused_at_once() -> None:
    with pytest.raises(ConfigError, match=r"--text novel.txt needs 'text: "):
        check_text_options(sweep_of(), cells_of(), [Path("novel.txt")])
    base = {**SWEEP["base"], "data": {}}
    text = {"vocab_size": 96, "valid_tokens": 128}
    sweep = sweep_of(base=base, text=text)
    # 100 tokens in whole batches of 64 are 128, and the last label is one more.
    with pytest.raises(ConfigError, match=r"valid_tokens is 128, but an evaluation reads 128"):
        check_text_options(sweep, cells_of(base=base, text=text), ())
    text["valid_tokens"] = 129
    check_text_options(sweep_of(base=base, text=text), cells_of(base=base, text=text), ())


def test_runs_on_other_shards_are_not_mixed(tmp_path: Path) -> None:
    cells = cells_of()
    rows = {cells[3].id: replace(ROW, cell=cells[3].id, data_sha256="e" * 64)}
    check_same_data(cells, rows, "e" * 64)
    with pytest.raises(DataError, match=r"with other shards \(data_sha256 eeeeeeeeeeee, now ffff"):
        check_same_data(cells, rows, "f" * 64)
    # A row of another plan is left alone.
    check_same_data(cells, {"x": ROW}, "f" * 64)
