"""The command line's own checks; what the verbs do is tested where they live."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from megatron_mup import cli
from megatron_mup.transfer import quickstart


def refusal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: str
) -> str:
    """The message of a command that must end with 2 and print nothing else."""
    monkeypatch.setattr(sys, "argv", ["megatron-mup", *arguments])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert stopped.value.code == 2
    output = capsys.readouterr()
    assert output.out == ""
    return output.err


@pytest.mark.parametrize(
    ("others", "named"),
    [
        (["--config", "run.yaml"], "but --config run.yaml is given as well"),
        (["lr=0.1"], "but lr=0.1 is given as well"),
        (["--config", "run.yaml", "lr=0.1", "seed=2"], "but --config run.yaml, lr=0.1, seed=2 is"),
    ],
)
def test_a_translation_refuses_what_it_would_ignore(
    others: list[str],
    named: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    arguments = ["train", "--from-megatron-args", "--num-layers 2", *others]
    message = refusal(monkeypatch, capsys, *arguments)
    assert named in message
    assert "pass it with --config FILE" in message


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--widths", "32.5"], "--widths is '32.5'; give whole numbers separated by commas"),
        (["--widths", "32,nan"], "--widths is '32,nan'; give whole numbers"),
        (["--widths", "32,,64"], "--widths is '32,,64'; give whole numbers"),
        (["--widths", "0,32"], "--widths is 0,32; give positive multiples of 16"),
        (["--widths=-32,32"], "--widths is -32,32; give positive multiples of 16"),
        (["--widths", "32,40"], "--widths is 32,40; give positive multiples of 16"),
        (["--log2-lrs=-8,x"], "--log2-lrs is '-8,x'; give numbers separated by commas"),
        (["--log2-lrs=-8,nan,-6"], "--log2-lrs is -8,nan,-6; give at least 3 finite numbers"),
        (["--log2-lrs=-8,-7"], "--log2-lrs is -8,-7; give at least 3 finite numbers"),
        (["--steps", "0"], "--steps is 0"),
        (["--seeds", "1,x"], "--seeds is '1,x'; give whole numbers separated by commas"),
        (["--seeds", "1,1"], "--seeds is 1,1; give whole numbers from 0, each once"),
        (["--workers", "0"], "--workers is 0; give at least 1"),
    ],
)
def test_quickstart_refuses_lists_that_show_nothing(
    arguments: list[str],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    monkeypatch.setattr(quickstart, "run_sweep", None)
    out = tmp_path / "out"
    assert message in refusal(monkeypatch, capsys, "quickstart", "--out", str(out), *arguments)
    assert not out.exists()
