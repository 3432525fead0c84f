from __future__ import annotations

from pathlib import Path

import pytest

from megatron_mup.data import shard_plan
from megatron_mup.data.shard_plan import Extent, Plan, PlanRequest, plan_shards
from megatron_mup.data.unit_files import UnitKey
from megatron_mup.errors import DataError
from tests.data.corpora import INPUTS, Doc, write_docs


def plan_of(work: Path, units: list[list[int]], shard_tokens: int | None) -> Plan:
    """Plan documents of these lengths, all different and all of the split "train"."""
    docs = {
        UnitKey(0, part): [
            Doc(f"{part} {row}", (1,) * length) for row, length in enumerate(lengths)
        ]
        for part, lengths in enumerate(units)
    }
    return plan_shards(
        PlanRequest(
            units=work / "units",
            keys=write_docs(work, docs),
            token_bytes=2,
            splits=("train",),
            shard_tokens=shard_tokens,
            marks=work / "marks",
            inputs=INPUTS,
        )
    )


# first unit, first row, last unit, stop row, documents, tokens
CASES = {
    "a shard is filled up to its size": (
        [[3, 3], [4, 1]],
        10,
        [(0, 0, 1, 1, 3, 10), (1, 1, 1, 2, 1, 1)],
    ),
    "a document is never cut": ([[6, 5]], 10, [(0, 0, 0, 1, 1, 6), (0, 1, 0, 2, 1, 5)]),
    "a larger document is alone": (
        [[2, 12, 2]],
        10,
        [(0, 0, 0, 1, 1, 2), (0, 1, 0, 2, 1, 12), (0, 2, 0, 3, 1, 2)],
    ),
    "a document without ids begins no shard": (
        [[12, 0], [0, 2, 0]],
        10,
        [(0, 0, 1, 1, 3, 12), (1, 1, 1, 3, 2, 2)],
    ),
    "the first shard has ids too": ([[0, 12]], 10, [(0, 0, 0, 2, 2, 12)]),
    "without a size there is one shard": ([[5], [], [9, 9]], None, [(0, 0, 2, 2, 3, 23)]),
}


@pytest.mark.parametrize("case", CASES)
def test_shards_are_cut_by_the_law(tmp_path: Path, case: str) -> None:
    units, shard_tokens, expected = CASES[case]
    plan = plan_of(tmp_path, units, shard_tokens)
    assert plan.extents == {"train": [Extent(*values) for values in expected]}


def test_units_know_the_number_of_their_first_document(tmp_path: Path) -> None:
    assert plan_of(tmp_path, [[1, 1, 1], [], [1]], None).first_documents == [0, 3, 3]


def test_more_shards_than_names_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shard_plan, "_MOST_SHARDS", 2)
    assert len(plan_of(tmp_path / "two", [[1, 1]], 1).extents["train"]) == 2
    with pytest.raises(DataError, match=r"3 shards .* hold 2; pass a larger --shard-tokens"):
        plan_of(tmp_path / "three", [[1, 1, 1]], 1)


def test_only_the_first_bad_documents_are_named(tmp_path: Path) -> None:
    work = tmp_path / "p.work"
    keys = [UnitKey(0, part) for part in range(3)]
    for key in keys:
        places = [[0, 0, line, "no_field", "x"] for line in range(40)]
        facts = {"lines": 40, "rejected": {"no_field": 40}, "rejected_places": places}
        write_docs(work, {key: [Doc(key.name, (1,))]}, **facts)
    plan = plan_shards(
        PlanRequest(
            units=work / "units",
            keys=keys,
            token_bytes=2,
            splits=("train",),
            shard_tokens=None,
            marks=None,
            inputs=INPUTS,
        )
    )
    assert plan.rejected == {"no_field": 120}
    assert plan.places == [f"a.jsonl:{line}: no_field: x" for line in range(1, 101)]
