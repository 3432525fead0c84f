"""Text and shards that do not serve a sweep are refused before anything runs."""

from __future__ import annotations

import gzip
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_mup.errors import ConfigError, DataError
from megatron_mup.transfer.sweep.cells import make_cells
from megatron_mup.transfer.sweep.data_checks import (
    check_same_data,
    check_source,
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


def own_text(**options: int) -> dict[str, Any]:
    """Top-level keys of a sweep that makes its shards."""
    return {"base": {**SWEEP["base"], "data": {}}, "text": {"vocab_size": 96, **options}}


def check_before(folder: Path, *text: Path, eval_tokens: int | None, **options: int) -> None:
    """What is asked before the folder is touched or a text is read."""
    changes = own_text(**options) | {"run": eval_tokens and {"eval_tokens": eval_tokens}}
    sweep, cells = sweep_of(**changes), cells_of(**changes)
    check_text_options(sweep, cells, text)
    check_source(sweep, cells, SweepFolder(folder), text)


def test_a_text_beside_shards_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"--text novel.txt needs 'text: "):
        check_text_options(sweep_of(), cells_of(), [Path("novel.txt")])


def test_an_evaluation_beyond_what_is_held_out_is_refused_with_both_options(
    tmp_path: Path,
) -> None:
    # 100 tokens in whole batches of 64 are 128, and the last label is one more.
    with pytest.raises(ConfigError) as raised:
        check_before(tmp_path, eval_tokens=100, valid_tokens=128)
    assert str(raised.value) == (
        "text.valid_tokens is 128, but run.eval_tokens 100 makes an evaluation read 128 positions "
        "and one token more; raise text.valid_tokens to 129 or lower run.eval_tokens"
    )
    check_before(tmp_path, eval_tokens=100, valid_tokens=129)
    # Ten batches of 64.
    with pytest.raises(ConfigError, match=r"but training.eval_iters 10 makes .* read 640 positi"):
        check_before(tmp_path, eval_tokens=None, valid_tokens=640)


def test_more_held_out_tokens_than_half_of_the_bytes_are_refused_unread(tmp_path: Path) -> None:
    text, packed = tmp_path / "text.txt", tmp_path / "text.txt.gz"
    text.write_text("x" * 1281)
    packed.write_bytes(gzip.compress(text.read_bytes()))
    out = tmp_path / "out"
    with pytest.raises(DataError) as raised:
        # 11 batches of 64.
        check_before(out, text, eval_tokens=641)
    assert str(raised.value) == (
        "run.eval_tokens 641 makes an evaluation read 704 positions and one token more, but the "
        "text has 1,281 bytes, of which at most half are held out, and a token has at least one; "
        "lower run.eval_tokens, or take more text"
    )
    with pytest.raises(DataError, match=r"text.valid_tokens is 700, but the text has 1,281 bytes"):
        check_before(out, text, eval_tokens=100, valid_tokens=700)
    with pytest.raises(DataError, match=r"run.eval_tokens 641 .*, but text.corpus_bytes is 1,281,"):
        check_before(out, eval_tokens=641, corpus_bytes=1281)
    # Half of two files; and nobody knows how much is in a packed one.
    check_before(out, text, text, eval_tokens=641)
    check_before(out, packed, eval_tokens=641)
    assert not out.exists()
    # What was once held out of a text is known better.
    (out / "data").mkdir(parents=True)
    (out / "data" / "text.manifest.json").touch()
    check_before(out, eval_tokens=641, corpus_bytes=1281)


def test_runs_on_other_shards_are_not_mixed(tmp_path: Path) -> None:
    cells = cells_of()
    rows = {cells[3].id: replace(ROW, cell=cells[3].id, data_sha256="e" * 64)}
    check_same_data(cells, rows, "e" * 64)
    with pytest.raises(DataError, match=r"with other shards \(data_sha256 eeeeeeeeeeee, now ffff"):
        check_same_data(cells, rows, "f" * 64)
    # A row of another plan is left alone.
    check_same_data(cells, {"x": ROW}, "f" * 64)
