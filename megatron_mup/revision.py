"""Which version and commit of this package made a result."""

from __future__ import annotations

import subprocess
from pathlib import Path

from megatron_mup import __version__

_SOURCE = Path(__file__)


def revision(source: Path = _SOURCE) -> str:
    """Version and, in a checkout of the package, commit.

    Args:
        source: a source file of the package; its repository is asked.

    Returns:
        ``0.1.0-0123456789ab``, with a final ``+`` when tracked files differ from the commit; the
        version alone without git, or for an installed package.
    """
    try:
        # An installed package may lie inside a repository that is not its own (a project's
        # virtual environment); only a repository that tracks the file is asked for its commit.
        _git(source, "ls-files", "--error-unmatch", source.name)
        # Tags are left out: the version stands in front already.
        commit = _git(
            source, "describe", "--always", "--dirty=+", "--abbrev=12", "--exclude=*"
        ).strip()
    except (OSError, subprocess.SubprocessError):
        return __version__
    return f"{__version__}-{commit}"


def _git(source: Path, *arguments: str) -> str:
    # The limit is for a repository on a hanging network disk: a result must not wait for its label.
    done = subprocess.run(
        ["git", *arguments],
        cwd=source.parent,
        capture_output=True,
        text=True,
        check=True,
        timeout=10,
    )
    return done.stdout
