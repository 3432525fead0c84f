"""Bad input ends in a clear error before any process group or model exists.

Building either is made to fail here; the cases are in ``tests/bad_input_cases.py``.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_mup import cli
from megatron_mup.errors import (
    MupError,
)
from tests.bad_input_cases import CASES
from tests.bad_input_makers import Case, Inputs, write_shard


@pytest.fixture
def inputs(tmp_path: Path) -> Inputs:
    good = tmp_path / "good"
    write_shard(good, list(range(40)))
    return Inputs(folder=tmp_path, good=good)


@pytest.fixture
def _nothing_may_be_built(monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron_mup.model import gpt
    from megatron_mup.training import loop

    def refuse(*_arguments: object, **_options: object) -> None:
        raise AssertionError("bad input got as far as building something")

    monkeypatch.setattr(loop, "parallel_processes", refuse)
    monkeypatch.setattr(gpt, "GPTModel", refuse)
    # An installed TransformerEngine must not change what is tested.
    monkeypatch.setitem(sys.modules, "transformer_engine", None)


@pytest.mark.usefixtures("_nothing_may_be_built")
@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_bad_input_is_refused_with_its_values_and_the_cure(case: Case, inputs: Inputs) -> None:
    with pytest.raises(MupError) as caught:
        case.make(inputs)

    assert type(caught.value) is case.error
    for words in case.words:
        assert words in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train"], "--config FILE or --preset NAME --width M is missing"),
        (["train", "--config", "absent.yaml"], "cannot read configuration 'absent.yaml'"),
        (["describe", "--config", "bad.yaml"], "found duplicate key num_layers"),
        (["train", "--from-megatron-args", "--lr fast"], "--lr takes a number, not 'fast'"),
    ],
)
def test_command_line_prints_one_line_and_exits_with_2(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "bad.yaml").write_text("model:\n  num_layers: 1\n  num_layers: 2\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["megatron-mup", *arguments])

    with pytest.raises(SystemExit) as stopped:
        cli.main()

    assert stopped.value.code == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert re.fullmatch(r"error: [^\n]*\n", output.err)
    assert message in output.err


def test_process_prints_no_traceback_for_a_misspelt_key(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("optimizer: {adam_beta_2: 0.9}\n")

    process = subprocess.run(
        [sys.executable, "-m", "megatron_mup", "train", "--config", str(path)],
        capture_output=True,
        text=True,
        check=False,
    )

    assert process.returncode == 2
    assert process.stdout == ""
    assert process.stderr == (
        f"error: {path}: unknown key 'optimizer.adam_beta_2'; "
        "did you mean 'optimizer.adam_beta2'?\n"
    )
