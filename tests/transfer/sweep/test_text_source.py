"""A text that has changed since shards were made of it is noticed."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from megatron_mup.errors import DataError
from megatron_mup.transfer.sweep.text_source import check_same_text


@pytest.fixture
def text(tmp_path: Path) -> Path:
    text = tmp_path / "text.txt"
    text.write_text("one two three")
    return text


@pytest.fixture
def data(tmp_path: Path, text: Path) -> Path:
    """A folder whose shards were made of the text."""
    data = tmp_path / "data"
    check_same_text(data, [text])
    (data / "corpus.jsonl").touch()
    return data


def rewrite(text: Path, contents: str) -> None:
    """Other contents, and a time that differs whatever the file system's clock does."""
    text.write_text(contents)
    os.utime(text, ns=(1, 1))


def test_the_same_text_passes_also_when_it_was_copied(data: Path, text: Path) -> None:
    check_same_text(data, [text])
    rewrite(text, "one two three")
    check_same_text(data, [text])


@pytest.mark.parametrize("contents", ["one two thref", "one two three four"])
def test_other_contents_are_refused_whatever_their_size(
    data: Path, text: Path, contents: str
) -> None:
    rewrite(text, contents)
    with pytest.raises(DataError, match=r"text.txt has changed since the shards in .*/data"):
        check_same_text(data, [text])


def test_a_text_may_change_while_nothing_is_made_of_it(tmp_path: Path, text: Path) -> None:
    check_same_text(tmp_path / "data", [text])
    rewrite(text, "other words")
    check_same_text(tmp_path / "data", [text])
    noted = json.loads((tmp_path / "data/texts.json").read_text())
    assert noted[str(text)]["bytes"] == 11


def test_shards_without_a_note_and_texts_that_are_no_files_are_left_alone(
    data: Path, text: Path
) -> None:
    check_same_text(data, [text.parent, text.with_name("*.txt")])
    (data / "texts.json").unlink()
    rewrite(text, "other words")
    check_same_text(data, [text])
