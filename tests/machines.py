"""Stand-ins for the commands of a machine, for the tests of shell scripts."""

from __future__ import annotations

import shutil
from pathlib import Path

COMMANDS = (
    "bash",
    "cat",
    "cmp",
    "cp",
    "dirname",
    "grep",
    "mkdir",
    "mv",
    "rm",
    "sed",
    "sort",
    "tail",
)
"""What the scripts call on every machine."""


def write_script(path: Path, text: str) -> Path:
    """Write a script that may be run, in a folder made for it; returns ``path``."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)
    return path


def link_commands(folder: Path) -> Path:
    """Make a folder for PATH that has ``COMMANDS`` alone, so no Python; returns it."""
    folder.mkdir()
    for name in COMMANDS:
        (folder / name).symlink_to(str(shutil.which(name)))
    return folder
