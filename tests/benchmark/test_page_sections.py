"""Each command replaces its own section of the page of benchmarks."""

from __future__ import annotations

from megatron_mup.benchmark import conversion_report, preprocessing_report
from megatron_mup.benchmark.page_sections import sections_of, with_section

FIRST = "<!-- alpha: written by python -m some.alpha -->"
SECOND = "<!-- beta: written by python -m some.beta -->"
PAGE = f"# Steps\n\ntext\n\n{FIRST}\n\n# A\n\nold a\n\n{SECOND}\n\n# B\n\nold b\n"


def test_a_section_is_replaced_where_it_is_and_all_others_stay() -> None:
    assert with_section(PAGE, FIRST, f"{FIRST}\n\nnew a\n") == (
        f"# Steps\n\ntext\n\n{FIRST}\n\nnew a\n\n{SECOND}\n\n# B\n\nold b\n"
    )
    assert with_section(PAGE, SECOND, f"{SECOND}\n\nnew b\n") == (
        f"# Steps\n\ntext\n\n{FIRST}\n\n# A\n\nold a\n\n{SECOND}\n\nnew b\n"
    )


def test_a_section_that_is_not_there_goes_to_the_end() -> None:
    assert with_section("# Steps\n\n", FIRST, f"{FIRST}\n\nnew\n") == f"# Steps\n\n{FIRST}\n\nnew\n"
    assert with_section("", FIRST, f"{FIRST}\n\nnew\n") == f"{FIRST}\n\nnew\n"


def test_sections_begin_at_the_first_mark() -> None:
    assert sections_of(PAGE) == PAGE.removeprefix("# Steps\n\ntext\n\n")
    assert sections_of("# Steps <!-- no mark -->\n") == ""


def test_the_marks_of_the_commands_are_marks() -> None:
    for mark in (conversion_report.MARK, preprocessing_report.MARK):
        assert sections_of(f"before\n{mark}\n") == f"{mark}\n"
