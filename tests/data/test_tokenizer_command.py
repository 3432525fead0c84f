from __future__ import annotations

import gzip
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from megatron_mup.data.tokenizer import load_tokenizer
from megatron_mup.data.tokenizer_command import tokenizer_command
from megatron_mup.errors import DataError


def invoke(*arguments: object) -> list[str]:
    app = typer.Typer()
    app.command()(tokenizer_command)
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if result.exception is not None:
        raise result.exception
    return result.output.splitlines()


def test_every_option_reaches_the_model(tmp_path: Path, jsonl: Path) -> None:
    packed = tmp_path / "corpus.jsonl.gz"
    packed.write_bytes(gzip.compress(jsonl.read_bytes()))
    lines = invoke(
        *("--input", packed, "--model-prefix", tmp_path / "t", "--vocab-size", 390),
        *("--special-token", "<|im_start|>", "--special-token", "<|im_end|>"),
        *("--pad-vocab-to-multiple", 128, "--sample-bytes", 40_000, "--held-out-fraction", 0.1),
        *("--model-type", "unigram", "--character-coverage", 1),
    )
    tokenizer = load_tokenizer(tmp_path / "t.model")
    assert lines[0] == f"{tmp_path / 't'}.model: 512 ids, sha256 {tokenizer.sha256}"
    assert tokenizer.encode("<|im_end|>\n<|im_start|>") == [5, 3, 4]
    trained, size = lines[1].removeprefix("trained on ").split(" documents, ")
    assert int(trained) > 10
    assert 39_000 < int(size.removesuffix(" bytes")) <= 40_000
    assert lines[2].endswith("held-out documents")
    assert float(lines[2].split()[0]) > 1.5


def test_unused_ids_and_unmeasured_compression_are_said(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("abc abd")
    lines = invoke(
        *("--input", tmp_path / "a.txt", "--model-prefix", tmp_path / "t"),
        *("--vocab-size", 264, "--pad-vocab-to-multiple", 1000, "--held-out-fraction", 0),
    )
    assert ": 1000 ids (7" in lines[0]
    assert " unused), sha256 " in lines[0]
    assert lines[1] == "trained on 1 documents, 7 bytes"
    assert lines[2].startswith("compression not measured")


def test_a_command_without_input_says_so(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="pass --input"):
        invoke("--model-prefix", tmp_path / "t", "--vocab-size", 300)
