"""Corpus, tokenizer and shards of a sweep's own text."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from megatron_mup.errors import DataError
from megatron_mup.transfer.sweep.shards import make_shards


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Shards of a text, and that text; no test changes them."""
    folder = tmp_path_factory.mktemp("made")
    text = folder / "text.txt"
    text.write_text("\n".join(f"line {n} of a text, {n * n} squared." for n in range(8000)))
    return make(folder / "data", text), text


def make(
    folder: Path,
    *text: Path,
    corpus_bytes: int = 1000,
    vocab_size: int = 400,
    lines: list[str] | None = None,
) -> Path:
    return make_shards(
        folder,
        text=text,
        corpus_bytes=corpus_bytes,
        vocab_size=vocab_size,
        echo=[].append if lines is None else lines.append,
    )


def test_a_users_text_becomes_shards_once_and_another_text_is_refused(
    made: tuple[Path, Path], tmp_path: Path
) -> None:
    folder, text = made
    assert (folder / "text_train.idx").exists()
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    lines: list[str] = []
    make(folder, text, lines=lines)
    assert [line.split(":")[0] for line in lines] == ["shards"]
    other = tmp_path / "other.txt"
    other.write_text("other")
    with pytest.raises(
        DataError, match=r"other.txt is another text than .*text.txt, which the sha"
    ):
        make(folder, other)
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == before


def test_shards_that_are_whole_need_no_text_and_say_which_one_they_are_of(
    made: tuple[Path, Path], tmp_path: Path
) -> None:
    folder, text = made
    lines: list[str] = []
    # Whatever it was made of: installed text of any size is not asked for.
    make(folder, corpus_bytes=2000, lines=lines)
    assert lines[0] == f"text: {text}, which the shards in {folder} are made of"
    copied = tmp_path / "moved" / "data"
    shutil.copytree(folder, copied)
    shutil.copy(text, tmp_path / "copy.txt")
    make(copied, tmp_path / "copy.txt")


def test_a_vocabulary_is_refused_only_where_there_is_a_tokenizer(
    made: tuple[Path, Path], tmp_path: Path
) -> None:
    folder, text = made
    with pytest.raises(
        DataError, match=r"with text\.vocab_size 400, not 300; choose another --out"
    ):
        make(folder, text, vocab_size=300)
    begun = tmp_path / "begun"
    # More pieces than the text has: the corpus is there, and the tokenizer is not.
    with pytest.raises(DataError, match="vocab"):
        make(begun, text, vocab_size=50_000)
    assert (begun / "corpus.jsonl").exists()
    make(begun, text, vocab_size=400)
    assert (begun / "text_train.bin").read_bytes() == (folder / "text_train.bin").read_bytes()


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
    with pytest.raises(
        DataError, match=r"2,000 tokens are to be held out .*at most half are.*longer text"
    ):
        make_shards(
            tmp_path / "a",
            text=[tmp_path / "one.txt"],
            corpus_bytes=10_000,
            vocab_size=300,
            echo=print,
        )
