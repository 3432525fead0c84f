from __future__ import annotations

import dataclasses
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from megatron_mup.data.inputs import Compression, InputFile, InputFormat, find_inputs
from megatron_mup.data.unit_files import UnitKey
from megatron_mup.data.units import (
    LinesTask,
    RowsTask,
    StreamTask,
    TextsTask,
    choose_unit_bytes,
    plan_tasks,
)


def test_a_plain_file_is_cut_into_ranges_of_its_bytes(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b"x" * 250)
    tasks = list(plan_tasks(find_inputs([tmp_path / "a.jsonl"]), unit_bytes=100))
    assert all(isinstance(task, LinesTask) for task in tasks)
    assert [(t.key, t.start, t.stop) for t in tasks if isinstance(t, LinesTask)] == [
        (UnitKey(0, 0), 0, 100),
        (UnitKey(0, 1), 100, 200),
        (UnitKey(0, 2), 200, 250),
    ]


def test_an_empty_file_is_one_unit(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").touch()
    (task,) = plan_tasks(find_inputs([tmp_path / "a.jsonl"]), unit_bytes=100)
    assert isinstance(task, LinesTask)
    assert (task.start, task.stop) == (0, 0)


def test_small_text_files_share_a_unit_and_keep_their_numbers(tmp_path: Path) -> None:
    for name, size in (("a", 60), ("b", 40), ("c", 1), ("d", 500), ("e", 1)):
        (tmp_path / f"{name}.txt").write_bytes(b"x" * size)
    tasks = list(plan_tasks(find_inputs([tmp_path]), unit_bytes=100))
    assert [
        (task.key.source, [Path(file.name).name for file in task.files])
        for task in tasks
        if isinstance(task, TextsTask)
    ] == [(0, ["a.txt", "b.txt"]), (2, ["c.txt"]), (3, ["d.txt"]), (4, ["e.txt"])]


def test_a_row_group_of_parquet_is_a_unit(tmp_path: Path) -> None:
    table = pa.table({"text": [str(number) for number in range(5)]})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=2)
    tasks = list(plan_tasks(find_inputs([tmp_path / "a.parquet"]), unit_bytes=100))
    assert [(t.key, t.group, t.first_row) for t in tasks if isinstance(t, RowsTask)] == [
        (UnitKey(0, 0), 0, 0),
        (UnitKey(0, 1), 1, 2),
        (UnitKey(0, 2), 2, 4),
    ]


def test_a_stream_is_one_task_whose_units_show_later() -> None:
    (task,) = plan_tasks(find_inputs(["-"]), unit_bytes=100)
    assert isinstance(task, StreamTask)
    assert task.key == UnitKey(0, 0)


def test_names_of_units_sort_as_their_keys() -> None:
    keys = [UnitKey(0, 2), UnitKey(0, 11), UnitKey(1, 0), UnitKey(10, 0)]
    assert sorted(keys) == keys
    assert sorted(key.name for key in keys) == [key.name for key in keys]
    assert keys[1].name == "0000000-0000011"


def test_units_grow_with_the_corpus_up_to_a_limit() -> None:
    def sizes(compression: Compression, format: InputFormat = InputFormat.JSONL) -> list[int]:
        found = []
        for mib in (1, 64, 128, 1024, 10**6):
            half = InputFile(name="a", format=format, compression=compression, size_bytes=mib << 19)
            plain = dataclasses.replace(half, compression=Compression.NONE)
            found.append(choose_unit_bytes([plain, half]) >> 20)
        return found

    assert sizes(Compression.NONE) == [1, 2, 4, 16, 16]
    # Units of a stream are held by several processes at a time; a text file is one of them.
    assert sizes(Compression.GZIP) == [1, 2, 4, 4, 4]
    assert sizes(Compression.GZIP, InputFormat.TEXT) == [1, 2, 4, 16, 16]
    (stdin,) = find_inputs(["-"])
    assert choose_unit_bytes([stdin]) == 1 << 20
