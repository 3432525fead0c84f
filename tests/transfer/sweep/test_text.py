"""Tokenizer and shards that a sweep makes for itself."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_mup.data.shards import open_shard
from megatron_mup.errors import DataError
from megatron_mup.transfer.sweep.cells import make_cells
from megatron_mup.transfer.sweep.folder import SweepFolder
from megatron_mup.transfer.sweep.results import data_digest
from megatron_mup.transfer.sweep.session import prepare_data
from megatron_mup.transfer.sweep.shards import make_shards
from tests.transfer.sweep.sweeps import SWEEP, sweep_of


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """300 kB of numbers in words."""
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("\n".join(f"line {n} of a text, {n * n} squared." for n in range(9000)))
    return path


def test_a_sweep_makes_shards_that_hold_out_enough(text: Path, tmp_path: Path) -> None:
    base = {**SWEEP["base"], "data": {}, "model": SWEEP["base"]["model"] | {"vocab_size": 400}}
    sweep = sweep_of(base=base, text={"vocab_size": 400, "valid_tokens": 30_000})
    folder = SweepFolder(tmp_path)
    cells = make_cells(sweep, folder.data)
    prepare_data(sweep, cells, folder=folder, text=[text], echo=lambda _line: None)
    train, valid = (open_shard(folder.data / f"text_{part}").tokens for part in ("train", "valid"))
    # A twentieth, the usual share, is fewer.
    assert 30_000 <= valid < 60_000
    assert (train + valid) / 20 < 30_000
    digest = data_digest(cells[0].run)
    assert len(digest) == 64
    made = (folder.data / "text_train.bin").stat().st_mtime_ns
    prepare_data(sweep, cells, folder=folder, text=[text], echo=lambda _line: None)
    assert (folder.data / "text_train.bin").stat().st_mtime_ns == made
    # Held-out text is a part of the identity: the same name with other bytes is other data.
    (folder.data / "text_valid.json").unlink()
    assert data_digest(cells[0].run) != digest


def test_more_held_out_tokens_than_half_of_the_text_are_refused(text: Path, tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match=r"held-out part of the text has \d+ tokens, fewer than 900"
    ):
        make_shards(
            tmp_path,
            text=[text],
            corpus_bytes=1000,
            vocab_size=400,
            valid_tokens=900_000,
            echo=lambda _line: None,
        )
    for name, amounts in (("vocab_size", (300, 1000)), ("corpus_bytes", (400, 2000))):
        with pytest.raises(DataError, match=f"was made with {name} "):
            make_shards(
                tmp_path,
                text=[text],
                corpus_bytes=amounts[1],
                vocab_size=amounts[0],
                echo=lambda _line: None,
            )
