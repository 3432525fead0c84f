"""Shards know their text by its contents, wherever it lies, and notice another one."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from megatron_mup.errors import DataError
from megatron_mup.transfer.sweep.text_source import check_text, note_text, source_words


@pytest.fixture
def text(tmp_path: Path) -> Path:
    text = tmp_path / "text.txt"
    text.write_text("one two three")
    return text


def folder_of(folder: Path, *text: Path, whole: bool = True) -> Path:
    """A folder whose shards were made of texts, or whose corpus alone was."""
    data = folder / "data"
    data.mkdir()
    note_text(data, text)
    # What a text of one short document becomes.
    lines = [json.dumps({"text": path.read_text()}) + "\n" for path in text]
    (data / "corpus.jsonl").write_text("".join(lines))
    if whole:
        (data / "text.manifest.json").touch()
    return data


@pytest.fixture
def data(tmp_path: Path, text: Path) -> Path:
    return folder_of(tmp_path, text)


def rewrite(text: Path, contents: str) -> None:
    """Other contents, and a time that differs whatever the file system's clock does."""
    text.write_text(contents)
    os.utime(text, ns=(1, 1))


def test_the_same_text_passes_also_when_it_was_copied_renamed_or_moved(
    data: Path, text: Path
) -> None:
    check_text(data, [text])
    rewrite(text, "one two three")
    check_text(data, [text])
    check_text(data, [text.rename(text.with_name("renamed.md"))])


@pytest.mark.parametrize("contents", ["one two thref", "one two three four"])
def test_other_contents_are_refused_whatever_their_size(
    data: Path, text: Path, contents: str
) -> None:
    rewrite(text, contents)
    with pytest.raises(DataError, match=r"text.txt has changed since the shards in .*/data") as one:
        check_text(data, [text])
    assert "leave --text out to go on with them, or choose another --out" in str(one.value)
    assert "delete" not in str(one.value)


def test_another_text_is_told_apart_by_size_and_digest(data: Path, text: Path) -> None:
    other = text.with_name("other.txt")
    other.write_text("four")
    # sha256sum of both texts.
    with pytest.raises(DataError) as raised:
        check_text(data, [other])
    assert str(raised.value).startswith(
        f"{other} is another text than {text}, which the shards in {data} were made of: 4 bytes, "
        "SHA-256 04efaf080f5a, and was 13 bytes, SHA-256 6899ee404683; "
    )


def test_the_order_and_the_number_of_texts_count(tmp_path: Path, text: Path) -> None:
    second = tmp_path / "second.txt"
    second.write_text("two")
    data = folder_of(tmp_path, text, second)
    check_text(data, [text, second])
    with pytest.raises(DataError, match=r"of the same files in another order: .*text.txt, .*/sec"):
        check_text(data, [second, text])
    with pytest.raises(DataError, match=r"made of 2 files \(.*text.txt, .*second.txt\), not of 1"):
        check_text(data, [text])


def test_without_a_text_whole_shards_serve_and_others_ask_for_theirs(
    tmp_path: Path, text: Path
) -> None:
    data = folder_of(tmp_path, text, whole=False)
    with pytest.raises(DataError) as raised:
        check_text(data, [])
    assert str(raised.value) == (
        f"the shards in {data} are not whole, and were begun with the text {text}; give it again "
        "by --text, or choose another --out"
    )
    (data / "text.manifest.json").touch()
    text.unlink()
    check_text(data, [])
    assert source_words(data) == str(text)


def test_a_text_that_is_not_there_is_refused_and_whole_shards_are_named(
    tmp_path: Path, text: Path
) -> None:
    gone = tmp_path / "gone.txt"
    with pytest.raises(DataError, match=r"there is no file '.*gone.txt'; correct --text .make: TE"):
        check_text(tmp_path / "nothing", [gone])
    assert not (tmp_path / "nothing").exists()
    data = folder_of(tmp_path, text)
    with pytest.raises(DataError, match=rf", or leave it out: {data} has shards .* made of {text}"):
        check_text(data, [gone])


def test_installed_sources_are_no_users_text(tmp_path: Path, text: Path) -> None:
    data = folder_of(tmp_path)
    check_text(data, [])
    assert source_words(data) == "installed Python sources"
    with pytest.raises(DataError, match=r"were made of installed Python sources, not of .*text.tx"):
        check_text(data, [text])


def test_many_texts_are_counted_in_words(tmp_path: Path) -> None:
    names = [tmp_path / f"{number}.txt" for number in range(5)]
    for name in names:
        name.write_text("one")
    data = folder_of(tmp_path, *names)
    assert source_words(data) == f"{names[0]}, {names[1]}, {names[2]} and 2 more"


def test_a_text_may_change_while_nothing_is_made_of_it(tmp_path: Path, text: Path) -> None:
    note_text(tmp_path, [text])
    rewrite(text, "other words")
    check_text(tmp_path, [text])
    note_text(tmp_path, [text])
    assert json.loads((tmp_path / "texts.json").read_text())[str(text)]["bytes"] == 11


@pytest.mark.parametrize("lost", [["texts.json"], ["texts.json", "source.json"]])
def test_without_a_note_a_text_is_compared_with_the_corpus(
    data: Path, text: Path, lost: list[str]
) -> None:
    for name in lost:
        (data / name).unlink()
    check_text(data, [])
    check_text(data, [text.rename(text.with_name("renamed.txt"))])
    rewrite(text, "other words")
    with pytest.raises(DataError, match=r"text.txt is not known to be the same; leave --text out"):
        check_text(data, [text])
    rewrite(text, "one two three")
    (data / "corpus.jsonl").unlink()
    with pytest.raises(DataError, match=r"text.txt is not known to be the same"):
        check_text(data, [text])


def test_a_part_of_a_corpus_is_not_the_same_text(tmp_path: Path, text: Path) -> None:
    second = tmp_path / "second.txt"
    second.write_text("two")
    data = folder_of(tmp_path, text, second)
    (data / "texts.json").unlink()
    check_text(data, [text, second])
    for others in ([text], [text, second, second]):
        with pytest.raises(DataError, match=r"not known to be the same"):
            check_text(data, others)
