from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from megatron_mup.data.shard_commands import blend, inspect, verify
from megatron_mup.data.tokenizer import Tokenizer
from megatron_mup.errors import DataError
from tests.data.written_shards import patch, write_job, write_own_shard, write_set, write_shard

ROOT = Path(__file__).parents[2]
DOCUMENTS = [[5, 6, 7, 2], [8, 2], [9, 9, 9, 2]]


def invoke(*arguments: object, error: str | None = None, exit_code: int = 2) -> str:
    """Output of a verb, which ends in a DataError with these words if any are given."""
    app = typer.Typer()
    for command in (inspect, verify, blend):
        app.command()(command)
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if error is None:
        assert result.exception is None, result.output
    else:
        assert isinstance(result.exception, DataError)
        assert error in str(result.exception)
        assert result.exception.exit_code == exit_code
    return result.output


def test_inspect_prints_counts_histogram_and_state(tmp_path: Path) -> None:
    output = invoke("inspect", write_set(tmp_path / "s", [DOCUMENTS, DOCUMENTS[:1]]))
    assert "4 documents, 14 tokens in 2 shards (uint16, 3.000 bytes/token)" in output
    assert "tokens a document: mean 3.5, shortest 2, longest 4" in output
    assert "manifest: matches" in output
    rows = [line.split() for line in output.splitlines()[-2:]]
    assert rows == [["2", "-", "3", "1", "2", "#" * 13], ["4", "-", "7", "3", "12", "#" * 40]]


def test_inspect_shows_what_a_job_left_out_and_where(tmp_path: Path) -> None:
    output = invoke("inspect", write_job(tmp_path / "o", {"train": [DOCUMENTS], "valid": [[[2]]]}))
    assert "split train: 3 documents, 10 tokens, 1 shard\n" in output
    assert "split valid: 1 documents, 1 tokens, 1 shard\n" in output
    assert "left out: 4 empty, 5 duplicates, 6 broken JSON" in output
    assert "  a.jsonl:5: broken JSON" in output
    assert "a.jsonl:6" not in output
    assert "o.manifest.json" in output


def test_inspect_decodes_as_many_samples_as_asked(
    tmp_path: Path, model_path: Path, tokenizer: Tokenizer
) -> None:
    documents = [[*tokenizer.encode(f"line\n{number}"), 2] for number in range(5)]
    prefix = write_own_shard(tmp_path / "s", documents, tokenizer_sha256=tokenizer.sha256)
    model = ("--tokenizer-model", model_path)
    assert r"'line\n3'" in invoke("inspect", prefix, *model, "--samples", 5)
    assert invoke("inspect", prefix, *model).count("\ndocument ") == 3
    first, second = (invoke("inspect", prefix, *model, "--seed", seed) for seed in (1, 2))
    assert first != second
    record = json.loads(invoke("inspect", prefix, *model, "--json", "--samples", 1))
    assert (record["documents"], record["manifest_matches"]) == (5, True)
    assert record["samples"][0]["text"].startswith("line\n")


def test_inspecting_an_altered_shard_fails_after_the_report(tmp_path: Path) -> None:
    prefix = write_own_shard(tmp_path / "s", DOCUMENTS)
    patch(f"{prefix}.bin", 0, b"\x06")
    error = "s.bin is not the file that its manifest describes"
    output = invoke("inspect", prefix, error=error, exit_code=1)
    assert "manifest: DOES NOT MATCH" in output


def test_verify_prints_a_line_for_each_shard(tmp_path: Path) -> None:
    job = write_job(tmp_path / "o", {"train": [DOCUMENTS, DOCUMENTS[:1]]})
    foreign = write_shard(tmp_path / "f", [[1]])
    lines = invoke("verify", job, foreign).splitlines()
    assert [line.split(":")[0].rsplit("/")[-1] for line in lines] == [
        "o_train-00000-of-00002",
        "o_train-00001-of-00002",
        "o.manifest.json",
        "f",
    ]
    assert all(line.startswith("OK ") for line in lines)
    assert "no manifest" in lines[-1]


def test_verify_names_damage_and_fails(tmp_path: Path) -> None:
    good = write_own_shard(tmp_path / "good", DOCUMENTS)
    bad = write_own_shard(tmp_path / "bad", DOCUMENTS)
    patch(f"{bad}.bin", 0, b"\x06")
    output = invoke("verify", bad, good, error="1 of 2 are damaged, first ", exit_code=1)
    first, second = output.splitlines()
    assert first.startswith(f"DAMAGED {bad}.bin: is not the file")
    assert second.startswith(f"OK      {good}: 3 documents, 10 tokens")


