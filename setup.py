"""Gives setuptools the requirements that stand in requirements.lock.

Everything else about the package is in pyproject.toml. Versions stand in the lock only; this file
picks the direct requirements and the extras out of it by the lock's section headings.
"""

import re
from pathlib import Path

from setuptools import setup

LOCK = Path(__file__).with_name("requirements.lock")
SECTION = re.compile(r"# \[(?P<name>\w+)\]")
EXTRA = re.compile(r"# (?P<name>[\w-]+): (?P<requirement>\S+)")


def read_sections(text: str) -> dict[str, list[str]]:
    """Split a lock file into its sections.

    Args:
        text: The lock's contents; a section starts with a comment such as ``# [direct]``.

    Returns:
        The lines of each section by its name, without blank lines.
    """
    sections: dict[str, list[str]] = {}
    lines: list[str] = []
    for line in text.splitlines():
        if heading := SECTION.match(line):
            lines = sections[heading["name"]] = []
        elif line.strip():
            lines.append(line.strip())
    return sections


def read_extras(sections: dict[str, list[str]]) -> dict[str, list[str]]:
    """Collect the package's extras.

    Args:
        sections: The lock's sections, from ``read_sections``.

    Returns:
        The requirements of each extra by its name; ``dev`` is the lock's section of that name.

    Raises:
        ValueError: A line of the section ``extra`` is not ``# NAME: REQUIREMENT``.
    """
    extras = {"dev": sections["dev"]}
    for line in sections["extra"]:
        if (match := EXTRA.fullmatch(line)) is None:
            raise ValueError(f"{LOCK.name}: expected '# NAME: REQUIREMENT', found {line!r}")
        extras.setdefault(match["name"], []).append(match["requirement"])
    return extras


if __name__ == "__main__":
    lock_sections = read_sections(LOCK.read_text(encoding="utf-8"))
    setup(install_requires=lock_sections["direct"], extras_require=read_extras(lock_sections))
