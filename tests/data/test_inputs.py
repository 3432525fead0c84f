from __future__ import annotations

import gzip
import hashlib
import logging
import os
from pathlib import Path

import pytest

from megatron_mup.data.inputs import Compression, InputFile, InputFormat, find_inputs, fingerprint
from megatron_mup.errors import DataError
from tests.data.written_shards import write_shard


def make(folder: Path, *names: str) -> None:
    """Empty files, compressed or Parquet-like ones with the first bytes that they must have."""
    heads = {".gz": gzip.compress(b""), ".zst": b"\x28\xb5\x2f\xfd", ".xz": b"\xfd7zXZ\0"}
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"PAR1" if path.suffix == ".parquet" else heads.get(path.suffix, b""))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("a.jsonl", ("jsonl", "none")),
        ("a.JSON.GZ", ("jsonl", "gzip")),
        ("a.ndjson.zst", ("jsonl", "zstd")),
        ("a.txt.xz", ("text", "xz")),
        ("a.parquet", ("parquet", "none")),
        ("README", ("text", "none")),
        ("a.html.gz", ("text", "gzip")),
    ],
)
def test_the_suffix_says_format_and_compression(
    tmp_path: Path, name: str, expected: tuple[str, str]
) -> None:
    suffix = Path(name).suffix.lower()
    make(tmp_path, f"made{suffix}")
    path = (tmp_path / f"made{suffix}").rename(tmp_path / name)
    [found] = find_inputs([path])
    assert (found.format, found.compression) == expected
    assert (found.name, found.path, found.size_bytes) == (str(path), path, path.stat().st_size)


def test_a_given_format_overrides_the_suffix_but_not_the_compression(tmp_path: Path) -> None:
    make(tmp_path, "a.txt.gz", "b.json")
    found = find_inputs(
        [tmp_path / "a.txt.gz", tmp_path / "b.json"], input_format=InputFormat.JSONL
    )
    assert [(f.format, f.compression) for f in found] == [("jsonl", "gzip"), ("jsonl", "none")]
    [text] = find_inputs([tmp_path / "b.json"], input_format=InputFormat.TEXT)
    assert text.format is InputFormat.TEXT


def test_a_folder_gives_its_visible_files_with_known_suffixes_sorted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    make(tmp_path, "b/2.jsonl", "b/1.jsonl.gz", "a.txt", "c.parquet", "notes.md", "x.rst")
    make(tmp_path, ".hidden/3.jsonl", "b/.4.jsonl", "b/logo.png", "b/5.jsonl.gz.tmp")
    with caplog.at_level(logging.WARNING):
        names = [Path(f.name).relative_to(tmp_path).as_posix() for f in find_inputs([tmp_path])]
    assert names == ["a.txt", "b/1.jsonl.gz", "b/2.jsonl", "c.parquet", "notes.md", "x.rst"]
    assert "2 files with other suffixes are left out" in caplog.text


