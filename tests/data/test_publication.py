from __future__ import annotations

from pathlib import Path

import pytest

from megatron_mup.data.publication import check_writable, publish_text, published
from megatron_mup.errors import DataError


def test_a_file_appears_only_when_it_is_complete(tmp_path: Path) -> None:
    target = tmp_path / "out.bin"
    with published(target) as stream:
        stream.write(b"whole")
        assert not target.exists()
    assert target.read_bytes() == b"whole"
    assert [path.name for path in tmp_path.iterdir()] == ["out.bin"]


def test_a_failure_leaves_the_old_file_and_no_other(tmp_path: Path) -> None:
    target = tmp_path / "out.bin"
    target.write_bytes(b"old")

    def fail_half_way() -> None:
        with published(target) as stream:
            stream.write(b"half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail_half_way()
    assert target.read_bytes() == b"old"
    assert [path.name for path in tmp_path.iterdir()] == ["out.bin"]


def test_text_replaces_the_old_file_at_once(tmp_path: Path) -> None:
    target = tmp_path / "page.md"
    target.write_text("old and longer")
    publish_text(target, "n\u00e9w\n")
    assert target.read_bytes() == b"n\xc3\xa9w\n"
    assert [path.name for path in tmp_path.iterdir()] == ["page.md"]


def test_existing_output_needs_overwrite(tmp_path: Path) -> None:
    target = tmp_path / "out.bin"
    target.touch()
    with pytest.raises(DataError, match=r"output exists: .*out\.bin; pass --overwrite"):
        check_writable([target], overwrite=False, option="--output-prefix")
    check_writable([target], overwrite=True, option="--output-prefix")


def test_a_folder_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    # Below a file no folder can be made, not even by root.
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match=r"cannot write to the folder .*file/sub of --output"):
        check_writable([tmp_path / "file/sub/x.bin"], overwrite=False, option="--output-prefix")
    with pytest.raises(DataError, match="is a folder"):
        check_writable([tmp_path], overwrite=True, option="--output-prefix")


def test_missing_folders_are_made_and_left_empty(tmp_path: Path) -> None:
    check_writable([tmp_path / "a/b/x.bin"], overwrite=False, option="--output-prefix")
    assert list((tmp_path / "a/b").iterdir()) == []
