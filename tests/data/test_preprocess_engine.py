"""Preprocessing's choice of an engine, and what it does about a wrong one."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_mup.data import preprocess as preprocessing
from megatron_mup.data import tokenization
from megatron_mup.data.engines import EngineOption
from megatron_mup.data.preprocess import PreprocessOptions, preprocess
from megatron_mup.data.schedule import Part
from megatron_mup.data.tokenizer import Encoded, Tokenizer

OPTIONS = PreprocessOptions(valid_fraction=0.2, shard_tokens=9000, unit_bytes=8000)


def made(source: Path, folder: Path, tokenizer: Tokenizer, **changes: Any) -> dict[str, bytes]:
    """Run, and return the output files by their names."""
    options = dataclasses.replace(OPTIONS, **changes)
    preprocess([source], folder / "s", tokenizer=tokenizer, options=options)
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


@pytest.fixture
def expected(tmp_path: Path, tokenizer: Tokenizer, jsonl: Path) -> dict[str, bytes]:
    """The reference's output."""
    return made(jsonl, tmp_path / "expected", tokenizer, engine=EngineOption.reference)


class WrongEngine:
    """An engine whose ids are all wrong."""

    name = "gigatoken"

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer

    def encode_flat(self, texts: list[str]) -> Encoded:
        encoded = self._tokenizer.encode_flat(texts)
        return Encoded(np.full_like(encoded.ids, 7), encoded.lengths)


def test_an_engine_that_the_audit_finds_wrong_is_replaced_loudly_for_the_whole_corpus(
    tmp_path: Path,
    tokenizer: Tokenizer,
    jsonl: Path,
    expected: dict[str, bytes],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    build, audit = tokenization.build_engine, tokenization.audit
    seen = []

    def late_audit(*arguments: Any) -> int | None:
        # Wrong units are there when the first wrong document is looked at; from then on all are.
        seen.append(arguments)
        digests = [bytes(32) for _ in arguments[3]]
        return audit(*arguments[:3], digests) if len(seen) > 5 else None

    def wrong_engine(tokenizer: Tokenizer, name: str, model: bytes | None) -> Any:
        return WrongEngine(tokenizer) if name == "gigatoken" else build(tokenizer, name, model)

    # Auto goes by speed, and could take the reference.
    monkeypatch.setattr(preprocessing, "choose_engine", lambda *_: "gigatoken")
    monkeypatch.setattr(tokenization, "build_engine", wrong_engine)
    monkeypatch.setattr(tokenization, "audit", late_audit)
    with caplog.at_level(logging.WARNING):
        found = made(jsonl, tmp_path / "found", tokenizer)
    assert "engine gigatoken gives other ids than the reference" in caplog.text
    assert found == expected


def test_no_engine_is_chosen_where_no_unit_is_left(
    tmp_path: Path,
    tokenizer: Tokenizer,
    jsonl: Path,
    expected: dict[str, bytes],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = tmp_path / "found"
    options = dataclasses.replace(OPTIONS, part=Part(1, 1))
    preprocess([jsonl], folder / "s", tokenizer=tokenizer, options=options)
    monkeypatch.setattr(preprocessing, "choose_engine", None)
    assert made(jsonl, folder, tokenizer) == expected