def test_verify_prints_the_first_problems_of_many(tmp_path: Path) -> None:
    job = write_job(tmp_path / "o", {"train": [DOCUMENTS]})
    for number in range(9):
        write_shard(tmp_path / f"o_train-0000{number}-of-00009", [[1]])
    output = invoke("verify", job, error="is left from another run", exit_code=1)
    assert output.count("left from another run") == 5
    assert "o.manifest.json: 4 more problems" in output


def test_verify_compares_the_tokenizers_digest(tmp_path: Path) -> None:
    model = tmp_path / "tokenizer.json"
    model.write_text("any file")
    digest = hashlib.sha256(b"any file").hexdigest()
    right = write_own_shard(tmp_path / "right", DOCUMENTS, tokenizer_sha256=digest)
    wrong = write_own_shard(tmp_path / "wrong", DOCUMENTS)
    assert "OK" in invoke("verify", right, "--tokenizer-model", model)
    output = invoke(
        *("verify", right, wrong, "--tokenizer-model", model),
        error="1 of 2 shards were made with another tokenizer than --tokenizer-model",
    )
    # A mistake of the command, said before anything is read.
    assert output == ""
    invoke("verify", right, "--tokenizer-model", tmp_path / "gone", error="--tokenizer-model")


def test_verify_does_not_call_damaged_what_is_not_there(tmp_path: Path) -> None:
    good = write_own_shard(tmp_path / "good", DOCUMENTS)
    (tmp_path / "job.work").mkdir()
    for named, error in (
        (tmp_path / "goood", f"there are {tmp_path / 'good'}"),
        (tmp_path, "is a folder"),
        (tmp_path / "gone" / "s", "does not exist"),
        (tmp_path / "job", "is not finished"),
    ):
        assert invoke("verify", good, named, error=error) == ""


def test_files_of_shards_stand_for_their_prefix(tmp_path: Path) -> None:
    shard = write_own_shard(tmp_path / "s", DOCUMENTS)
    job = write_job(tmp_path / "o", {"train": [DOCUMENTS]})
    for suffix in (".bin", ".idx", ".json"):
        assert invoke("verify", f"{shard}{suffix}") == invoke("verify", shard)
        assert invoke("inspect", f"{shard}{suffix}") == invoke("inspect", shard)
    assert invoke("verify", f"{job}.manifest.json") == invoke("verify", job)
    assert invoke("inspect", f"{job}.manifest.json") == invoke("inspect", job)


def test_blend_prints_a_table_and_writes_the_file(tmp_path: Path) -> None:
    large = write_set(tmp_path / "large", [[[7, 2]] * 30, [[7, 2]] * 10])
    small = write_own_shard(tmp_path / "small", [[7, 2]] * 10)
    held_out = write_own_shard(tmp_path / "held_out", [[7, 2]])
    output = tmp_path / "blend.json"
    options = ("--train-tokens", "2e2", "--output", output)
    text = invoke("blend", 0.5, large, 0.5, small, *options, "--valid", held_out)
    header, first, second = text.splitlines()[:3]
    assert header.split() == ["set", "shards", "tokens", "weight", "will", "be", "read", "epochs"]
    assert first.split() == [str(large), "2", "80", "0.5000", "100", "1.25", "repeated"]
    assert second.split()[:6] == [str(small), "1", "20", "0.5000", "100", "5.00"]
    assert second.endswith("repeated, beyond 4 epochs")
    assert f"warning: the run will repeat data: {large} 1.25 times, {small} 5 times" in text
    assert "arXiv:2305.16264" in text
    assert json.loads(output.read_text()) == {
        "train": ["0.5", str(large), "0.5", str(small)],
        "valid": [str(held_out)],
        "test": None,
    }
    invoke("blend", large, *options, error="output exists")
    once = invoke("blend", large, "--train-tokens", 80, "--output", output, "--overwrite")
    assert "warning" not in once
    assert f"data.per_split_data_args_path={output}" in once


def test_blend_says_where_relative_prefixes_lead_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_shard(tmp_path / "s", [[7, 2]])
    monkeypatch.chdir(tmp_path)
    options = ("--train-tokens", 1, "--output", "b.json")
    assert "relative: train from this folder" in invoke("blend", "s", *options)
    assert json.loads(Path("b.json").read_text())["train"] == ["1", "s"]


def test_blend_refuses_a_part_of_a_token(tmp_path: Path) -> None:
    options = ("--train-tokens", 1.5, "--output", tmp_path / "b.json")
    invoke("blend", "s", *options, error="--train-tokens is 1.5; pass a whole number")


def test_the_verbs_start_without_torch_megatron_and_pyarrow() -> None:
    code = (
        "import sys, megatron_mup.data.shard_commands; "
        "print([name for name in ('torch', 'megatron', 'pyarrow') if name in sys.modules])"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert result.stdout == "[]\n"
