"""A document as Markdown."""

from megatron_mup.transfer.report.document import (
    Bullets,
    Document,
    Figure,
    Heading,
    Paragraph,
    Table,
)
from megatron_mup.transfer.report.markdown import to_markdown


def test_every_kind_of_block_becomes_markdown():
    document = Document(
        "Widths",
        (
            Heading("What"),
            Paragraph("It stays.", "mup: transfers."),
            Bullets((Paragraph("one"), Paragraph("two", "sp:"))),
            Table(("width", "loss"), (("64", "3.1"),)),
            Figure("arms", "Arms", "Two arms."),
        ),
    )

    assert to_markdown(document) == (
        "# Widths\n\n"
        "## What\n\n"
        "**mup: transfers.** It stays.\n\n"
        "- one\n- **sp:** two\n\n"
        "| width | loss |\n|---|---|\n| 64 | 3.1 |\n\n"
        "![Arms](figures/arms.png)\n\n"
        "Two arms.\n"
    )


def test_names_of_users_open_no_cell_and_no_markup():
    table = Table(("arm",), (("a|b*c<script>\nd",),))

    text = to_markdown(Document("[x](y)", (table,)))

    assert "| a\\|b\\*c&lt;script> d |" in text
    assert text.startswith("# [x\\](y)\n")
