"""What counts as seeing a mutant: an assertion that fails in every named test, and nothing else."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.mutants.listing import Mutant
from tests.mutants.run import check_unbroken, judge

_PRODUCT = "def half(number):\n    return number / 2\n"
_TESTS = """
import pytest
import product

@pytest.mark.parametrize("number", [0, 4])
def test_half(number):
    assert product.half(number) == number / 2.0

def test_zero():
    assert product.half(0) == 0

def test_it_divides():
    with pytest.raises(TypeError):
        product.half("4")
"""
_HALF, _ZERO = "test_product.py::test_half", "test_product.py::test_zero"
_FOUR, _DIVIDES = "test_product.py::test_half[4]", "test_product.py::test_it_divides"


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    (tmp_path / "product.py").write_text(_PRODUCT, encoding="utf-8")
    (tmp_path / "test_product.py").write_text(_TESTS, encoding="utf-8")
    return tmp_path


@pytest.mark.parametrize(
    ("old", "new", "seen_by", "complaint"),
    [
        ("/ 2", "/ 3", (_HALF, _FOUR), ""),
        ("/ 2", "* 2", (_DIVIDES,), ""),
        ("/ 2", "/ 3", (_HALF, _ZERO), f"missed by {_ZERO}"),
        # Anything but an assertion is no insight into what is wrong.
        ("number / 2", "nubmer / 2", (_FOUR,), f"missed by {_FOUR} (NameError"),
        ("number / 2", "(", (_FOUR,), f"missed by {_FOUR} (collection failure"),
        ("/ 5", "/ 3", (_FOUR,), "'mutant': its old text occurs 0 times in product.py"),
    ],
)
def test_a_verdict_names_the_tests_that_missed_the_mutant(
    tree: Path, old: str, new: str, seen_by: tuple[str, ...], complaint: str
) -> None:
    verdict = judge(tree, Mutant("mutant", "halves", "product.py", old, new, seen_by))
    assert verdict.complaint.startswith(complaint)
    assert bool(verdict.complaint) is bool(complaint)
    assert (tree / "product.py").read_text(encoding="utf-8") == _PRODUCT


def test_named_tests_must_pass_on_the_unbroken_tree(tree: Path) -> None:
    assert check_unbroken(tree, [_HALF, _ZERO]) == []
    (tree / "product.py").write_text(_PRODUCT.replace("2", "3"), encoding="utf-8")
    assert check_unbroken(tree, [_HALF]) == [f"{_FOUR}: failed"]
