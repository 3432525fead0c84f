"""The code that a run is made by: its git checkout, or the installed package; nothing is masked.

Asks git, with a time limit, and the scheduler for the batch script. Must not import torch or
megatron.
"""

from __future__ import annotations

import hashlib
import io
import subprocess
import tarfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from megatron_mup.revision import revision
from megatron_mup.secrets import is_secret_file

_PACKAGE = Path(__file__).parent.parent
_SECONDS = 60
"""For one call of git or the scheduler; a hanging disk must not hold the run for ever."""
_LARGEST_DIFFERENCE = 16_000_000
"""Characters of uncommitted changes that are kept."""
_MOST_NAMES = 100
_NAMES_AT_A_TIME = 500


@dataclass(frozen=True, kw_only=True)
class SourceCode:
    """Where the code is and in which state.

    Attributes:
        root: the checkout, or the folder of the installed package.
        commit: of the checkout; None for an installed package.
        difference: of tracked files to the commit; None without commit or difference.
        untracked: names of files that git neither tracks nor ignores.
        origin: address of the repository that it was cloned from.
        revision: version and commit.
        lock: text of ``requirements.lock``; None without one.
    """

    root: Path
    commit: str | None
    difference: str | None
    untracked: tuple[str, ...]
    origin: str | None
    revision: str
    lock: str | None

    @property
    def identity(self) -> str:
        """Digest of what would be run."""
        parts = [self.commit or self.revision, self.difference or "", *self.untracked]
        return hashlib.sha256("\0".join(parts).encode("utf-8", "surrogateescape")).hexdigest()

    def files(self) -> Iterator[tuple[str, bytes, int]]:
        """Name, content and permission bits of every file of the commit or the package."""
        if self.commit is None:
            for path in sorted(self.root.rglob("*")):
                if path.is_file() and "__pycache__" not in path.parts:
                    name = f"{self.root.name}/{path.relative_to(self.root)}"
                    yield name, path.read_bytes(), path.stat().st_mode & 0o777
            return
        packed = _git(self.root, "archive", "--format=tar", self.commit)
        with tarfile.open(fileobj=io.BytesIO(packed)) as archive:
            for member in archive:
                stream = archive.extractfile(member) if member.isfile() else None
                if stream is not None:
                    yield member.name, stream.read(), member.mode


def find_source_code(package: Path = _PACKAGE) -> SourceCode:
    """Look at the code of this package.

    Args:
        package: folder of the package, or a stand-in.
    """
    source = package / "__init__.py"
    try:
        # A package that is installed inside of somebody's repository is not of that repository.
        _git(package, "ls-files", "--error-unmatch", source.name)
        root = Path(_git(package, "rev-parse", "--show-toplevel").decode().strip())
        commit = _git(root, "rev-parse", "HEAD").decode().strip()
        names = _names(root, "diff", "HEAD", "--name-only", "-z")
        untracked = _names(root, "ls-files", "--others", "--exclude-standard", "-z")
    except (OSError, subprocess.SubprocessError):
        return SourceCode(
            root=package,
            commit=None,
            difference=None,
            untracked=(),
            origin=None,
            revision=revision(source),
            lock=None,
        )
    changed = [name for name in names if not is_secret_file(name)]
    lock = root / "requirements.lock"
    return SourceCode(
        root=root,
        commit=commit,
        difference=_difference(root, changed) if changed else None,
        untracked=tuple(untracked[:_MOST_NAMES]),
        origin=_origin(root),
        revision=revision(source),
        lock=lock.read_text(encoding="utf-8", errors="replace") if lock.is_file() else None,
    )


def _difference(root: Path, names: list[str]) -> str:
    # Without --binary: nobody can look for secrets in the encoding of a changed binary file.
    arguments = ("diff", "HEAD", "--no-color", "--no-ext-diff", "--")
    parts = [
        _git(root, *arguments, *names[start : start + _NAMES_AT_A_TIME])
        for start in range(0, len(names), _NAMES_AT_A_TIME)
    ]
    text = b"".join(parts).decode("utf-8", errors="replace")
    if len(text) <= _LARGEST_DIFFERENCE:
        return text
    return f"{text[:_LARGEST_DIFFERENCE]}\n(cut: {len(text)} characters)\n"


def _origin(root: Path) -> str | None:
    try:
        return _git(root, "remote", "get-url", "origin").decode().strip()
    except (OSError, subprocess.SubprocessError):
        return None


def _names(root: Path, *arguments: str) -> list[str]:
    listed = _git(root, *arguments).decode("utf-8", errors="replace")
    return [name for name in listed.split("\0") if name]


def _git(folder: Path, *arguments: str) -> bytes:
    done = subprocess.run(
        ["git", *arguments], cwd=folder, capture_output=True, check=True, timeout=_SECONDS
    )
    return done.stdout


def scheduled_job(environment: Mapping[str, str]) -> tuple[str | None, str | None]:
    """The batch script and the scheduler's record of this job, if there is one.

    Args:
        environment: of the batch script.

    Returns:
        Script and record; None for what cannot be had.
    """
    job = environment.get("SLURM_JOB_ID")
    if job is None:
        return None, None
    return (
        _scontrol("write", "batch_script", job, "-"),
        _scontrol("show", "job", job),
    )


def _scontrol(*arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["scontrol", *arguments],
            capture_output=True,
            text=True,
            errors="replace",
            check=True,
            timeout=_SECONDS,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout
