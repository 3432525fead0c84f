"""The whole benchmark at a tiny size: real runs of every contestant, on real text."""

from __future__ import annotations

import ast
import calendar
import gzip
import heapq
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest

from megatron_mup.benchmark import preprocessing
from megatron_mup.benchmark.preprocessing_inputs import Prepared, enlarge, prepare_input
from megatron_mup.benchmark.preprocessing_memory import footprint
from megatron_mup.benchmark.preprocessing_reference import (
    first_difference,
    run_reference,
    upstream,
)
from megatron_mup.benchmark.preprocessing_runs import Job, engine_alone, whole_job
from megatron_mup.data.engines import EngineOption
from megatron_mup.data.tokenizer import load_tokenizer
from megatron_mup.data.tokenizer_training import TokenizerOptions, train_tokenizer
from megatron_mup.errors import DataError

# Megatron-LM's way forks, although torch has threads by then.
pytestmark = pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")


def write_lines(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), "utf-8")
    return path


@pytest.fixture(scope="module")
def texts() -> list[str]:
    sources = [Path(module.__file__ or "").read_text("utf-8") for module in (ast, calendar, heapq)]
    parts = [part for source in sources for part in source.split("\n\n")]
    return [part for part in dict.fromkeys(parts) if part]


@pytest.fixture(scope="module")
def corpus(texts: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_lines(tmp_path_factory.mktemp("corpus") / "corpus.jsonl", texts)


@pytest.fixture(scope="module")
def model_path(corpus: Path) -> Path:
    options = TokenizerOptions(vocab_size=512, held_out_fraction=0.0)
    return train_tokenizer([corpus], corpus.with_name("tiny"), options=options).model_path


def job(corpus: Path, model_path: Path, folder: Path, *, workers: int) -> Job:
    lines = corpus.read_text("utf-8").splitlines()
    return Job(
        input_path=corpus,
        text_bytes=sum(len(json.loads(line)["text"].encode()) for line in lines),
        model_path=model_path,
        engine=EngineOption.auto,
        workers=workers,
        prefix=folder / "shard",
    )


def test_megatrons_way_writes_eod_after_each_document_and_keeps_empty_ones(
    model_path: Path, tmp_path: Path
) -> None:
    corpus = write_lines(tmp_path / "corpus.jsonl", ["import os", "", "def f(x):\n    pass"] * 40)
    run_reference(corpus, tmp_path / "theirs", model_path=model_path, workers=2)
    dataset = upstream().IndexedDataset(str(tmp_path / "theirs"))
    tokenizer = load_tokenizer(model_path)
    expected = [[*tokenizer.encode("import os"), 2], [*tokenizer.encode("def f(x):\n    pass"), 2]]
    assert [ids.tolist() for ids in dataset[0:80]] == expected * 40
    assert dataset.document_indices.tolist()[:5] == [0, 1, 1, 2, 3]
    assert dataset.index.dtype is np.uint16


def test_the_whole_jobs_shard_is_that_of_megatrons_way(
    corpus: Path, model_path: Path, texts: list[str], tmp_path: Path
) -> None:
    asked = job(corpus, model_path, tmp_path, workers=2)
    cost = whole_job(asked)
    assert cost.text_bytes == sum(len(text.encode("utf-8")) for text in texts)
    assert 0 < cost.cpu_seconds < 600
    assert cost.speed == pytest.approx(cost.text_bytes / 1e6 / cost.wall_seconds)
    theirs = tmp_path / "theirs"
    run_reference(corpus, theirs, model_path=model_path, workers=1)
    assert first_difference(asked.prefix, theirs) is None
    # Again, in place of the shard that is there.
    whole_job(asked)
    assert first_difference(asked.prefix, theirs) is None


def test_the_first_document_that_differs_is_named(
    corpus: Path, model_path: Path, texts: list[str], tmp_path: Path
) -> None:
    changed = [*texts[:7], texts[7] + "!", *texts[8:]]
    for name, some in {"all": texts, "changed": changed, "fewer": texts[:-1]}.items():
        lines = write_lines(tmp_path / f"{name}.jsonl", some)
        run_reference(lines, tmp_path / name, model_path=model_path, workers=1)
    found = first_difference(tmp_path / "all", tmp_path / "changed")
    assert found == "document 7 (counted from 0) differs"
    found = first_difference(tmp_path / "all", tmp_path / "fewer")
    assert found == (
        f"{len(texts)} documents against {len(texts) - 1}; the first ones are the same"
    )
    # The same index, and one id that differs.
    damaged = bytearray((tmp_path / "all.bin").read_bytes())
    damaged[0] ^= 1
    (tmp_path / "changed.bin").write_bytes(damaged)
    shutil.copy(tmp_path / "all.idx", tmp_path / "changed.idx")
    found = first_difference(tmp_path / "all", tmp_path / "changed")
    assert found == "document 0 (counted from 0) differs"


@pytest.mark.parametrize("workers", [1, 2])
def test_the_engine_alone_encodes_all_but_its_warm_up(
    corpus: Path, model_path: Path, texts: list[str], tmp_path: Path, workers: int
) -> None:
    cost = engine_alone(job(corpus, model_path, tmp_path, workers=workers))
    shares = [texts[number::workers] for number in range(workers)]
    # A quarter of the text, which is the most of a small input that is its head.
    limit = sum(len(text.encode("utf-8")) for text in texts) // 4 // workers
    counted = 0
    for share in shares:
        seen = 0
        for text in share:
            seen += len(text.encode("utf-8"))
            counted += len(text.encode("utf-8")) if seen > limit else 0
    assert cost.text_bytes == counted
    assert cost.wall_seconds > 0
    assert cost.cpu_seconds > 0
    assert not list(tmp_path.iterdir())


def test_text_that_differs_on_purpose_is_left_out_and_counted(tmp_path: Path) -> None:
    source = tmp_path / "source.jsonl.gz"
    with gzip.open(source, "wt", encoding="utf-8") as file:
        for text in ("one \u00e9", "", "two \u2581", "three"):
            file.write(json.dumps({"text": text, "id": 1}) + "\n")
    prepared = prepare_input(source, tmp_path)
    assert prepared.path.read_bytes() == '{"text": "one \u00e9"}\n{"text": "three"}\n'.encode()
    assert (prepared.documents, prepared.text_bytes, prepared.left_out) == (2, 11, 2)
    with pytest.raises(DataError, match="holds no text to measure on"):
        prepare_input(write_lines(tmp_path / "empty.jsonl", [""]), tmp_path)


def test_a_larger_input_has_other_words_in_each_repetition(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "small.jsonl", ["a b c", "d e\nf"])
    prepared = Prepared(path=path, documents=2, text_bytes=10, left_out=1)
    targets = [tmp_path / "large.jsonl", tmp_path / "large.jsonl.gz"]
    large = enlarge(prepared, targets, text_bytes=21)
    found = [json.loads(line)["text"] for line in targets[0].read_text().splitlines()]
    assert found == ["a b c", "d e\nf", "c d b", "f\ng e", "e c d"]
    assert gzip.decompress(targets[1].read_bytes()) == targets[0].read_bytes()
    assert (large.path, large.documents, large.text_bytes) == (targets[0], 5, 25)


# A process that holds 200 MB while its parent, which holds little, waits for it.
HOLDER = "import time; held = bytearray(b'x' * 200_000_000); time.sleep(1)"
PARENT = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {HOLDER!r}])"