def test_links_to_folders_are_followed_once(tmp_path: Path) -> None:
    make(tmp_path, "in/a.txt", "elsewhere/b.txt")
    (tmp_path / "in" / "link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "in" / "circle").symlink_to(tmp_path / "in")
    assert [Path(f.name).name for f in find_inputs([tmp_path / "in"])] == ["a.txt", "b.txt"]


def test_globs_are_sorted_cross_folders_and_take_any_suffix(tmp_path: Path) -> None:
    make(tmp_path, "z/10.py", "z/9.py", "z/y/1.py", "z/y/1.txt", "a.py")
    found = find_inputs([f"{tmp_path}/**/*.py"])
    names = [Path(f.name).relative_to(tmp_path).as_posix() for f in found]
    assert names == ["a.py", "z/10.py", "z/9.py", "z/y/1.py"]
    assert [Path(f.name).name for f in find_inputs([f"{tmp_path}/z/*"])] == ["10.py", "9.py"]


def test_a_file_whose_name_looks_like_a_glob_is_that_file(tmp_path: Path) -> None:
    make(tmp_path, "a[1].txt", "a1.txt")
    assert [Path(f.name).name for f in find_inputs([tmp_path / "a[1].txt"])] == ["a[1].txt"]


def test_inputs_keep_the_order_in_which_they_were_named(tmp_path: Path) -> None:
    make(tmp_path, "b.txt", "a.txt", "d/c.txt")
    found = find_inputs([tmp_path / "b.txt", "-", tmp_path / "d", tmp_path / "a.txt"])
    assert [Path(f.name).name for f in found] == ["b.txt", "-", "c.txt", "a.txt"]
    assert found[1] == InputFile(
        name="-", format=InputFormat.JSONL, compression=Compression.NONE, size_bytes=None
    )


def test_a_file_named_twice_is_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    make(tmp_path, "a.txt")
    (tmp_path / "b.txt").symlink_to(tmp_path / "a.txt")
    with caplog.at_level(logging.WARNING):
        assert len(find_inputs([tmp_path / "a.txt", tmp_path / "b.txt"])) == 2
    assert "a.txt and" in caplog.text
    assert "are the same file" in caplog.text


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b"\x1f\x8b\x08\0", r"a\.jsonl is gzip, not jsonl; rename it to end in \.gz"),
        ("a.txt", b"\x28\xb5\x2f\xfd", r"a\.txt is zstd, not text; rename it to end in \.zst"),
        ("a.txt", b"\x52\x2a\x4d\x18", r"a\.txt is zstd, not text"),
        ("a.json", b"PAR1", r"is Parquet, not jsonl; .*\.parquet or pass --input-format parquet"),
        ("a.jsonl", b"BZh91AY", r"is bzip2, not jsonl; convert it"),
        ("a.txt", "\ufeffhello".encode("utf-16-le"), r"is UTF-16, not text; convert it"),
        ("a.jsonl.gz", b'{"text"', r"a\.jsonl\.gz is named as gzip but begins with the bytes 7b"),
        ("a.jsonl.gz", b"", r"named as gzip but is empty"),
        ("a.jsonl.gz", b"\xfd7zXZ\0", r"is xz, not gzip; rename it to end in \.xz"),
        ("a.parquet", b"text", r"named as Parquet but begins with the bytes 74 65 78 74"),
        ("a.parquet", b"PARE", r"is encrypted Parquet, not Parquet; convert it"),
        ("a.parquet.gz", b"\x1f\x8b", r"compressed Parquet, .*; decompress it"),
        ("a.tar.gz", b"\x1f\x8b", r"archive of files; unpack it"),
        ("a.tar", b"x", r"archive of files; unpack it"),
    ],
)
def test_a_file_that_is_not_what_its_suffix_says_is_refused(
    tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        find_inputs([tmp_path / name])


def test_what_cannot_be_read_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no input file; pass --input"):
        find_inputs([])
    with pytest.raises(DataError, match=r"cannot read input .*gone\.txt: No such file.*--input"):
        find_inputs([tmp_path / "gone.txt"])
    with pytest.raises(DataError, match=r"no file matches the input .*\*\.jsonl"):
        find_inputs([tmp_path / "*.jsonl"])
    make(tmp_path, "only/logo.png", "folder/x.txt")
    with pytest.raises(DataError, match=r"without files to read \(1 with other suffixes"):
        find_inputs([tmp_path / "only"])
    with pytest.raises(DataError, match="no file matches"):
        find_inputs([tmp_path / "fold*"])
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(DataError, match=r"not a regular file; pipe it to standard input"):
        find_inputs([tmp_path / "pipe"])


def test_token_shards_are_not_taken_for_text(tmp_path: Path) -> None:
    write_shard(tmp_path / "s_train", [[5, 6, 2]])
    for named in ("s_train.bin", "s_train.idx", "s_*"):
        with pytest.raises(DataError, match=r"belongs to the token shard .*/s_train, which is"):
            find_inputs([tmp_path / named])
    with pytest.raises(DataError, match="belongs to the token shard"):
        find_inputs([tmp_path / "s_train.bin"], input_format=InputFormat.JSONL)


def test_other_files_may_have_the_suffixes_of_shards(tmp_path: Path) -> None:
    make(tmp_path, "a.bin", "b.bin", "b.idx")
    names = ["a.bin", "b.bin", "b.idx"]
    found = find_inputs([tmp_path / name for name in names])
    assert [Path(file.name).name for file in found] == names


def test_standard_input_is_taken_once_and_never_as_parquet() -> None:
    assert find_inputs(["-"], input_format=InputFormat.TEXT)[0].format is InputFormat.TEXT
    with pytest.raises(DataError, match=r"named more than once; pass --input - once"):
        find_inputs(["-", "-"])
    with pytest.raises(DataError, match="Parquet cannot be read from standard input"):
        find_inputs(["-"], input_format=InputFormat.PARQUET)


def test_the_fingerprint_covers_size_beginning_and_end(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    content = bytes(range(256)) * 1024
    path.write_bytes(content)
    [file] = find_inputs([path])
    expected = hashlib.sha256(b"262144\n" + content[:65536] + content[-65536:]).hexdigest()
    assert fingerprint(file) == expected
    for place in (0, 65535, -65536, -1):
        changed = bytearray(content)
        changed[place] ^= 1
        path.write_bytes(changed)
        assert fingerprint(file) != expected
    assert fingerprint(find_inputs(["-"])[0]) == "-"
    path.unlink()
    with pytest.raises(DataError, match="cannot read input"):
        fingerprint(file)
