from __future__ import annotations

import hashlib
import logging
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_mup.data import engines, fast_engines
from megatron_mup.data.engines import (
    HARD_STRINGS,
    REFERENCE,
    Engine,
    EngineOption,
    audit,
    build_engine,
    choose_engine,
    engine_model,
    is_audited,
)
from megatron_mup.data.tokenizer import Encoded, Tokenizer, load_tokenizer, tokenizer_from_bytes
from megatron_mup.data.tokenizer_training import TokenizerOptions, train_tokenizer
from megatron_mup.errors import DataError

TEXTS = st.lists(
    st.text() | st.text(alphabet=" \t\n\r\u2581ab<s>/-_\0\u00e9\U0001f600\ufffd0xA"), max_size=5
)


def trained(sources: list[Path], prefix: Path, options: TokenizerOptions) -> Tokenizer:
    return load_tokenizer(train_tokenizer(sources, prefix, options=options).model_path)


@pytest.fixture(scope="module")
def models(
    sources: list[Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, tuple[Tokenizer, Engine]]:
    """A model for each fast engine, and the engine."""
    folder = tmp_path_factory.mktemp("engines")
    special = ("<|im_start|>", "[X]")
    library = tokenizers.Tokenizer(tokenizers.models.BPE())
    library.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=500,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    library.train_from_iterator((path.read_text("utf-8") for path in sources[:2]), trainer)
    made = {
        "gigatoken": trained(
            sources,
            folder / "bpe",
            TokenizerOptions(vocab_size=600, held_out_fraction=0.0, special_tokens=special),
        ),
        "splintr": trained(
            sources[:3],
            folder / "unigram",
            TokenizerOptions(
                vocab_size=600, model_type="unigram", held_out_fraction=0, special_tokens=special
            ),
        ),
        "splintr of a tokenizer.json": tokenizer_from_bytes(library.to_str().encode()),
        "gigatoken of a tokenizer.json": tokenizer_from_bytes(library.to_str().encode()),
    }
    return {name: (model, build_engine(model, name.split()[0])) for name, model in made.items()}


ENGINES = pytest.mark.parametrize(
    "name",
    ["gigatoken", "splintr", "splintr of a tokenizer.json", "gigatoken of a tokenizer.json"],
)


def assert_same(tokenizer: Tokenizer, engine: Engine, texts: list[str]) -> None:
    expected = tokenizer.encode_flat(texts)
    found = engine.encode_flat(texts)
    assert found.lengths.tolist() == expected.lengths.tolist()
    assert np.array_equal(found.ids, expected.ids)


@ENGINES
def test_an_engine_makes_the_reference_ids_of_any_texts(
    models: dict[str, tuple[Tokenizer, Engine]], name: str
) -> None:
    @settings(max_examples=150, deadline=None)
    @given(texts=TEXTS)
    def check(texts: list[str]) -> None:
        assert_same(*models[name], texts)

    check()
    assert_same(*models[name], [*HARD_STRINGS, "<|im_start|>a[X]b"])


@ENGINES
def test_an_engine_makes_the_reference_ids_of_real_sources(
    models: dict[str, tuple[Tokenizer, Engine]], name: str, sources: list[Path]
) -> None:
    texts = [path.read_text("utf-8") for path in sources]
    assert max(map(len, texts)) > fast_engines.UNIGRAM_CHARACTERS
    parts = [part for text in texts for part in text.split("\n\n")]
    assert_same(*models[name], [*texts, *parts])


def test_markers_and_near_ties_are_left_to_the_reference(
    models: dict[str, tuple[Tokenizer, Engine]], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = models["splintr"][1]
    calls: list[list[str]] = []
    plain = Tokenizer.encode_flat

    def spy(self: Tokenizer, texts: list[str]) -> Encoded:
        calls.append(texts)
        return plain(self, texts)

    monkeypatch.setattr(Tokenizer, "encode_flat", spy)
    left = ["x</s>y", "<unk>", "<0x41>", "\u2581", "\x01", "d" * 16385]
    engine.encode_flat(["a < b", *left, "c", "<0x"])
    assert calls == [left]
    calls.clear()
    engine.encode_flat(["a < b", "c <0xGG> <", "the"])
    assert calls == []


def test_auto_takes_the_engine_of_the_models_type(
    models: dict[str, tuple[Tokenizer, Engine]], caplog: pytest.LogCaptureFixture
) -> None:
    sample = ["a sample of text", "and another\n"]
    expected = {
        "gigatoken": "gigatoken",
        "splintr": REFERENCE,
        "splintr of a tokenizer.json": "splintr",
    }
    for name, engine in expected.items():
        assert choose_engine(models[name][0], EngineOption.auto, sample) == engine
        assert choose_engine(models[name][0], EngineOption.reference, sample) == REFERENCE
        assert build_engine(models[name][0], engine).name == engine
    with caplog.at_level(logging.INFO, logger=engines.__name__):
        assert choose_engine(models["splintr"][0], EngineOption.auto, sample) == REFERENCE
    assert "no fast engine gains on this type of model" in caplog.text
    assert choose_engine(models["splintr"][0], EngineOption.splintr, sample) == "splintr"
    wrong = models["splintr"][0]
    with pytest.raises(DataError, match=r"--engine gigatoken cannot be used: .*--engine auto"):
        choose_engine(wrong, EngineOption.gigatoken, sample)
    with pytest.raises(DataError, match="--engine is 'turbo'; pass one of auto, reference"):
        build_engine(wrong, "turbo")


def test_a_missing_package_gives_the_reference_and_says_what_to_install(
    models: dict[str, tuple[Tokenizer, Engine]],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    tokenizer = models["gigatoken"][0]
    for package in ("gigatoken", "splintr"):
        monkeypatch.setitem(sys.modules, package, None)
    with caplog.at_level(logging.INFO, logger=engines.__name__):
        assert choose_engine(tokenizer, EngineOption.auto, ["a"]) == REFERENCE
    assert [record.levelname for record in caplog.records] == ["INFO"]
    assert "pip install 'megatron-mup[fast-tokenizers]'" in caplog.text
    for name in ("gigatoken", "splintr"):
        with pytest.raises(DataError, match=f"--engine {name} cannot be used: .*pip install"):
            choose_engine(models[name][0], EngineOption(name), ["a"])


class WrongEngine:
    """Swaps the first two ids of texts that hold a certain word."""

    name = "gigatoken"

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer

    def encode_flat(self, texts: list[str]) -> Encoded:
        encoded = self._tokenizer.encode_flat(texts)
        ids, starts = encoded.ids.copy(), np.cumsum(encoded.lengths) - encoded.lengths
        for text, start in zip(texts, starts, strict=True):
            if "sentinel" in text:
                ids[start : start + 2] = ids[start : start + 2][::-1]
        return Encoded(ids, encoded.lengths)


@pytest.fixture
def wrong_engine(monkeypatch: pytest.MonkeyPatch) -> Callable[[Tokenizer], Engine]:
    monkeypatch.setattr(engines, "build_gigatoken", lambda tokenizer, _: WrongEngine(tokenizer))
    return WrongEngine


@pytest.mark.usefixtures("wrong_engine")
def test_an_engine_that_differs_on_the_sample_is_not_taken(
    tokenizer: Tokenizer, caplog: pytest.LogCaptureFixture
) -> None:
    sample = ["fine"] * 200 + ["a sentinel"]
    assert choose_engine(tokenizer, EngineOption.auto, ["fine"]) == "gigatoken"
    with caplog.at_level(logging.WARNING, logger=engines.__name__):
        assert choose_engine(tokenizer, EngineOption.auto, sample) == REFERENCE
    expected = tokenizer.encode("a sentinel")
    assert "the text 'a sentinel' (10 characters) gives" in caplog.text
    assert f"at token 0, the reference {expected[:8]}" in caplog.text
    with pytest.raises(DataError, match=r"--engine gigatoken makes other ids .*'a sentinel'"):
        choose_engine(tokenizer, EngineOption.gigatoken, sample)


def test_the_audit_finds_a_wrong_document_that_it_looks_at(
    tokenizer: Tokenizer, wrong_engine: Callable[[Tokenizer], Engine]
) -> None:
    looked_at, passed_over = bytes(32), b"\x01" * 32
    texts = ["fine", "a sentinel", "b sentinel", "fine"]
    encoded = wrong_engine(tokenizer).encode_flat(texts)
    for digests, found in (
        ([looked_at] * 4, 1),
        ([looked_at, passed_over, looked_at, looked_at], 2),
        ([looked_at, passed_over, passed_over, looked_at], None),
        ([passed_over] * 4, None),
    ):
        assert audit(tokenizer, texts, encoded, digests) == found
    assert audit(tokenizer, texts, tokenizer.encode_flat(texts), [looked_at] * 4) is None


def test_the_audit_finds_ids_that_are_missing(tokenizer: Tokenizer) -> None:
    whole = tokenizer.encode_flat(["one", "two"])
    cut = Encoded(whole.ids[:-1], whole.lengths)
    assert audit(tokenizer, ["one", "two"], cut, [bytes(32)] * 2) == 0


def test_one_document_of_1024_is_audited_whatever_its_split() -> None:
    digests = [hashlib.sha256(b"%d" % number).digest() for number in range(160_000)]
    audited = sum(map(is_audited, digests))
    # 156.25 expected, with a standard deviation of 12.5.
    assert 106 <= audited <= 206
    # The split reads the first 8 bytes, the recognition of copies the first 16.
    assert is_audited(b"\xff" * 16 + bytes(16))
    assert not is_audited(bytes(16) + b"\xff" * 16)


def test_a_worker_needs_no_translation_of_the_model(
    models: dict[str, tuple[Tokenizer, Engine]], monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = models["gigatoken"][0]
    translated = engine_model(tokenizer, "gigatoken")
    assert translated is not None
    monkeypatch.setattr(fast_engines, "gigatoken_model", None)
    monkeypatch.setattr(fast_engines, "bpe_json", None)
    assert_same(tokenizer, build_engine(tokenizer, "gigatoken", translated), [*HARD_STRINGS])
    assert engine_model(models["splintr"][0], "splintr") is None
    assert engine_model(models["gigatoken of a tokenizer.json"][0], "gigatoken") is None


@pytest.mark.parametrize("name", ["gigatoken", "gigatoken of a tokenizer.json"])
def test_gigatoken_is_built_anew_before_its_memory_grows(
    models: dict[str, tuple[Tokenizer, Engine]], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    tokenizer = models[name][0]
    monkeypatch.setitem(fast_engines.GIGATOKEN_REBUILD_BYTES, tokenizer.kind, 1000)
    built = []
    plain = fast_engines._Gigatoken.__init__

    def spy(self: object, build: Callable[[], object], limit: int) -> None:
        plain(self, lambda: built.append(1) or build(), limit)  # type: ignore[arg-type,func-returns-value]

    monkeypatch.setattr(fast_engines._Gigatoken, "__init__", spy)
    engine = build_engine(tokenizer, "gigatoken")
    for number in range(10):
        assert_same(tokenizer, engine, [f"text {number} " * 50])
    assert 4 <= len(built) <= 8


def test_a_model_that_rewrites_text_is_not_for_splintr(
    sources: list[Path], models: dict[str, tuple[Tokenizer, Engine]]
) -> None:
    from sentencepiece import sentencepiece_model_pb2

    proto = sentencepiece_model_pb2.ModelProto()
    proto.ParseFromString(models["splintr"][0].model)
    proto.normalizer_spec.add_dummy_prefix = True
    tokenizer = tokenizer_from_bytes(proto.SerializeToString())
    with pytest.raises(DataError, match="cannot express this sentencepiece model: it has a dummy"):
        build_engine(tokenizer, "splintr")
    assert choose_engine(tokenizer, EngineOption.auto, ["a b"]) == REFERENCE


class SlowEngine:
    """Right, but burns CPU time for each text."""

    name = "gigatoken"

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer

    def encode_flat(self, texts: list[str]) -> Encoded:
        for _ in range(3):
            encoded = self._tokenizer.encode_flat(texts)
        return encoded


def test_an_engine_that_gains_nothing_on_the_sample_is_not_taken(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(engines, "build_gigatoken", lambda tokenizer, _: SlowEngine(tokenizer))
    sample = ["A text of forty characters, or about so.\n" * 100] * 40
    with caplog.at_level(logging.INFO, logger=engines.__name__):
        assert choose_engine(tokenizer, EngineOption.auto, sample) == REFERENCE
    assert "engine gigatoken gains too little (0." in caplog.text
    assert choose_engine(tokenizer, EngineOption.auto, sample[:1]) == "gigatoken"
    assert choose_engine(tokenizer, EngineOption.gigatoken, sample) == "gigatoken"
