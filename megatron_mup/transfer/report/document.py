"""The report's contents as plain blocks, so that Markdown and the page say the same words.

Owns the blocks only: what they say is made elsewhere, and neither files nor figures are touched.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Heading:
    """A heading; level 2 is a chapter, level 3 a section of it."""

    text: str
    level: int = 2


@dataclass(frozen=True)
class Paragraph:
    """A paragraph.

    Attributes:
        text: plain text.
        lead: first words, shown bold; empty for none.
    """

    text: str
    lead: str = ""


@dataclass(frozen=True)
class Bullets:
    """A list of paragraphs."""

    items: tuple[Paragraph, ...]


@dataclass(frozen=True)
class Table:
    """A table of plain text; every row has as many cells as the head."""

    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class Figure:
    """A figure that lies in the report's folder.

    Attributes:
        name: of its files, ``figures/NAME.svg`` and ``figures/NAME.png``.
        alt: what it shows, for those who cannot see it.
        caption: what its marks mean.
    """

    name: str
    alt: str
    caption: str


Block = Heading | Paragraph | Bullets | Table | Figure


@dataclass(frozen=True)
class Document:
    """A whole report."""

    title: str
    blocks: tuple[Block, ...]
