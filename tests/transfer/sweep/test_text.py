"""Tokenizer and shards that a sweep makes for itself."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from megatron_mup.data.shards import open_shard
from megatron_mup.errors import DataError
from megatron_mup.transfer.sweep.cells import make_cells
from megatron_mup.transfer.sweep.data_checks import prepare_data
from megatron_mup.transfer.sweep.folder import SweepFolder
from megatron_mup.transfer.sweep.pool import Share
from megatron_mup.transfer.sweep.results import data_digest
from megatron_mup.transfer.sweep.session import RunRequest, prepare_sweep, run_sweep
from megatron_mup.transfer.sweep.shards import make_shards
from megatron_mup.transfer.sweep.tasks import Task
from megatron_mup.transfer.sweep.text_source import has_shards
from tests.transfer.sweep import fake_worker
from tests.transfer.sweep.sweeps import SWEEP, sweep_data, sweep_of


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


def test_a_sweep_made_with_a_text_goes_on_without_it(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("megatron_mup.transfer.sweep.pool._WORKER", fake_worker.__name__)
    monkeypatch.setenv("FAKE_WORKER_CALM", "1")
    out, mine = tmp_path / "out", tmp_path / "mine.txt"
    base = {**SWEEP["base"], "model": SWEEP["base"]["model"] | {"vocab_size": 400}}
    base["data"] = {}
    (tmp_path / "sweep.yaml").write_text(
        yaml.safe_dump(sweep_data(base=base, text={"vocab_size": 400}, seeds=[1]))
    )

    def run(config: Path, *given: Path, task: Task | None = None) -> list[str]:
        lines: list[str] = []
        share = Share(workers=1, threads=1)
        request = RunRequest(config=config, out=out, text=given, share=share, task=task)
        assert run_sweep(request, lines.append) == 0
        return lines

    mine.write_bytes(text.read_bytes())
    assert "4 finished" in run(tmp_path / "sweep.yaml", mine)[-1]
    mine.unlink()
    told = f"text: {mine}, which the shards in {out}/data are made of"
    for task in (None, Task(number=1, count=2)):
        lines = run(out / "sweep.yaml", task=task)
        assert lines[0] == told
        assert lines[-1].startswith("0 runs ended (nothing was missing)")
    assert told not in run(out / "sweep.yaml", text)


def test_a_refused_text_leaves_no_folder(tmp_path: Path) -> None:
    base = {**SWEEP["base"], "model": SWEEP["base"]["model"] | {"vocab_size": 400}}
    base["data"] = {}
    config = tmp_path / "sweep.yaml"
    config.write_text(yaml.safe_dump(sweep_data(base=base, text={"vocab_size": 400})))
    gone, share = tmp_path / "gone.txt", Share(workers=1, threads=1)
    request = RunRequest(config=config, out=tmp_path / "out", text=(gone,), share=share)
    with pytest.raises(DataError, match=r"there is no file '.*gone.txt'"):
        run_sweep(request, print)
    with pytest.raises(DataError, match=r"there is no file '.*gone.txt'"):
        prepare_sweep(config, tmp_path / "out", text=[gone], echo=print)
    with pytest.raises(
        DataError, match=r"no shards in .*/out/data; make them with 'megatron-mup s"
    ):
        run_sweep(replace(request, text=(), task=Task(number=1, count=2)), print)
    assert not (tmp_path / "out").exists()


def test_more_held_out_tokens_than_half_of_the_text_are_refused_and_fewer_are_made_there(
    text: Path, tmp_path: Path
) -> None:
    lines: list[str] = []

    def make(valid_tokens: int) -> None:
        make_shards(
            tmp_path,
            text=[text],
            corpus_bytes=1000,
            vocab_size=400,
            valid_tokens=valid_tokens,
            echo=lines.append,
        )

    with pytest.raises(DataError, match=r"900,000 tokens are to be held out .* at most half are"):
        make(900_000)
    assert not has_shards(tmp_path)
    make(3_000)
    train, valid = (
        int(number.replace(",", "")) for number in re.findall(r"[\d,]{4,}", lines[-1])[:2]
    )
    assert 3_000 <= valid < train


def test_another_amount_of_installed_text_is_refused(tmp_path: Path) -> None:
    def make(corpus_bytes: int) -> None:
        make_shards(tmp_path, text=[], corpus_bytes=corpus_bytes, vocab_size=400, echo=print)

    make(300_000)
    with pytest.raises(DataError, match=r"with text.corpus_bytes 300000, not 200000; choose ano"):
        make(200_000)
