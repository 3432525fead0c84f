from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_mup.data.tokenizer import Tokenizer, load_tokenizer, tokenizer_from_bytes
from megatron_mup.errors import DataError


@pytest.fixture(scope="module")
def json_path(sources: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level tokenizer as other tools write them."""
    library = tokenizers.Tokenizer(tokenizers.models.BPE())
    library.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    library.train_from_iterator((path.read_text("utf-8") for path in sources[:2]), trainer)
    library.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    library.enable_truncation(3)
    library.enable_padding(length=8)
    path = tmp_path_factory.mktemp("library") / "tokenizer.json"
    library.save(str(path))
    return path


@pytest.fixture(scope="module")
def library(json_path: Path) -> Tokenizer:
    return load_tokenizer(json_path)


def renamed(path: Path, names: dict[str, str]) -> bytes:
    """The tokenizer.json with other spellings of its special tokens."""
    text = path.read_text("utf-8")
    for old, new in names.items():
        text = text.replace(f'"{old}"', f'"{new}"')
    return text.encode("utf-8")


def test_a_tokenizer_json_is_known_by_its_content(json_path: Path, library: Tokenizer) -> None:
    assert (library.kind, library.vocab_size) == ("huggingface", 400)
    assert (library.bos, library.eod, library.eod_token) == (1, 2, "</s>")
    assert library.sha256 == hashlib.sha256(json_path.read_bytes()).hexdigest()
    again = tokenizer_from_bytes(library.model, eod_token=library.eod_token)
    assert again == library


@settings(max_examples=200, deadline=None)
@given(text=st.text() | st.text(alphabet=" \t\n\r\u2581ab<>/\0\u00e9\U0001f600"))
def test_any_text_survives_a_byte_level_tokenizer(library: Tokenizer, text: str) -> None:
    # These two are markers of the model, and stand for no text.
    expected = text.replace("<s>", "").replace("</s>", "")
    assert library.decode(library.encode(text)) == expected


def test_nothing_is_added_cut_or_padded(json_path: Path, library: Tokenizer) -> None:
    plain = tokenizers.Tokenizer.from_file(str(json_path))
    plain.no_truncation()
    plain.no_padding()
    text = "def f(x):\n    return x  # a comment\n" * 3
    expected = plain.encode(text, add_special_tokens=False).ids
    assert len(expected) > 8
    assert library.encode_flat([text, "", text]).ids.tolist() == expected * 2
    assert library.encode_flat([text, "", text]).lengths.tolist() == [
        len(expected),
        0,
        len(expected),
    ]


def test_a_special_token_written_in_a_text_becomes_its_id(library: Tokenizer) -> None:
    a, b = library.encode("a"), library.encode("b")
    assert library.encode("a</s>b") == [*a, 2, *b]
    assert library.decode([1, *a, 0, 2]) == "a<pad>"


def test_dropout_is_put_aside(json_path: Path) -> None:
    description = json.loads(json_path.read_bytes())
    description["model"]["dropout"] = 0.9
    noisy = tokenizer_from_bytes(json.dumps(description).encode())
    expected = load_tokenizer(json_path).encode("the return of the definition " * 20)
    assert noisy.encode("the return of the definition " * 20) == expected


def test_the_end_of_a_document_is_looked_for_in_three_places(
    tmp_path: Path, json_path: Path
) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_bytes(json_path.read_bytes())
    config = tmp_path / "tokenizer_config.json"
    for token in ("<pad>", {"content": "<pad>", "special": True}):
        config.write_text(json.dumps({"eos_token": token}))
        assert load_tokenizer(path).eod == 0
    assert load_tokenizer(path, eod_token="<s>").eod == 1
    config.write_text("{}")
    assert load_tokenizer(path).eod == 2
    config.write_text("{")
    with pytest.raises(DataError, match=r"tokenizer_config.json is broken JSON .*--eod-token"):
        load_tokenizer(path)
    config.write_text(json.dumps({"eos_token": "<end>"}))
    with pytest.raises(DataError, match=r"'<end>' is not in the vocabulary .*pass another --eod"):
        load_tokenizer(path)


def test_an_unclear_end_of_document_is_asked_for(json_path: Path) -> None:
    for names, problem in (
        ({"</s>": "[STOP]"}, "has no usual end-of-document token"),
        ({"<pad>": "<|endoftext|>"}, "has more than one usual end-of-document token"),
    ):
        with pytest.raises(DataError, match=rf"{problem} .special tokens: .*<s>.*--eod-token"):
            tokenizer_from_bytes(renamed(json_path, names))
    assert tokenizer_from_bytes(renamed(json_path, {"</s>": "[STOP]"}), eod_token="[STOP]").eod == 2


def test_a_tokenizer_that_the_library_refuses_is_refused() -> None:
    for model in ('{"type": "Unheard"}', "7", "{}"):
        content = f'{{"version": "1.0", "model": {model}}}'.encode()
        with pytest.raises(
            DataError, match=r"x\.json is not a tokenizer\.json that the tokenizers"
        ):
            tokenizer_from_bytes(content, name="x.json")
    empty = {"version": "1.0", "model": {"type": "BPE", "vocab": {}, "merges": []}}
    with pytest.raises(DataError, match="empty vocabulary"):
        tokenizer_from_bytes(json.dumps(empty).encode())


def test_encoding_starts_no_thread_and_a_sentencepiece_model_loads_no_other_library(
    json_path: Path, model_path: Path
) -> None:
    code = (
        "import os, sys; from pathlib import Path; "
        "from megatron_mup.data.tokenizer import load_tokenizer; "
        f"load_tokenizer(Path({str(model_path)!r})).encode('a b'); "
        "loaded = {'tokenizers', 'gigatoken', 'splintr', 'torch', 'pyarrow'} & set(sys.modules); "
        "tasks = len(os.listdir('/proc/self/task')); "
        f"load_tokenizer(Path({str(json_path)!r})).encode_flat(['a b'] * 50); "
        "print(loaded, len(os.listdir('/proc/self/task')) - tasks)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set() 0\n"
