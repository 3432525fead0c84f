from __future__ import annotations

import json
from pathlib import Path

import pytest
import sentencepiece

from megatron_mup.data.documents import is_held_out
from megatron_mup.data.tokenizer import load_tokenizer
from megatron_mup.data.tokenizer_training import (
    TokenizerOptions,
    split_sentences,
    train_tokenizer,
)
from megatron_mup.errors import DataError


def test_training_twice_gives_the_same_file(sources: list[Path], tmp_path: Path) -> None:
    for options in (
        TokenizerOptions(vocab_size=400),
        TokenizerOptions(vocab_size=380, input_sentence_size=500),
    ):
        digests = {
            train_tokenizer(sources, tmp_path / name, options=options, overwrite=True).sha256
            for name in ("a", "b")
        }
        assert len(digests) == 1


def test_the_report_measures_held_out_documents_only(tmp_path: Path, jsonl: Path) -> None:
    options = TokenizerOptions(vocab_size=400, held_out_fraction=0.2)
    report = train_tokenizer([jsonl], tmp_path / "t", options=options)
    texts = [json.loads(line)["text"] for line in jsonl.read_text().splitlines()]
    held_out = [text for text in texts if is_held_out(text, 0.2)]
    assert 0 < len(held_out) == report.held_out_documents
    assert report.training_documents == len(texts) - len(held_out)
    processor = sentencepiece.SentencePieceProcessor(model_file=str(report.model_path))
    tokens = sum(len(processor.encode(text)) for text in held_out)
    text_bytes = sum(len(text.encode()) for text in held_out)
    assert report.held_out_bytes_per_token == pytest.approx(text_bytes / tokens)


def test_held_out_documents_are_not_trained_on(tmp_path: Path) -> None:
    # Of these, "hello" alone has a hash in the lowest fifth (0.1756): its letters get no piece.
    path = tmp_path / "a.jsonl"
    words = ["abc abc abc", "abc", "hello"]
    path.write_text("".join(json.dumps({"text": word}) + "\n" for word in words))
    assert [is_held_out(word, 0.2) for word in words] == [False, False, True]
    options = TokenizerOptions(vocab_size=264, held_out_fraction=0.2, character_coverage=1.0)
    report = train_tokenizer([path], tmp_path / "t", options=options)
    assert report.held_out_bytes_per_token == 1.0
    assert load_tokenizer(report.model_path).decode([263]) in "abc "


def test_compression_is_unmeasured_without_held_out_text(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("abc abc")
    options = TokenizerOptions(vocab_size=264, held_out_fraction=0.0)
    report = train_tokenizer([path], tmp_path / "t", options=options)
    assert (report.held_out_documents, report.held_out_bytes_per_token) == (0, None)


def test_long_lines_are_cut_and_not_dropped() -> None:
    assert list(split_sentences("ab\n\n c\n")) == ["ab", " c"]
    assert [len(part) for part in split_sentences("x" * 5000)] == [4096, 904]
    wide = list(split_sentences("\U0001f600" * 2000))
    assert [len(part.encode()) for part in wide] == [4096, 3904]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"vocab_size": 260}, "--vocab-size is 260; pass at least 261"),
        ({"vocab_size": 4, "byte_fallback": False}, "--vocab-size is 4; pass at least 5"),
        ({"vocab_size": 300, "model_type": "word"}, "--model-type is 'word'"),
        ({"vocab_size": 300, "character_coverage": 1.1}, "--character-coverage is 1.1"),
        ({"vocab_size": 300, "input_sentence_size": 7}, "--input-sentence-size is 7"),
        ({"vocab_size": 300, "num_threads": 0}, "--num-threads is 0"),
        ({"vocab_size": 300, "held_out_fraction": 1.0}, "--held-out-fraction is 1.0"),
    ],
)
def test_an_option_outside_its_range_is_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(DataError, match=message):
        TokenizerOptions(**options)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("content", "vocab_size", "message"),
    [
        (b"abc abc", 5000, "--vocab-size 5000 from this text: Vocabulary size too high"),
        (b"", 300, "no text to train a tokenizer on"),
        (b"good\n\xff", 300, "invalid UTF-8 at byte offset 5"),
    ],
)
def test_text_that_gives_no_tokenizer_is_refused_and_nothing_published(
    tmp_path: Path, content: bytes, vocab_size: int, message: str
) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(content)
    options = TokenizerOptions(vocab_size=vocab_size, held_out_fraction=0.0)
    with pytest.raises(DataError, match=message):
        train_tokenizer([path], tmp_path / "t", options=options)
    assert [found.name for found in tmp_path.iterdir()] == ["a.txt"]


def test_an_existing_model_is_kept_without_overwrite(model_path: Path, sources: list[Path]) -> None:
    before = model_path.read_bytes()
    with pytest.raises(DataError, match=r"output exists: .*tiny\.model; pass --overwrite"):
        train_tokenizer(
            sources, model_path.with_suffix(""), options=TokenizerOptions(vocab_size=300)
        )
    assert model_path.read_bytes() == before
