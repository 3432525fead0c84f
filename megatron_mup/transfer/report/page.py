"""A document as one page of HTML: figures inline, no script, nothing from the network.

Must not choose words: it only marks up what the document says.
"""

from __future__ import annotations

import html
import re
from collections.abc import Mapping

from megatron_mup.transfer.report.document import (
    Block,
    Bullets,
    Document,
    Figure,
    Heading,
    Paragraph,
    Table,
)

_PIXELS_A_POINT = 1.9
"""At most, so that a figure as wide as a paper's page fills the column."""

# Figures keep white paper in the dark as well: their colors are chosen for it.
_STYLE = """
:root { color-scheme: light dark; --text: #1c1e21; --soft: #5b6068; --line: #d5d8dc;
  --paper: #ffffff; --band: #f4f5f7; }
@media (prefers-color-scheme: dark) {
  :root { --text: #e4e6e9; --soft: #a3a9b1; --line: #3d4249; --paper: #17191c; --band: #202327; }
}
body { margin: 0 auto; padding: 1.5rem 1.25rem 4rem; max-width: 62rem; background: var(--paper);
  color: var(--text); font: 1rem/1.5 system-ui, -apple-system, "Segoe UI", Roboto,
  "DejaVu Sans", sans-serif; }
h1 { font-size: 1.7rem; line-height: 1.25; margin: 0 0 1rem; }
h2 { font-size: 1.25rem; margin: 2.5rem 0 .75rem; padding-bottom: .25rem;
  border-bottom: 1px solid var(--line); }
h3 { font-size: 1.05rem; margin: 1.75rem 0 .5rem; }
p, ul { margin: .6rem 0; max-width: 48rem; overflow-wrap: anywhere; }
li { margin: .3rem 0; }
.table { overflow-x: auto; margin: .75rem 0 1.25rem; }
table { border-collapse: collapse; font-size: .86rem; line-height: 1.4;
  font-variant-numeric: tabular-nums; }
th, td { padding: .35rem .65rem; text-align: left; vertical-align: top;
  border-bottom: 1px solid var(--line); }
th { background: var(--band); font-weight: 600; }
td { min-width: 3rem; }
figure { margin: 1.25rem 0 1.75rem; }
figure svg { display: block; width: 100%; height: auto; box-sizing: border-box; padding: .5rem;
  background: #ffffff; border: 1px solid var(--line); border-radius: 6px; }
figcaption { margin-top: .5rem; max-width: 48rem; color: var(--soft); font-size: .88rem; }
@media print { body { max-width: none; } figure, tr { break-inside: avoid; } }
"""


def to_html(document: Document, drawings: Mapping[str, str]) -> str:
    """Return the document as one self-contained page.

    Args:
        document: what to show.
        drawings: name of each of its figures -> SVG file's text.
    """
    title = html.escape(document.title)
    body = "\n".join(_block(block, drawings) for block in document.blocks)
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        # Without an icon of its own a browser asks the server for one.
        '<link rel="icon" href="data:,">\n'
        f"<title>{title}</title>\n<style>{_STYLE}</style>\n</head>\n"
        f"<body>\n<main>\n<h1>{title}</h1>\n{body}\n</main>\n</body>\n</html>\n"
    )


def _block(block: Block, drawings: Mapping[str, str]) -> str:
    match block:
        case Heading():
            return f"<h{block.level}>{html.escape(block.text)}</h{block.level}>"
        case Paragraph():
            return f"<p>{_paragraph(block)}</p>"
        case Bullets():
            return f"<ul>{''.join(f'<li>{_paragraph(item)}</li>' for item in block.items)}</ul>"
        case Table():
            return _table(block)
        case Figure():
            drawing = inline_svg(drawings[block.name], name=block.name, title=block.alt)
            caption = html.escape(block.caption)
            return f"<figure>\n{drawing}\n<figcaption>{caption}</figcaption>\n</figure>"


def _paragraph(block: Paragraph) -> str:
    lead = f"<strong>{html.escape(block.lead)}</strong> " if block.lead else ""
    return lead + html.escape(block.text)


def _table(block: Table) -> str:
    head = "".join(f'<th scope="col">{html.escape(cell)}</th>' for cell in block.head)
    rows = "\n".join(
        f"<tr>{''.join(f'<td>{_cell(cell)}</td>' for cell in row)}</tr>" for row in block.rows
    )
    # A box of its own that scrolls, so that a wide table does not widen the page.
    table = f"<table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{rows}\n</tbody>\n</table>"
    return f'<div class="table">{table}</div>'


def _cell(text: str) -> str:
    """A cell whose intervals, [low, high], are not broken over two lines."""
    return re.sub(
        r"\[[^][]{1,24}\]", lambda found: found[0].replace(" ", "&nbsp;"), html.escape(text)
    )


def inline_svg(text: str, *, name: str, title: str) -> str:
    """Prepare an SVG file's text for a page that holds several.

    Args:
        text: of the file, as matplotlib writes it.
        name: put before every id: ids of different figures must differ on one page.
        title: what the figure shows.

    Returns:
        The element, without prolog and metadata.
    """
    drawing = text[text.index("<svg") :].strip()
    drawing = re.sub(r"<metadata>.*?</metadata>", "", drawing, flags=re.DOTALL)
    drawing = re.sub(r'(\sid=")', rf"\g<1>{name}-", drawing)
    drawing = re.sub(r'(href="#|url\(#)', rf"\g<1>{name}-", drawing)
    label = html.escape(title, quote=True)
    # Figures of different widths are to have letters of one size.
    width = re.search(r'<svg[^>]* width="([\d.]+)pt"', drawing)
    style = f' style="max-width:{float(width[1]) * _PIXELS_A_POINT:.0f}px"' if width else ""
    return drawing.replace("<svg", f'<svg role="img" aria-label="{label}"{style}', 1)
