from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from megatron_mup.data.commands import app
from megatron_mup.errors import DataError

ROOT = Path(__file__).parents[2]


def invoke(*arguments: object) -> str:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if result.exception is not None:
        raise result.exception
    return result.output


def test_the_verbs_lead_from_text_to_a_verified_shard(
    tmp_path: Path, sources: list[Path], jsonl: Path
) -> None:
    prefix = tmp_path / "tok"
    size = ("--vocab-size", 400, "--model-prefix", prefix)
    output = invoke("tokenizer", "--input", jsonl, *size, "--held-out-fraction", 0.1)
    assert "tok.model: 400 ids" in output
    assert "bytes/token on" in output
    model = ("--tokenizer-model", f"{prefix}.model")
    shard = ("--output-prefix", tmp_path / "s", "--valid-fraction", 0)
    # Megatron's form: several files after one --input.
    output = invoke("preprocess", "--input", *sources[:3], *model, *shard)
    assert f"{tmp_path / 's'}: 3 documents" in output
    assert f"{tmp_path / 's'}: 3 documents" in invoke("inspect", tmp_path / "s", *model)
    assert "OK" in invoke("verify", tmp_path / "s", *model)


def test_repeated_inputs_come_before_the_further_files(
    tmp_path: Path, sources: list[Path], model_path: Path
) -> None:
    a, b, c = sources[:3]
    shard = ("--output-prefix", tmp_path / "s", "--valid-fraction", "0", "--input-format", "text")
    invoke("preprocess", "--input", a, b, "--input", c, "--tokenizer-model", model_path, *shard)
    manifest = json.loads((tmp_path / "s.manifest.json").read_text())
    assert manifest["inputs"] == [str(a), str(c), str(b)]


@pytest.mark.parametrize("verb", ["tokenizer", "preprocess", "inspect", "verify", "blend"])
def test_help_spells_every_option_out_on_a_narrow_screen(verb: str) -> None:
    shown = CliRunner().invoke(app, [verb, "--help"], env={"COLUMNS": "80"}, terminal_width=80)
    command = typer.main.get_group(app).commands[verb]
    names = [
        name
        for option in command.params
        if not getattr(option, "hidden", False)
        for name in [*option.opts, *option.secondary_opts]
        if name.startswith("--")
    ]
    assert len(names) >= 2
    assert [name for name in names if name not in shown.output.split("Options:")[1]] == []
    assert max(map(len, shown.output.splitlines())) <= 80


def test_a_verb_without_input_says_so(tmp_path: Path, model_path: Path) -> None:
    with pytest.raises(DataError, match="no input file; pass --input"):
        invoke("preprocess", "--tokenizer-model", model_path, "--output-prefix", tmp_path / "s")


def test_an_unmeasured_compression_is_said_to_be_so(tmp_path: Path, sources: list[Path]) -> None:
    size = ("--vocab-size", 400, "--model-prefix", tmp_path / "t")
    output = invoke("tokenizer", "--input", *sources, *size, "--held-out-fraction", 0)
    assert "compression not measured" in output


def test_the_verbs_start_without_torch_and_megatron() -> None:
    code = (
        "import sys, megatron_mup.data.commands; "
        "print([name for name in ('torch', 'megatron') if name in sys.modules])"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert result.stdout == "[]\n"


def test_the_script_is_the_preprocess_verb(
    tmp_path: Path, sources: list[Path], model_path: Path
) -> None:
    script = [sys.executable, str(ROOT / "tools/preprocess_data.py")]
    shown = subprocess.run([*script, "--help"], capture_output=True, text=True, check=True)
    assert "Tokenize documents into Megatron token shards" in shown.stdout
    options = ["--tokenizer-model", str(model_path), "--output-prefix", str(tmp_path / "s")]
    more = ["--valid-fraction", "0", "--workers", "2", "--input", str(sources[0])]
    subprocess.run([*script, *options, *more], check=True, capture_output=True)
    assert (tmp_path / "s.idx").exists()
    failed = subprocess.run([*script, *options], capture_output=True, text=True, check=False)
    assert (failed.returncode, failed.stderr.count("\n")) == (2, 1)
    assert failed.stderr.startswith("error: no input file")
