"""examples/alignment: its table, picture and exponents, from dynamics that are made up here."""

from __future__ import annotations

import csv
import json
import math
import subprocess
from pathlib import Path
from types import ModuleType

import pytest

from tests.loaded_script import load_script

_SCRIPT = Path(__file__).parents[1] / "examples" / "alignment" / "measure.py"


@pytest.fixture
def script() -> ModuleType:
    return load_script(_SCRIPT)


def dynamics(width: int) -> str:
    """Ratio width^0.5 at step 10 and 1 at step 20, as the mean of two matrices."""
    rows = []
    for iteration, ratio in ((10, math.sqrt(width)), (20, 1.0)):
        rows.append(
            {
                "iteration": iteration,
                "alignment-ratio/query/a": 0.5 * ratio,
                "alignment-ratio/ffn_in/b": 1.5 * ratio,
                # No hidden matrix, and one that has nothing to be divided by.
                "alignment-ratio/unembedding/c": 1000.0,
                "alignment-ratio/key/d": None,
                "relative-representation-change/query/a": 0.25 / width,
            }
        )
    return "".join(json.dumps(row) + "\n" for row in rows)


def test_runs_become_a_table_a_picture_and_exponents(
    script: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    commands: list[list[str]] = []

    def trained(command: list[str], *, check: bool) -> subprocess.CompletedProcess[str]:
        commands.append(command)
        (width,) = (int(word.split("=")[1]) for word in command if word.startswith("hidden_size="))
        (path,) = (word.split("=")[1] for word in command if "diagnostics_path=" in word)
        Path(path).write_text(dynamics(width), encoding="utf-8")
        return subprocess.CompletedProcess(command, 3 if width == 48 else 0)

    monkeypatch.setattr(subprocess, "run", trained)
    words = [
        "measure.py",
        "lr=0.01",
        "--out",
        str(tmp_path),
        "--widths",
        "32",
        "128",
        "--seeds",
        "1",
        "2",
    ]
    monkeypatch.setattr("sys.argv", [*words, "--modes", "coupled", "independent"])
    script.main()
    assert len(commands) == 8
    assert all("lr=0.01" in command for command in commands)
    heads = {word for command in commands for word in command if "heads" in word}
    assert heads == {"num_attention_heads=2", "num_attention_heads=8"}
    assert sum("weight_decay_mode=independent" in command for command in commands) == 4
    lines = (tmp_path / "dynamics.csv").read_text("utf-8").splitlines()
    assert lines[0] == "mode,width,seed,iteration,alignment-ratio,relative-representation-change"
    assert lines[2] == "coupled,32,1,20,1.0,0.0078125"
    assert len(lines) == 17
    assert (tmp_path / "dynamics.png").read_bytes()[:4] == b"\x89PNG"
    printed = capsys.readouterr().out
    assert "coupled           alignment-ratio                 10: +0.50, 20: +0.00" in printed
    assert "independent       relative-representation-change  10: -1.00, 20: -1.00" in printed
    # What is there is not run again.
    script.main()
    assert len(commands) == 8
    # Of other options it would be a mixture, and a failed run has no rows.
    monkeypatch.setattr("sys.argv", ["measure.py", "lr=0.02", *words[2:]])
    with pytest.raises(SystemExit, match="holds runs of another configuration"):
        script.main()
    other = str(tmp_path / "b")
    monkeypatch.setattr("sys.argv", ["measure.py", "--out", other, "--widths", "48", "64"])
    with pytest.raises(SystemExit, match=r"coupled_48_1 ended with exit code 3"):
        script.main()
    assert not (tmp_path / "b" / "dynamics.csv").exists()


@pytest.mark.parametrize("widths", [["64"], ["64", "72"]])
def test_widths_without_an_exponent_are_refused(
    script: ModuleType, widths: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.argv", ["measure.py", "--widths", *widths])
    with pytest.raises(SystemExit):
        script.main()


def test_the_readme_quotes_the_kept_table(script: ModuleType) -> None:
    folder = _SCRIPT.parent
    with (folder / "dynamics.csv").open(encoding="utf-8") as file:
        table = [
            {key: text if key == "mode" else float(text) for key, text in row.items()}
            for row in csv.DictReader(file)
        ]
    readme = (folder / "README.md").read_text("utf-8")
    for mode in script.MODES:
        for quantity, words in zip(
            script.QUANTITIES, ("alignment ratio", "relative change"), strict=True
        ):
            slopes = (
                f"{script.slope(table, mode, quantity.value, step):+.2f}"
                for step in (10, 50, 250, 500)
            )
            assert f"| {mode} | {words} | {' | '.join(slopes)} |" in readme
