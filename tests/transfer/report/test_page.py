"""A document as a page of HTML."""

from html.parser import HTMLParser

from megatron_mup.transfer.report.document import (
    Bullets,
    Document,
    Figure,
    Heading,
    Paragraph,
    Table,
)
from megatron_mup.transfer.report.page import inline_svg, to_html

SVG = """<?xml version="1.0"?>
<!DOCTYPE svg PUBLIC "-//W3C//DTD SVG 1.1//EN" "http://www.w3.org/x.dtd">
<svg width="100pt" viewBox="0 0 1 1"><metadata><a/>
</metadata><defs><path id="m1"/></defs><g id="g1" clip-path="url(#c1)"><use xlink:href="#m1"/></g>
</svg>
"""


class Outline(HTMLParser):
    """Tags and texts of a page."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.texts: list[str] = []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)

    def handle_data(self, data):
        self.texts.append(data)


def outline(text: str) -> Outline:
    found = Outline()
    found.feed(text)
    return found


def test_a_drawing_keeps_its_own_references_when_several_share_a_page():
    assert inline_svg(SVG, name="arms", title='a "b"') == (
        '<svg role="img" aria-label="a &quot;b&quot;" style="max-width:190px" '
        'width="100pt" viewBox="0 0 1 1">'
        '<defs><path id="arms-m1"/></defs><g id="arms-g1" clip-path="url(#arms-c1)">'
        '<use xlink:href="#arms-m1"/></g>\n</svg>'
    )


def test_the_page_has_every_block_and_neither_script_nor_links():
    blocks = (
        Heading("What", 3),
        Paragraph("It stays.", "mup: transfers."),
        Bullets((Paragraph("one"), Paragraph("two"))),
        Table(("width", "loss"), (("64", "3.1"), ("128", "2.9"))),
        Figure("arms", "Arms", "Two arms."),
    )

    page = outline(to_html(Document("Widths", blocks), {"arms": SVG}))

    assert [
        page.tags.count(tag) for tag in ("h1", "h3", "li", "th", "td", "svg", "figcaption")
    ] == [
        1,
        1,
        2,
        2,
        4,
        1,
        1,
    ]
    assert {"mup: transfers.", "Two arms.", "2.9"} <= set(page.texts)
    assert not {"script", "img", "iframe", "a"} & set(page.tags)


def test_intervals_are_not_broken_over_lines():
    table = Table(("loss",), (("3.4033 [3.3943, 3.4124] and on",),))

    assert "<td>3.4033 [3.3943,&nbsp;3.4124] and on</td>" in to_html(Document("T", (table,)), {})


def test_names_of_users_are_text():
    blocks = (
        Heading("<b>h"),
        Paragraph("<b>p", "<b>lead"),
        Table(("<b>head",), (("<b>cell",),)),
        Figure("arms", "<b>alt", "<b>caption"),
    )

    page = outline(to_html(Document("</title><b>", blocks), {"arms": SVG}))

    assert "b" not in page.tags
    assert {"<b>h", "<b>p", "<b>head", "<b>cell", "<b>caption"} <= {t.strip() for t in page.texts}
