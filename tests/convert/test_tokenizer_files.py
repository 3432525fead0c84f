from __future__ import annotations

import io
import json
import logging
import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from megatron_mup.convert.tokenizer_files import tokenizer_files
from megatron_mup.data.engines import HARD_STRINGS
from megatron_mup.data.tokenizer import Tokenizer, tokenizer_from_bytes
from megatron_mup.errors import DataError

ANY_TEXT = st.text() | st.text(alphabet=" \t\n\r\u2581ab<s>/-_\0\u00e9\U0001f600\ufffd0xA")
STDLIB = Path(sysconfig.get_paths()["stdlib"])
# Short, because a long text may hold a near tie of a Unigram model.
SAMPLE = (STDLIB / "textwrap.py").read_text("utf-8")[:2500]

IDENTITY = {
    "normalization_rule_name": "identity",
    "add_dummy_prefix": False,
    "remove_extra_whitespaces": False,
    "byte_fallback": True,
    "allow_whitespace_only_pieces": True,
}
OURS = {**IDENTITY, "user_defined_symbols": ["\n", "[X]", "<|im_start|>"]}
LLAMA = {**IDENTITY, "model_type": "bpe", "add_dummy_prefix": True}
STRIPPED = {**LLAMA, "remove_extra_whitespaces": True}
VARIANTS: dict[str, dict[str, Any]] = {
    "bpe": {**OURS, "model_type": "bpe"},
    "unigram": {**OURS, "model_type": "unigram"},
    # In no learned piece, so that no spelling of </s> by characters competes with the marker.
    "unigram without brackets": {**OURS, "model_type": "unigram", "without": "<>/"},
    "bpe of a llama": LLAMA,
    "bpe without bytes": {**STRIPPED, "byte_fallback": False},
    "unigram without extra spaces": {**STRIPPED, "model_type": "unigram"},
    "unigram without bytes": {**STRIPPED, "model_type": "unigram", "byte_fallback": False},
}

Trained = Callable[..., Tokenizer]


@pytest.fixture(scope="module")
def trained() -> Trained:
    """Trains a sentencepiece model of 420 pieces once for each set of options."""
    made: dict[str, Tokenizer] = {}
    lines = [line for name in ("csv", "heapq") for line in _lines(STDLIB / f"{name}.py")]

    def train(*, without: str = "", **options: Any) -> Tokenizer:
        key = json.dumps([without, options], sort_keys=True)
        if key not in made:
            model = io.BytesIO()
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=(line for line in lines if not set(without) & set(line)),
                model_writer=model,
                **{"vocab_size": 420, "minloglevel": 2, "num_threads": 1, **options},
            )
            made[key] = tokenizer_from_bytes(model.getvalue())
        return made[key]

    return train


def _lines(path: Path) -> list[str]:
    return [line for line in path.read_text("utf-8").splitlines() if line]


