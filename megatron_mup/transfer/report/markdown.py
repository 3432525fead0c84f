"""A document as Markdown, for a terminal, a repository or a merge request.

Must not choose words: it only marks up what the document says.
"""

from __future__ import annotations

import re

from megatron_mup.transfer.report.document import (
    Block,
    Bullets,
    Document,
    Figure,
    Heading,
    Paragraph,
    Table,
)

# Names come from users' files: in a table a bar would open a cell, and the others start markup.
_SPECIAL = re.compile(r"([\\|*`]|\](?=\())")


def to_markdown(document: Document) -> str:
    """Return the document as GitHub's Markdown.

    Args:
        document: with figures in ``figures/`` beside the text.
    """
    parts = [f"# {_escaped(document.title)}", *(_block(block) for block in document.blocks)]
    return "\n\n".join(parts) + "\n"


def _block(block: Block) -> str:
    match block:
        case Heading():
            return f"{'#' * block.level} {_escaped(block.text)}"
        case Paragraph():
            return _paragraph(block)
        case Bullets():
            return "\n".join(f"- {_paragraph(item)}" for item in block.items)
        case Table():
            return table_text(block)
        case Figure():
            image = f"![{_escaped(block.alt)}](figures/{block.name}.png)"
            return f"{image}\n\n{_escaped(block.caption)}"


def _paragraph(block: Paragraph) -> str:
    text = _escaped(block.text)
    return f"**{_escaped(block.lead)}** {text}" if block.lead else text


def table_text(block: Table) -> str:
    """A table alone."""
    """A table alone."""
    lines = [_row(block.head), "|" + "---|" * len(block.head)]
    return "\n".join([*lines, *(_row(row) for row in block.rows)])


def _row(cells: tuple[str, ...]) -> str:
    return f"| {' | '.join(_escaped(cell) for cell in cells)} |"


def _escaped(text: str) -> str:
    return _SPECIAL.sub(r"\\\1", " ".join(text.split())).replace("<", "&lt;")