def test_memory_counts_the_processes_below_the_command() -> None:
    found = footprint([sys.executable, "-c", PARENT])
    assert 200_000_000 < found.peak_bytes < 600_000_000
    assert found.wall_seconds > 1


def test_a_command_that_fails_gives_no_footprint() -> None:
    with pytest.raises(DataError, match=r"ended with 3: it broke"):
        footprint([sys.executable, "-c", "print('it broke'); raise SystemExit(3)"])


def run_command(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr("sys.argv", ["preprocessing", *arguments])
    with pytest.raises(SystemExit) as ended:
        preprocessing.main()
    assert isinstance(ended.value.code, int)
    return ended.value.code


def test_the_command_keeps_its_section_of_the_page(
    corpus: Path,
    model_path: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    page = tmp_path / "page.md"
    page.write_text("# Speed of a training step\n")
    options = ["--input", str(corpus), "--tokenizer-model", str(model_path), "--title", "sources"]
    options += ["--rounds", "1", "--workers", "1", "--large-gb", "0.0003"]
    code = run_command(monkeypatch, *options, "--output", str(page))
    text, printed = page.read_text(), capsys.readouterr()
    assert text.startswith("# Speed of a training step\n\n<!-- preprocessing")
    assert "- BPE: .bin and .idx are those of Megatron-LM's way, byte for byte." in text
    assert "Text: sources; 0.1 MB" in text
    assert "| BPE | whole job after its start, 1 worker | 1 |" in text
    assert text.count("| BPE | JSON lines") == 2
    assert "`python -m megatron_mup.benchmark.preprocessing --input corpus.jsonl" in text
    assert str(tmp_path) not in text
    # So little text cannot reach the demands; each that is missed is said.
    verdicts = text.count("| NO |")
    assert code == (1 if verdicts else 0)
    assert len(printed.err.splitlines()) == verdicts
    assert "BPE, round 1 of 1: whole job, 1 worker:" in printed.out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rounds", "0"], "error: --rounds is 0; pass at least 1"),
        (["--workers", "0"], "error: --workers is 0; this machine has"),
        (["--large-gb", "-1"], "error: --large-gb is -1.0; pass 0 or more"),
        (["--output", "nowhere/page.md"], "the folder nowhere does not exist; make it"),
    ],
)
def test_wrong_options_are_refused_before_anything_is_measured(
    arguments: list[str],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(preprocessing, "prepare_input", None)
    output = [] if "--output" in arguments else ["--output", "page.md"]
    assert run_command(monkeypatch, *arguments, *output) == 2
    assert message in capsys.readouterr().err


def test_a_tokenizer_that_the_yardstick_cannot_read_is_refused(
    corpus: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel

    path = tmp_path / "tokenizer.json"
    Tokenizer(WordLevel({"a": 0, "</s>": 1}, unk_token="a")).save(str(path))
    options = ["--input", str(corpus), "--tokenizer-model", str(path)]
    assert run_command(monkeypatch, *options, "--output", str(tmp_path / "page.md")) == 2
    assert (
        "is a huggingface tokenizer; the yardstick reads sentencepiece" in capsys.readouterr().err
    )
