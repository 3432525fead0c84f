"""Sections of the page of benchmarks that commands write, each its own, and leave to each other.

A section begins with a line that names its command (its *mark*) and ends where the next begins.
"""

from __future__ import annotations

import re

_ANY_MARK = re.compile(r"^<!-- \w+: written by [^\n]* -->$", re.MULTILINE)


def with_section(page: str, mark: str, section: str) -> str:
    """Put a section in place of the one with its mark, or at the end of a page that has none.

    Args:
        page: the page as it is; may be empty.
        mark: first line of the section.
        section: its text, from the mark on.
    """
    before, _, rest = page.partition(mark)
    following = _ANY_MARK.search(rest)
    parts = [before.rstrip(), section.rstrip(), rest[following.start() :] if following else ""]
    return "\n\n".join(part for part in parts if part).rstrip() + "\n"


def sections_of(page: str) -> str:
    """All marked sections of a page, as they are; empty if it has none."""
    first = _ANY_MARK.search(page)
    return page[first.start() :] if first else ""
