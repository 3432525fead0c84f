from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import sentencepiece

from megatron_mup.data import tokenizer_training
from megatron_mup.data.documents import Document, is_held_out
from megatron_mup.data.inputs import InputFile
from megatron_mup.data.tokenizer import load_tokenizer
from megatron_mup.data.tokenizer_training import (
    ModelType,
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
        ({"vocab_size": 300, "sample_bytes": -1}, "--sample-bytes is -1"),
        ({"vocab_size": 300, "pad_vocab_to_multiple": 0}, "--pad-vocab-to-multiple is 0"),
        ({"vocab_size": 261, "special_tokens": ("[A]",)}, "pass at least 262 ids"),
        ({"vocab_size": 300, "special_tokens": ("a b",)}, "--special-token 'a b' .* white space"),
        ({"vocab_size": 300, "special_tokens": ("\u2581",)}, "--special-token .* white space"),
        ({"vocab_size": 300, "special_tokens": ("",)}, "--special-token '' is empty"),
        ({"vocab_size": 300, "special_tokens": ("</s>",)}, "'</s>' is one of the model's own"),
        ({"vocab_size": 300, "special_tokens": ("<0x41>",)}, "'<0x41>' is one of the model's own"),
        ({"vocab_size": 300, "special_tokens": ("[A]", "[A]")}, r"'\[A\]' is given twice"),
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


@pytest.mark.parametrize("model_type", ["bpe", "unigram"])
def test_special_tokens_are_one_id_each_and_never_split(
    tmp_path: Path, sources: list[Path], model_type: ModelType
) -> None:
    tokens = ("<|im_start|>", 'a,"b', "ast")
    options = TokenizerOptions(
        vocab_size=400, model_type=model_type, special_tokens=tokens, held_out_fraction=0
    )
    path = train_tokenizer(sources[:2], tmp_path / "t", options=options).model_path
    tokenizer = load_tokenizer(path)
    assert [tokenizer.encode(token) for token in ("\n", *tokens)] == [[3], [4], [5], [6]]
    assert tokenizer.encode("<|im_start|><|im_start|>\n") == [4, 4, 3]
    # Inside a word too.
    assert tokenizer.encode("fastest")[1:-1].count(6) == 1
    assert tokenizer.decode(tokenizer.encode("x <|im_start|> y")) == "x <|im_start|> y"


@pytest.mark.parametrize("model_type", ["bpe", "unigram"])
def test_a_padded_vocabulary_is_learned_as_far_as_the_text_goes(
    tmp_path: Path, sources: list[Path], model_type: ModelType
) -> None:
    options = TokenizerOptions(
        vocab_size=385, model_type=model_type, pad_vocab_to_multiple=128, held_out_fraction=0
    )
    report = train_tokenizer(sources[:2], tmp_path / "t", options=options)
    assert (report.vocab_size, report.unused_ids) == (512, 0)
    plain = TokenizerOptions(vocab_size=512, model_type=model_type, held_out_fraction=0)
    again = train_tokenizer(sources[:2], tmp_path / "u", options=plain)
    pieces = [
        sentencepiece.SentencePieceProcessor(model_file=str(path)).id_to_piece(list(range(512)))
        for path in (report.model_path, again.model_path)
    ]
    assert pieces[0] == pieces[1]


def test_a_small_text_is_padded_with_unused_ids(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("abc abd")
    options = TokenizerOptions(vocab_size=264, pad_vocab_to_multiple=64, held_out_fraction=0)
    report = train_tokenizer([path], tmp_path / "t", options=options)
    tokenizer = load_tokenizer(report.model_path)
    # 260 ids before any character: the text has five and a few pairs of them.
    assert report.vocab_size == tokenizer.vocab_size == 320
    learned = 320 - report.unused_ids
    assert 265 <= learned < 275
    processor = sentencepiece.SentencePieceProcessor(model_file=str(report.model_path))
    assert processor.id_to_piece(learned) == "<unused_0>"
    assert processor.id_to_piece(319) == f"<unused_{report.unused_ids - 1}>"
    assert all(processor.is_control(token) for token in range(learned, 320))
    assert not processor.is_control(learned - 1)
    # No text gives one, and they stand for no text.
    assert max(tokenizer.encode("<unused_0> abd")) < learned
    assert tokenizer.decode(list(range(learned, 320))) == ""
    too_many = TokenizerOptions(vocab_size=300, pad_vocab_to_multiple=64, held_out_fraction=0)
    with pytest.raises(DataError, match=f"--vocab-size 300 .* it gives {learned} pieces"):
        train_tokenizer([path], tmp_path / "u", options=too_many)
    assert not (tmp_path / "u.model").exists()


def test_a_sample_is_chosen_by_hash_and_size_in_any_order(tmp_path: Path, jsonl: Path) -> None:
    lines = jsonl.read_text("utf-8").splitlines()
    texts = [json.loads(line)["text"].encode() for line in lines]
    by_hash = sorted(texts, key=lambda text: hashlib.sha256(text).digest()[8:16])
    total, chosen = 0, 0
    while total + len(by_hash[chosen]) <= 20_000:
        total += len(by_hash[chosen])
        chosen += 1
    assert 10 < chosen < len(texts)
    shuffled = tmp_path / "shuffled.jsonl"
    shuffled.write_text("\n".join(sorted(lines)) + "\n", "utf-8")
    options = TokenizerOptions(vocab_size=400, sample_bytes=20_000, held_out_fraction=0)
    kept = tmp_path / "kept.jsonl"
    inside = set(by_hash[:chosen])
    kept.write_text(
        "".join(f"{line}\n" for line, text in zip(lines, texts, strict=True) if text in inside)
    )
    reports = [
        train_tokenizer([path], tmp_path / "t", options=options, overwrite=True)
        for path in (jsonl, kept, shuffled)
    ]
    for report in reports:
        assert (report.training_documents, report.training_bytes) == (chosen, total)
    assert reports[0].sha256 == reports[1].sha256
    everything = TokenizerOptions(vocab_size=400, sample_bytes=0, held_out_fraction=0)
    report = train_tokenizer([jsonl], tmp_path / "t", options=everything, overwrite=True)
    assert (report.training_documents, report.training_bytes) == (
        len(texts),
        sum(map(len, texts)),
    )


def test_the_first_document_of_a_sample_may_be_larger_than_it(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("abc abd")
    options = TokenizerOptions(vocab_size=265, sample_bytes=3, held_out_fraction=0)
    report = train_tokenizer([path], tmp_path / "t", options=options)
    assert (report.training_documents, report.training_bytes) == (1, 7)


def test_compression_is_measured_on_a_bounded_sample(
    tmp_path: Path, jsonl: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = TokenizerOptions(vocab_size=400, held_out_fraction=0.5)
    whole = train_tokenizer([jsonl], tmp_path / "t", options=options)
    monkeypatch.setattr(tokenizer_training, "MEASURED_BYTES", 5000)
    part = train_tokenizer([jsonl], tmp_path / "u", options=options)
    assert 1 < part.held_out_documents < whole.held_out_documents
    assert part.training_documents == whole.training_documents
    assert part.held_out_bytes_per_token is not None


def test_the_corpus_is_read_once(
    tmp_path: Path, sources: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[str] = []
    plain = tokenizer_training.read_documents

    def spy(inputs: list[InputFile], **options: str) -> Iterator[Document]:
        for document in plain(inputs, **options):
            read.append(document.name)
            yield document

    monkeypatch.setattr(tokenizer_training, "read_documents", spy)
    options = TokenizerOptions(vocab_size=400, held_out_fraction=0.3)
    report = train_tokenizer(sources, tmp_path / "t", options=options)
    assert read == [str(source) for source in sources]
    assert report.training_documents + report.held_out_documents == len(sources)


def test_an_existing_model_is_kept_without_overwrite(model_path: Path, sources: list[Path]) -> None:
    before = model_path.read_bytes()
    with pytest.raises(DataError, match=r"output exists: .*tiny\.model; pass --overwrite"):
        train_tokenizer(
            sources, model_path.with_suffix(""), options=TokenizerOptions(vocab_size=300)
        )
    assert model_path.read_bytes() == before


def test_a_model_that_the_disk_does_not_hold_is_an_error_with_its_option(
    sources: list[Path], tmp_path: Path, full_disk: None
) -> None:
    message = r"cannot write .*t\.model: File too large; free space, or pass a --model-prefix"
    with pytest.raises(DataError, match=message):
        train_tokenizer(sources, tmp_path / "t", options=TokenizerOptions(vocab_size=400))
    assert not list(tmp_path.glob("*t.model*"))
