"""The list of mutants cannot rot: its texts are in the package, and its tests exist."""

from __future__ import annotations

import ast
from functools import cache

import pytest

from tests.mutants.listing import ROOT, Mutant, read_mutants

MUTANTS = read_mutants()


@cache
def functions_of(file: str) -> set[str]:
    """Names of the functions of a test file."""
    tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


def test_there_are_at_least_thirty_mutants_and_no_two_are_the_same() -> None:
    assert len(MUTANTS) >= 30
    assert len({mutant.name for mutant in MUTANTS}) == len(MUTANTS)
    texts = {(ROOT / mutant.file).read_text(encoding="utf-8") for mutant in MUTANTS}
    results = {
        (mutant.file, mutant.applied((ROOT / mutant.file).read_text(encoding="utf-8")))
        for mutant in MUTANTS
    }
    assert len(results) == len(MUTANTS)
    assert not texts & {text for _, text in results}


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_a_mutant_has_one_place_in_the_package_and_stays_python(mutant: Mutant) -> None:
    assert mutant.file.startswith("megatron_mup/")
    ast.parse(mutant.applied((ROOT / mutant.file).read_text(encoding="utf-8")))


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_the_tests_that_must_see_a_mutant_exist(mutant: Mutant) -> None:
    assert mutant.seen_by
    for named in mutant.seen_by:
        file, _, test = named.partition("::")
        assert test.partition("[")[0] in functions_of(file), named


@pytest.mark.parametrize("text", ["", "old old"])
def test_a_text_that_is_gone_or_there_twice_is_refused(text: str) -> None:
    mutant = Mutant("m", "b", "megatron_mup/cli.py", "old", "new", ("t",))
    assert mutant.applied("an old text") == "an new text"
    with pytest.raises(LookupError, match=r"occurs [02] times in megatron_mup/cli\.py"):
        mutant.applied(text)
