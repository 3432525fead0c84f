"""A result's label: the version, and the commit only of the package's own repository."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from megatron_mup.revision import revision


def git(folder: Path, *arguments: str) -> None:
    identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
    subprocess.run(["git", *identity, *arguments], cwd=folder, check=True, capture_output=True)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A file in an empty repository, not yet tracked."""
    git(tmp_path, "init")
    path = tmp_path / "source.py"
    path.write_text("one\n")
    return path


def test_a_tracked_file_has_version_and_commit(source: Path) -> None:
    git(source.parent, "add", "source.py")
    git(source.parent, "commit", "-m", "one")
    assert re.fullmatch(r"0\.1\.0-[0-9a-f]{12}", revision(source))


def test_local_changes_are_marked_and_tags_are_left_out(source: Path) -> None:
    git(source.parent, "add", "source.py")
    git(source.parent, "commit", "-m", "one")
    git(source.parent, "tag", "-a", "v9", "-m", "nine")
    source.write_text("two\n")
    assert re.fullmatch(r"0\.1\.0-[0-9a-f]{12}\+", revision(source))


def test_a_repository_that_does_not_track_the_file_is_not_asked(source: Path) -> None:
    (source.parent / "other.py").write_text("other\n")
    git(source.parent, "add", "other.py")
    git(source.parent, "commit", "-m", "other")
    assert revision(source) == "0.1.0"


def test_without_git_the_version_is_left(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    assert revision(source) == "0.1.0"


def test_the_package_itself_has_a_revision() -> None:
    assert revision().startswith("0.1.0")
