from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from megatron_mup.data.unit_files import (
    ROW,
    UnitFacts,
    UnitKey,
    is_finished,
    read_facts,
    read_unit,
    unit_writer,
)
from megatron_mup.errors import DataError

KEY = UnitKey(3, 14)
FACTS = UnitFacts(
    engine="reference",
    tokens=5,
    lines=4,
    empty_documents=1,
    rejected={"no_field": 1},
    rejected_places=[[3, 70, 2, "no_field", "no key 'text'"]],
    last=True,
    raw_sha256=None,
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    rows = np.zeros(2, ROW)
    rows["length"] = [2, 3]
    rows["digest"] = np.frombuffer(b"\n" * 16 + b"b" * 16, ROW["digest"])
    ids = [np.array([1, 2], "<u2"), np.array([3, 4, 500], "<u2")]
    with unit_writer(tmp_path, KEY) as writer:
        for part in ids:
            writer.add(part)
        writer.finish(FACTS, rows)
    return tmp_path


def test_a_unit_is_read_back_as_it_was_written(folder: Path) -> None:
    assert is_finished(folder, KEY)
    assert not is_finished(folder, UnitKey(3, 15))
    unit = read_unit(folder, KEY, token_bytes=2)
    assert unit.facts == FACTS == read_facts(folder, KEY)
    assert unit.rows["length"].tolist() == [2, 3]
    assert bytes(unit.rows["digest"][0]) == b"\n" * 16
    assert unit.read_ids(np.dtype("<u2")).tolist() == [1, 2, 3, 4, 500]
    assert sorted(path.name for path in folder.iterdir()) == [
        "0000003-0000014.tokens",
        "0000003-0000014.unit",
    ]


@pytest.mark.parametrize(
    ("end", "keep", "message"),
    [
        ("tokens", 8, "expected 10 bytes by its .unit file, found 8"),
        ("unit", -1, "cut or damaged"),
        ("unit", -ROW.itemsize, "cut or damaged"),
        ("unit", 3, "cut or damaged"),
        ("unit", 0, "cut or damaged"),
    ],
)
def test_a_damaged_unit_is_refused(folder: Path, end: str, keep: int, message: str) -> None:
    path = folder / f"{KEY.name}.{end}"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(DataError, match=message):
        read_unit(folder, KEY, token_bytes=2)


def test_ids_that_changed_on_the_disk_are_noticed(folder: Path) -> None:
    path = folder / f"{KEY.name}.tokens"
    path.write_bytes(bytes(10))
    unit = read_unit(folder, KEY, token_bytes=2)
    with pytest.raises(DataError, match=r"0000003-0000014\.tokens: the checksum differs; delete"):
        unit.read_ids(np.dtype("<u2"))
