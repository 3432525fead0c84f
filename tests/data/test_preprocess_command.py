from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from megatron_mup.data.commands import app
from megatron_mup.data.preprocess_command import (
    parse_count,
    parse_part,
    progress_line,
    tokenized_line,
)
from megatron_mup.data.schedule import Part, Progress
from megatron_mup.errors import DataError


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["preprocess", *map(str, arguments)])


def invoke(*arguments: object) -> str:
    result = run(*arguments)
    if result.exception is not None:
        raise result.exception
    return result.output


def made_progress(*, text_bytes: int, total_units: int | None = 30) -> Progress:
    return Progress(
        units=10,
        total_units=total_units,
        documents=5,
        tokens=7,
        text_bytes=text_bytes,
        seconds=4.0,
        engine="gigatoken",
    )


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    path = tmp_path / "a.jsonl"
    texts = ["one", "two", "one", "", "three", "four"]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts) + "broken\n")
    return path


def test_a_job_says_what_it_made_and_what_it_left_out(
    tmp_path: Path, corpus: Path, model_path: Path
) -> None:
    options = ("--valid-fraction", 0, "--deduplicate", "--on-error", "skip")
    output = invoke(
        "--input",
        corpus,
        "--tokenizer-model",
        model_path,
        "--output-prefix",
        tmp_path / "s",
        *options,
    )
    assert f"train: {tmp_path / 's'}: 4 documents" in output
    assert "left out: 1 empty, 1 duplicate, 1 broken_json" in output
    assert "a.jsonl:7" in output
    assert f"manifest: {tmp_path / 's.manifest.json'}" in output


def test_megatrons_own_command_line_is_understood(
    tmp_path: Path, jsonl: Path, model_path: Path
) -> None:
    output = invoke(
        *("--input", jsonl, "--json-keys", "text", "--tokenizer-type", "SentencePieceTokenizer"),
        *("--tokenizer-model", model_path, "--append-eod", "--output-prefix", tmp_path / "s"),
        *("--workers", 2, "--partitions", 2, "--log-interval", 1000, "--keep-sequential-samples"),
        *("--dataset-impl", "mmap", "--make-vocab-size-divisible-by", 128, "--lang", "english"),
    )
    assert "train:" in output
    assert (tmp_path / "s_valid.idx").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--split-sentences",), "--split-sentences is for BERT"),
        (("--json-keys", "text", "title"), "names 2 keys"),
        (("--tokenizer-type", "HuggingFaceTokenizer"), "holds a sentencepiece tokenizer"),
        (("--tokenizer-type", "GPT2BPETokenizer"), "holds a sentencepiece tokenizer"),
        (("--part", "3"), r"--part is '3'; pass i/N"),
        (("--part", "0/3"), "--part is 0/3; pass i/N"),
        (("--part", "4/3"), "--part is 4/3; pass i/N"),
        (("--shard-tokens", "many"), "--shard-tokens is many; pass a whole number"),
        (("--shard-tokens", "0"), "--shard-tokens is 0"),
        (("--eod-token", "<nothing>"), "--eod-token '<nothing>' is not a piece"),
    ],
)
def test_flags_that_cannot_be_met_are_refused_before_any_work(
    tmp_path: Path, jsonl: Path, model_path: Path, flags: tuple[str, ...], message: str
) -> None:
    with pytest.raises(DataError, match=message):
        invoke(
            "--input",
            jsonl,
            "--tokenizer-model",
            model_path,
            "--output-prefix",
            tmp_path / "s",
            *flags,
        )
    assert list(tmp_path.iterdir()) == []


def test_flags_of_another_tokenizer_are_refused_before_its_lack_is(jsonl: Path) -> None:
    with pytest.raises(DataError, match=r"--vocab-file is not read; pass a tokenizer\.json"):
        invoke("--input", jsonl, "--vocab-file", "v.json", "--merge-file", "m.txt")


def test_a_split_without_documents_is_left_out_loudly(
    tmp_path: Path, model_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "a.txt").write_text("one")
    output = invoke(
        *("--input", tmp_path / "a.txt", "--tokenizer-model", model_path),
        *("--output-prefix", tmp_path / "s"),
    )
    assert "train: " in output
    assert "valid: no document, no shard" in output
    assert "no document fell into the split valid (0 were empty" in caplog.text
    record = json.loads((tmp_path / "s.manifest.json").read_text())
    assert record["splits"]["valid"] == []
    assert not (tmp_path / "s.work").exists()
    assert "OK      " in CliRunner().invoke(app, ["verify", str(tmp_path / "s")]).output
    shown = CliRunner().invoke(app, ["inspect", str(tmp_path / "s")]).output
    assert "split valid: 0 documents, 0 tokens, 0 shards" in shown


def test_parts_and_the_last_call_make_the_shards(
    tmp_path: Path, jsonl: Path, model_path: Path
) -> None:
    arguments = (
        "--input",
        jsonl,
        "--tokenizer-model",
        model_path,
        "--output-prefix",
        tmp_path / "s",
    )
    assert "part 1/2: 1 units" in invoke(*arguments, "--part", "1/2")
    assert "part 2/2: 0 units" in invoke(*arguments, "--part", "2/2")
    assert "train:" in invoke(*arguments)


def test_counts_are_read_with_their_units() -> None:
    found = [parse_count(text, "--n") for text in ("7", "250K", "1.5M", "2g", "190e9")]
    assert found == [7, 250_000, 1_500_000, 2_000_000_000, 190_000_000_000]


def test_a_part_is_read_from_its_two_numbers() -> None:
    assert parse_part("3/8") == Part(3, 8)


def test_progress_tells_speed_and_the_time_left() -> None:
    progress = made_progress(text_bytes=20_000_000)
    assert progress_line(progress) == (
        "10 of 30 units: 5 documents, 20 MB of text, 7 tokens, 5.0 MB/s, 8 s left"
    )


def test_the_tokenization_is_summed_up_with_its_speed() -> None:
    progress = made_progress(text_bytes=20_500_000)
    assert tokenized_line(progress) == (
        "tokenized 20.5 MB of text in 4.0 s: engine gigatoken, 5.1 MB/s"
    )


def test_a_run_that_has_nothing_left_to_tokenize_tells_no_speed(
    tmp_path: Path, jsonl: Path, model_path: Path
) -> None:
    arguments = ("--input", jsonl, "--tokenizer-model", model_path)
    prefix = ("--output-prefix", tmp_path / "s")
    reference = ("--part", "1/1", "--engine", "reference")
    assert " s: engine reference, " in invoke(*arguments, *prefix, *reference)
    output = invoke(*arguments, *prefix)
    assert "MB/s" not in output
    assert "train: " in output


def test_progress_of_a_stream_tells_no_end() -> None:
    progress = made_progress(text_bytes=20_000_000, total_units=None)
    assert progress_line(progress) == ("10 units: 5 documents, 20 MB of text, 7 tokens, 5.0 MB/s")
