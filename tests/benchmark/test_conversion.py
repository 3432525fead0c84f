"""The benchmark of conversions at a tiny size: real conversions, in this process."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from typer.testing import CliRunner

from megatron_mup.benchmark import conversion, conversion_runs
from megatron_mup.benchmark.conversion_report import MARK
from megatron_mup.benchmark.conversion_runs import (
    DrawnWeights,
    Storage,
    fitting_run,
    folder_bytes,
    largest_tensor_bytes,
    make_cold,
    model_run,
    parameters,
    plain_read,
    plain_write,
    write_source,
)
from megatron_mup.benchmark.preprocessing_memory import Footprint
from megatron_mup.cli import app
from megatron_mup.convert.megatron_source import MegatronSource
from megatron_mup.errors import ConfigError

# 32128 rows of embedding and of readout, four matrices of attention, two of the FFN.
LAYER, TABLES = 12 * 8192**2, 2 * 32128 * 8192


def full_width(*, gated: bool = False, gb: float, storage: Storage) -> int:
    """Layers of the model that fits."""
    run = fitting_run(gb * 1e9, width=8192, gated=gated, storage=storage)
    assert parameters(run) == run.model.num_layers * LAYER * (16 if gated else 12) // 12 + TABLES
    return run.model.num_layers


def test_the_full_size_is_that_of_the_10b_model() -> None:
    run = model_run(width=8192, layers=12, gated=False, storage=Storage.BF16)
    assert parameters(run) == 10_190_061_568
    assert largest_tensor_bytes(run) == 4 * 8192 * 32768


def test_as_many_layers_are_made_as_fit() -> None:
    # 10.19 B parameters of 2 bytes are 20.38 GB; a layer has 1.61 GB of them.
    assert full_width(gb=20.4, storage=Storage.BF16) == 12
    assert full_width(gb=20.3, storage=Storage.BF16) == 11
    assert full_width(gb=20.4, storage=Storage.FP32) == 5
    assert full_width(gb=20.4, storage=Storage.MAIN_WEIGHTS) == 3
    assert full_width(gb=20.4, storage=Storage.BF16, gated=True) == 9
    # Never none, and never more than the model has.
    assert full_width(gb=0.1, storage=Storage.BF16) == 1
    assert full_width(gb=900, storage=Storage.BF16) == 12


@pytest.mark.parametrize("storage", list(Storage))
def test_a_source_stores_what_its_name_says(tmp_path: Path, storage: Storage) -> None:
    run = model_run(width=64, layers=1, gated=True, storage=storage)
    write_source(run, tmp_path / "source", storage)
    weights = storage.bytes_each * parameters(run)
    assert weights < folder_bytes(tmp_path / "source") < 1.02 * weights
    written, drawn = MegatronSource(tmp_path / "source"), DrawnWeights(run, storage)
    name = "decoder.layers.0.mlp.linear_fc2.weight"
    assert torch.equal(written.read(name), drawn.read(name))
    # uniform in +-sqrt(3 / fan-in), so its standard deviation is 1 / sqrt(256)
    assert drawn.read(name).std().item() == pytest.approx(1 / 16, rel=0.05)
    # No multiplier is 1, or folding would have nothing to do.
    assert 1.0 not in vars(written.multipliers).values()


def test_plain_runs_read_and_write_everything_and_leave_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(conversion_runs, "_BLOCK", 1000)
    written = tmp_path / "plain"
    removed: list[int] = []
    unlink = Path.unlink

    def noted(path: Path) -> None:
        removed.append(path.stat().st_size)
        unlink(path)

    monkeypatch.setattr(Path, "unlink", noted)
    assert plain_write(written, 2500) > 0
    assert removed == [2500]
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "a").write_bytes(b"x" * 1500)
    (tmp_path / "b").write_bytes(b"y" * 7)
    assert folder_bytes(tmp_path) == 1507
    make_cold(tmp_path)
    assert plain_read(tmp_path) > 0
    assert (tmp_path / "deep" / "a").read_bytes() == b"x" * 1500


class Ran(NamedTuple):
    """A command that the benchmark ran, and what lay in its folder by then."""

    arguments: list[str]
    beside: set[str]


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[Ran]:
    """Conversions run in this process; their memory is 100 MB, but for 3 GB if they verify."""
    found: list[Ran] = []

    def run(command: Sequence[str]) -> Footprint:
        arguments = [str(word) for word in command[3:]]
        assert command[1:3] == ["-m", "megatron_mup"]
        folder = next(Path(word) for word in arguments if word.startswith("/")).parent
        found.append(Ran(arguments, {path.name for path in folder.iterdir()}))
        # What a verification finds is the conversions' own matter, and takes seconds.
        quick = ["--no-verify" if word == "--verify" else word for word in arguments]
        result = CliRunner().invoke(app, quick)
        assert result.exit_code == 0, (arguments, result.output, result.exception)
        large = "--verify" in arguments and folder.name != "tiny"
        return Footprint(peak_bytes=3 * 10**9 if large else 10**8, wall_seconds=1.0)

    monkeypatch.setattr(conversion_runs, "footprint", run)
    return found


def run_command(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr("sys.argv", ["conversion", *arguments])
    with pytest.raises(SystemExit) as ended:
        conversion.main()
    assert isinstance(ended.value.code, int)
    return ended.value.code


def test_the_command_converts_everything_and_keeps_its_section(
    ran: list[Ran],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    # A plain write as fast as two thirds of a conversion, which takes a second.
    monkeypatch.setattr(conversion, "plain_write", lambda path, count: count / 9e6)
    page, work = tmp_path / "page.md", tmp_path / "work"
    page.write_text("# Speed of a training step\n")
    work.mkdir()
    options = ["--gb", "0.0083", "--rounds", "3", "--width", "64", "--max-shard-size", "3MB"]
    code = run_command(monkeypatch, *options, "--folder", str(work), "--output", str(page))
    text, printed = page.read_text(), capsys.readouterr()

    verbs = [(one.arguments[1], one.arguments[-1]) for one in ran]
    # The tiny model once, then the rounds; the verification has one round.
    reshard = ("reshard", "tensor_model_parallel_size=2")
    export, verified = ("to-hf", "--no-verify"), ("to-hf", "--verify")
    imported = ("from-hf", "precision.bf16=true")
    assert verbs == [reshard] * 4 + [export] * 4 + [imported] * 4 + [export] * 4 + [verified] * 2
    # No more than a source and what is made of it is on the disk when a conversion begins.
    assert [one.beside - {"tiny"} for one in ran if one.arguments[1] == "from-hf"][1:] == [
        {"exported"},
        {"exported"},
        {"exported"},
    ]
    assert all(one.beside <= {"source", "tiny", "exported"} for one in ran)
    assert not list(work.iterdir())

    assert text.startswith(f"# Speed of a training step\n\n{MARK}\n\n# Speed and memory")
    assert "0.0% of the 10.19 B of the 10B model; the source stores bf16" in text
    assert "| to-hf llama, multipliers folded | 1 x 64, gated SiLU, 0.00 B |" in text
    assert str(tmp_path) not in text
    assert "`python -m megatron_mup.benchmark.conversion --gb 0.0083 --rounds 3 --storage" in text
    assert code == 1
    # Verified: 3 GB less 0.1 GB at the start, against 2 x 8.2 MB and a shard of 3 MB.
    assert "with verification: 2900 MB of memory, at most 19 MB is asked for" in printed.err


def test_a_disk_without_room_is_refused_before_anything_is_written(
    ran: list[Ran],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=41 * 10**9)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage)
    output = ["--folder", str(tmp_path), "--output", str(tmp_path / "page.md")]
    assert run_command(monkeypatch, "--gb", "20.4", *output) == 2
    # 12 layers of 10.19 B parameters: 2.05 x 20.38 GB.
    message = "error: --gb 20.4 with --width 8192 needs 41.8 GB, but"
    assert message in capsys.readouterr().err
    assert (ran, list(tmp_path.iterdir())) == ([], [])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--gb", "0"], "--gb is 0; pass more than 0"),
        (["--rounds", "0"], "--rounds is 0; pass at least 1"),
        (["--width", "100"], "--width is 100; pass a multiple of 64"),
        (["--verified-layers", "13"], "--verified-layers is 13; pass 0 to 12"),
        (["--max-shard-size", "big"], "--max-shard-size is 'big'; write a size such as"),
        (["--output", "/missing/page.md"], "the folder /missing does not exist; make it"),
        (["--folder", "/missing"], "--folder /missing does not exist; make it"),
    ],
)
def test_wrong_options_are_refused(
    ran: list[Ran],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    arguments: list[str],
    message: str,
) -> None:
    given: Any = ["--output", str(tmp_path / "page.md"), *arguments]
    assert run_command(monkeypatch, *given) == 2
    assert message in capsys.readouterr().err
    assert ran == []


def test_the_size_of_a_shard_is_read_from_the_option() -> None:
    options: dict[str, Any] = {"gb": 1.0, "rounds": 1, "storage": Storage.BF16, "width": 64}
    settings = conversion.Settings(**options, max_shard_size="2GB", verified_layers=1)
    assert settings.shard_bytes == 2_000_000_000
    with pytest.raises(ConfigError, match="--max-shard-size"):
        conversion.Settings(**options, max_shard_size="2 bytes", verified_layers=1)