def loaded(tokenizer: Tokenizer, folder: Path, model_type: str = "llama") -> Any:
    for name, content in tokenizer_files(tokenizer, seq_length=4096).items():
        (folder / name).write_bytes(content)
    (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
    return AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("variant", VARIANTS)
def test_auto_tokenizer_gives_sentencepieces_ids_of_any_text(
    trained: Trained, tmp_path: Path, variant: str
) -> None:
    tokenizer = trained(**VARIANTS[variant])
    exported = loaded(tokenizer, tmp_path)
    processor = sentencepiece.SentencePieceProcessor(model_proto=tokenizer.model)

    @settings(max_examples=80, deadline=None)
    @given(text=ANY_TEXT)
    def check(text: str) -> None:
        assert exported(text)["input_ids"] == tokenizer.encode(text)

    check()
    for text in (*HARD_STRINGS, SAMPLE, "[X][X] a[X]b <|im_start|>user\n"):
        assert exported(text)["input_ids"] == tokenizer.encode(text)
        if "\u2581" not in text:
            assert exported.encode(text) == processor.encode(text)
    assert len(exported) == 420


@pytest.mark.parametrize("variant", ["bpe", "unigram"])
def test_decoding_gives_the_text_back(trained: Trained, tmp_path: Path, variant: str) -> None:
    exported = loaded(trained(**VARIANTS[variant]), tmp_path)

    for text in (*HARD_STRINGS, SAMPLE):
        assert exported.decode(exported.encode(text)) == text
    assert exported.decode([1, *exported.encode(" a"), 2], skip_special_tokens=True) == " a"


def test_a_dummy_prefix_is_taken_off_again(trained: Trained, tmp_path: Path) -> None:
    exported = loaded(trained(**LLAMA), tmp_path)

    assert exported.decode(exported.encode("a  b")) == "a  b"
    assert exported.decode(exported.encode("  a")) == "  a"


@pytest.mark.parametrize("model_type", ["llama", "granite"])
def test_settings_are_those_of_the_training_data(
    trained: Trained, tmp_path: Path, model_type: str
) -> None:
    tokenizer = trained(**VARIANTS["bpe"])
    exported = loaded(tokenizer, tmp_path, model_type)

    assert exported.is_fast
    assert (exported.eos_token, exported.eos_token_id) == ("</s>", 2)
    assert (exported.bos_token_id, exported.unk_token_id) == (1, 0)
    assert exported.model_max_length == 4096
    # A special token that is spelled out stays text, and nothing is put around a text.
    assert not {0, 1, 2} & set(exported("<unk><s></s>")["input_ids"])
    # U+2581 is E2 96 81 in UTF-8; the byte pieces follow unk, bos, eos and three user pieces.
    assert exported("\u2581")["input_ids"] == [6 + 0xE2, 6 + 0x96, 6 + 0x81]
    assert (tmp_path / "tokenizer.model").read_bytes() == tokenizer.model


def test_the_end_of_a_document_may_be_another_piece(trained: Trained, tmp_path: Path) -> None:
    model = trained(**VARIANTS["bpe"]).model
    exported = loaded(tokenizer_from_bytes(model, eod_token="<s>"), tmp_path)

    assert (exported.eos_token, exported.eos_token_id) == ("<s>", 1)


def test_a_tokenizer_json_is_written_without_what_a_corpus_has_not(tmp_path: Path) -> None:
    library = tokenizers.Tokenizer(tokenizers.models.BPE())
    library.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    library.train_from_iterator([SAMPLE], trainer)
    library.enable_truncation(max_length=3)
    library.post_processor = tokenizers.processors.TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)]
    )
    tokenizer = tokenizer_from_bytes(library.to_str().encode())
    exported = loaded(tokenizer, tmp_path)

    library.no_truncation()
    expected = library.encode(SAMPLE, add_special_tokens=False).ids
    assert exported(SAMPLE)["input_ids"] == expected
    assert exported.decode(expected) == SAMPLE
    assert (exported.eos_token, exported.bos_token, exported.unk_token) == (
        "<|endoftext|>",
        None,
        None,
    )
    assert exported("a<|endoftext|>")["input_ids"][-1] == 0
    assert not (tmp_path / "tokenizer.model").exists()


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"normalization_rule_name": "nmt_nfkc"}, "the normalization nmt_nfkc"),
        ({"treat_whitespace_as_suffix": True}, "spaces as suffixes"),
        ({"model_type": "char", "vocab_size": 90}, "another algorithm than BPE and Unigram"),
    ],
)
def test_models_that_a_tokenizer_json_cannot_express_are_refused(
    trained: Trained, options: dict[str, Any], reason: str
) -> None:
    tokenizer = trained(**{**IDENTITY, "byte_fallback": False, **options})

    with pytest.raises(DataError, match=f"has {reason}, which a tokenizer.json cannot express"):
        tokenizer_files(tokenizer, seq_length=8)


def test_another_order_of_merges_is_found(
    trained: Trained, monkeypatch: pytest.MonkeyPatch
) -> None:
    from megatron_mup.convert import tokenizer_files as module

    right = module._bpe

    def wrong(proto: Any) -> dict[str, Any]:
        made = right(proto)
        made["merges"].reverse()
        return made

    monkeypatch.setattr(module, "_bpe", wrong)
    with pytest.raises(DataError, match=r"no tokenizer.json gives the ids .* instead of \["):
        tokenizer_files(trained(**VARIANTS["bpe"]), seq_length=8)


def with_scores_of_spaces(tokenizer: Tokenizer, score: Callable[[int], float]) -> Tokenizer:
    """The same Unigram model with ``score(count)`` for each run of spaces."""
    from sentencepiece import sentencepiece_model_pb2

    proto = sentencepiece_model_pb2.ModelProto()
    proto.ParseFromString(tokenizer.model)
    for piece in proto.pieces:
        if set(piece.piece) == {"\u2581"}:
            piece.score = score(len(piece.piece))
    return tokenizer_from_bytes(proto.SerializeToString())


def test_cuts_of_equal_score_are_told_and_not_refused(
    trained: Trained, caplog: pytest.LogCaptureFixture
) -> None:
    # Every way to cut a run of spaces scores the same, but for rounding.
    tokenizer = with_scores_of_spaces(trained(**VARIANTS["unigram"]), lambda count: -1.1 * count)
    with caplog.at_level(logging.WARNING, logger="megatron_mup"):
        tokenizer_files(tokenizer, seq_length=8, samples=[SAMPLE])
    assert [record.message.partition(" ")[2][:3] for record in caplog.records] == ["of "]
    assert "two cuts score nearly the same" in caplog.text


def test_a_small_difference_of_scores_is_no_tie_in_a_short_text(
    trained: Trained, monkeypatch: pytest.MonkeyPatch
) -> None:
    from megatron_mup.convert import tokenizer_files as module

    # Three spaces are better as one piece by 0.001, which 32 bits can tell in a short text.
    scores = {1: -1.1, 3: -3.299}
    tokenizer = with_scores_of_spaces(
        trained(**VARIANTS["unigram"]), lambda count: scores.get(count, -9.0 * count)
    )
    tokenizer_files(tokenizer, seq_length=8)
    right = module._unigram

    def wrong(proto: Any) -> dict[str, Any]:
        made = right(proto)
        (three,) = (entry for entry in made["vocab"] if entry[0] == "   ")
        three[1] = -3.301
        return made

    monkeypatch.setattr(module, "_unigram", wrong)
    with pytest.raises(DataError, match=r"no tokenizer.json gives the ids .* instead of \["):
        tokenizer_files(tokenizer, seq_length=8)
