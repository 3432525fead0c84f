from __future__ import annotations

import hashlib
import io
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_mup.data.tokenizer import Tokenizer, load_tokenizer, tokenizer_from_bytes
from megatron_mup.data.tokenizer_training import TokenizerOptions, train_tokenizer
from megatron_mup.errors import DataError

ANY_TEXT = st.text() | st.text(alphabet=" \t\n\r\u2581ab<s>/\0\u00e9\U0001f600\ufffd")


@pytest.fixture(scope="module")
def unigram(sources: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    prefix = tmp_path_factory.mktemp("unigram") / "u"
    options = TokenizerOptions(vocab_size=400, model_type="unigram", held_out_fraction=0.0)
    return load_tokenizer(train_tokenizer(sources[:3], prefix, options=options).model_path)


@settings(max_examples=300, deadline=None)
@given(text=ANY_TEXT)
def test_any_text_survives_encoding(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert all(3 <= token < 512 for token in ids)


@settings(max_examples=100, deadline=None)
@given(text=ANY_TEXT)
def test_any_text_survives_a_unigram_model(unigram: Tokenizer, text: str) -> None:
    assert unigram.decode(unigram.encode(text)) == text


@settings(max_examples=50, deadline=None)
@given(texts=st.lists(ANY_TEXT, max_size=4))
def test_a_batch_is_encoded_as_its_texts_one_by_one(tokenizer: Tokenizer, texts: list[str]) -> None:
    one_by_one = [tokenizer.encode(text) for text in texts]
    assert tokenizer.encode_batch(texts) == one_by_one
    encoded = tokenizer.encode_flat(texts)
    assert encoded.lengths.tolist() == [len(ids) for ids in one_by_one]
    assert encoded.ids.tolist() == [token for ids in one_by_one for token in ids]


def test_flat_ids_are_arrays_even_of_nothing(tokenizer: Tokenizer) -> None:
    for texts in ([], [""], ["a", "\u2581", ""]):
        encoded = tokenizer.encode_flat(texts)
        assert (encoded.ids.dtype, encoded.lengths.dtype) == (np.int32, np.int64)
        assert len(encoded.lengths) == len(texts)
    assert tokenizer.encode_flat([]).ids.shape == (0,)


def test_a_literal_space_symbol_is_spelled_in_its_bytes(tokenizer: Tokenizer) -> None:
    # Byte pieces follow the newline, id 3: U+2581 is E2 96 81 in UTF-8.
    symbol = [4 + 0xE2, 4 + 0x96, 4 + 0x81]
    assert tokenizer.encode("\u2581") == symbol
    x, y = tokenizer.encode("x"), tokenizer.encode(" y")
    assert tokenizer.encode("x\u2581\u2581 y") == [*x, *symbol, *symbol, *y]


def test_special_ids_are_fixed_and_never_come_from_text(tokenizer: Tokenizer) -> None:
    assert (tokenizer.bos, tokenizer.eod, tokenizer.vocab_size) == (1, 2, 512)
    assert not {0, 1, 2} & set(tokenizer.encode("<unk><s></s>"))
    assert tokenizer.decode([1, *tokenizer.encode("x"), 2]) == "x"


def test_newlines_and_runs_of_spaces_are_single_pieces(tokenizer: Tokenizer) -> None:
    assert tokenizer.encode("\n\n") == [3, 3]
    assert len(tokenizer.encode("        ")) == 1


def test_any_piece_can_end_a_document(model_path: Path, tokenizer: Tokenizer) -> None:
    chosen = load_tokenizer(model_path, eod_token="<s>")
    assert (chosen.eod, chosen.eod_token, chosen.kind) == (1, "<s>", "sentencepiece")
    assert (tokenizer.eod, tokenizer.eod_token) == (2, "</s>")
    assert chosen.decode([*chosen.encode("a"), 1]) == "a"
    with pytest.raises(DataError, match=r"--eod-token '<end>' is not a piece of .*tiny\.model"):
        load_tokenizer(model_path, eod_token="<end>")
    # The piece of unknown characters is there, and not the answer for one that is not.
    assert load_tokenizer(model_path, eod_token="<unk>").eod == 0


def test_the_digest_is_that_of_the_file(tokenizer: Tokenizer, model_path: Path) -> None:
    assert tokenizer.sha256 == hashlib.sha256(model_path.read_bytes()).hexdigest()


def test_ids_outside_the_vocabulary_are_refused(tokenizer: Tokenizer) -> None:
    for token in (-1, 512):
        with pytest.raises(DataError, match=f"token id {token} is outside .* vocabulary of 512"):
            tokenizer.decode([5, token])


def test_a_file_that_is_no_tokenizer_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.model"
    with pytest.raises(DataError, match=r"cannot read the tokenizer model .*x\.model: No such"):
        load_tokenizer(path)
    for content in (b"", b"garbage" * 50, b'{"model"', b'{"no": 1}', b"[]"):
        path.write_bytes(content)
        with pytest.raises(DataError, match=r"x\.model is not a sentencepiece model"):
            load_tokenizer(path)


def test_what_was_meant_instead_of_a_file_is_named(tmp_path: Path, model_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    with pytest.raises(DataError, match=r"is a folder that holds neither a tokenizer\.json nor"):
        load_tokenizer(folder)
    (folder / "tiny.model").write_bytes(model_path.read_bytes())
    with pytest.raises(DataError, match=r"; pass \S+/model/tiny\.model to --tokenizer-model"):
        load_tokenizer(folder)
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(DataError, match=r"; pass \S+/model/tokenizer\.json to --tokenizer-model"):
        load_tokenizer(folder)
    (folder / "vocab.json").write_text("{}")
    with pytest.raises(DataError, match=r"is only a part of a tokenizer; pass \S+/tokenizer\.json"):
        load_tokenizer(folder / "vocab.json")


def test_the_name_of_a_model_on_a_hub_is_not_looked_up() -> None:
    with pytest.raises(DataError, match=r"download the model's tokenizer\.json and pass the path"):
        load_tokenizer(Path("organization/Model-1.5B"))


def test_a_model_without_an_end_of_document_is_refused() -> None:
    buffer = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["abc abd"]),
        model_writer=buffer,
        vocab_size=10,
        hard_vocab_limit=False,
        eos_id=-1,
        minloglevel=2,
    )
    with pytest.raises(DataError, match=r"has no eos piece.*--eod-token"):
        tokenizer_from_bytes(buffer.getvalue())
    assert tokenizer_from_bytes(buffer.getvalue(), eod_token="<s>").eod == 1
