"""Corpus, tokenizer and shards of a sweep's own text."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_mup.errors import DataError
from megatron_mup.transfer.sweep.shards import cut_text, make_shards


def test_a_users_text_becomes_shards_once_and_another_text_is_refused(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("\n".join(f"line {n} of a text, {n * n} squared." for n in range(8000)))
    lines: list[str] = []

    def make(*sources: Path) -> Path:
        return make_shards(
            tmp_path / "data",
            text=sources,
            corpus_bytes=1000,
            vocab_size=400,
            echo=lines.append,
        )

    folder = make(text)
    assert (folder / "text_train.idx").exists()
    made = (folder / "text_train.bin").stat().st_mtime_ns
    make(text)
    assert (folder / "text_train.bin").stat().st_mtime_ns == made
    other = tmp_path / "other.txt"
    other.write_text("other")
    with pytest.raises(DataError, match="was made from another text"):
        make(other)


def test_a_missing_or_short_text_is_refused_by_the_option_that_named_it(tmp_path: Path) -> None:
    options = {"corpus_bytes": 1000, "vocab_size": 400}
    with pytest.raises(DataError, match=r"there is no file '.*absent.txt'; correct --text"):
        make_shards(tmp_path / "a", text=[tmp_path / "absent.txt"], echo=print, **options)
    short = tmp_path / "short.txt"
    short.write_text("one short line\n" * 100)
    with pytest.raises(DataError, match=r"the text has 1,.* bytes, too few for a tokenizer"):
        make_shards(tmp_path / "b", text=[short], echo=print, **options)
    assert not (tmp_path / "b" / "corpus.jsonl").exists()


def test_a_text_of_which_nothing_is_held_out_is_too_short(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("megatron_mup.transfer.sweep.shards.MIN_TEXT_BYTES", 1)
    (tmp_path / "one.txt").write_text("".join(f"word{number} " for number in range(300)), "utf-8")
    with pytest.raises(DataError, match=r"held-out part of the text has 0 tokens.*longer text"):
        make_shards(
            tmp_path / "a",
            text=[tmp_path / "one.txt"],
            corpus_bytes=10_000,
            vocab_size=300,
            echo=print,
        )


def test_cutting_keeps_every_character_and_drops_only_blank_ends() -> None:
    text = "".join(f"line {n}\n" for n in range(2000))
    pieces = list(cut_text(text))
    assert "".join(pieces) == text
    assert max(map(len, pieces)) < 4200
    assert list(cut_text(" \n \n")) == []
