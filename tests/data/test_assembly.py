from __future__ import annotations

import json
import multiprocessing
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_mup.data import assembly
from megatron_mup.data.assembly import AssemblyRequest, assemble
from megatron_mup.data.manifest import read_job_manifest
from megatron_mup.data.shard_plan import SPLITS, Plan, PlanRequest, plan_shards
from megatron_mup.data.shard_writer import ShardTask, write_shard
from megatron_mup.data.unit_files import UnitKey
from megatron_mup.errors import DataError
from megatron_mup.os_processes import process_start
from tests.data.corpora import (
    INPUTS,
    Doc,
    cut,
    random_units,
    request_for,
    without_copies,
    write_docs,
)


def made(folder: Path) -> dict[str, bytes]:
    """The published files beside the work folder."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def assembled(folder: Path, seed: int, *, workers: int = 1) -> dict[str, bytes]:
    keys = write_docs(folder / "p.work", random_units(seed))
    assemble(request_for(folder / "p.work", folder / "p", keys), workers=workers)
    return made(folder)


def megatron_shard(upstream: ModuleType, folder: Path, docs: list[Doc]) -> tuple[bytes, bytes]:
    """The bytes that megatron-core's own builder writes."""
    folder.mkdir(exist_ok=True)
    builder = upstream.IndexedDatasetBuilder(str(folder / "m.bin"), dtype=np.uint16)
    for doc in docs:
        builder.add_document(np.array(doc.ids, dtype=np.uint16), [len(doc.ids)])
    builder.finalize(str(folder / "m.idx"))
    return (folder / "m.bin").read_bytes(), (folder / "m.idx").read_bytes()


DOCS = st.lists(
    st.builds(
        lambda text, length: Doc(
            f"{text}", tuple(range(1, length + 1)), SPLITS[text % 3], position=text
        ),
        st.integers(0, 12),
        st.integers(0, 9),
    ),
    max_size=8,
)


@settings(max_examples=60, deadline=None)
@given(
    parts=st.lists(DOCS, min_size=1, max_size=5),
    shard_tokens=st.one_of(st.none(), st.integers(1, 30)),
    deduplicate=st.booleans(),
)
def test_shards_are_those_of_the_plain_rules_and_of_megatrons_builder(
    upstream: ModuleType,
    tmp_path_factory: pytest.TempPathFactory,
    parts: list[list[Doc]],
    shard_tokens: int | None,
    deduplicate: bool,
) -> None:
    folder = tmp_path_factory.mktemp("corpus")
    # A split without any token is refused, and tested elsewhere.
    parts = [*parts, [Doc(f"last {name}", (7, 2), name) for name in SPLITS]]
    keys = write_docs(
        folder / "p.work", {UnitKey(0, number): docs for number, docs in enumerate(parts)}
    )
    request = request_for(
        folder / "p.work", folder / "p", keys, shard_tokens=shard_tokens, deduplicate=deduplicate
    )
    manifest = assemble(request, workers=1)
    docs = [doc for part in parts for doc in part]
    kept = without_copies(docs) if deduplicate else docs
    expected: dict[str, bytes] = {}
    for split in SPLITS:
        shards = cut([doc for doc in kept if doc.split == split], shard_tokens)
        for number, shard in enumerate(shards):
            end = "" if shard_tokens is None else f"-{number:05d}-of-{len(shards):05d}"
            raw = megatron_shard(upstream, folder / "megatron", shard)
            expected[f"p_{split}{end}.bin"], expected[f"p_{split}{end}.idx"] = raw
    found = {name: raw for name, raw in made(folder).items() if name.startswith("p_")}
    assert {name: raw for name, raw in found.items() if not name.endswith(".json")} == expected
    assert manifest.duplicate_documents == len(docs) - len(kept)


def test_the_number_of_workers_changes_nothing(tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    alone = assembled(tmp_path / "one", 3)
    assert assembled(tmp_path / "two", 3, workers=2) == alone
    assert len(alone) == 6 * 3 + 1
    assert multiprocessing.active_children() == []


def test_the_manifest_lists_every_shard_and_all_that_was_left_out(tmp_path: Path) -> None:
    units = {
        UnitKey(0, 0): [Doc("a", (5, 2))],
        UnitKey(0, 1): [Doc("b", (5, 6, 2)), Doc("a", (5, 2))],
        UnitKey(2, 0): [Doc("c", (7, 2), "valid", file=2)],
    }
    work = tmp_path / "p.work"
    first = {"rejected": {"broken_json": 1}, "rejected_places": [[0, 9, 4, "broken_json", "x"]]}
    second = {
        "rejected": {"invalid_utf8": 2, "broken_json": 1},
        "rejected_places": [[0, 8, 0, "invalid_utf8", "y"]],
    }
    third = {
        "rejected": {"too_large": 2},
        "rejected_places": [[2, 0, 0, "too_large", "z"], [3, 0, 1, "too_large", "w"]],
    }
    for key, facts in zip(units, (first, second, third), strict=True):
        write_docs(work, {key: units[key]}, lines=10, empty_documents=3, **facts)
    request = request_for(
        work, tmp_path / "p", list(units), splits=("train", "valid"), shard_tokens=4
    )
    manifest = assemble(request, workers=1)
    assert read_job_manifest(tmp_path / "p.manifest.json") == manifest
    assert (manifest.empty_documents, manifest.duplicate_documents) == (9, 1)
    assert manifest.rejected_documents == {"broken_json": 2, "invalid_utf8": 2, "too_large": 2}
    assert manifest.rejected_places == [
        "a.jsonl:5: broken_json: x",
        "a.jsonl:11: invalid_utf8: y",
        "c.txt:1: too_large: z",
        "d.txt:1: too_large: w",
    ]
    assert (manifest.inputs, manifest.options) == (INPUTS, {"json_key": "text"})
    assert (manifest.tokenizer_sha256, manifest.vocab_size, manifest.eod) == ("7" * 64, 1000, 2)
    shown = {
        split: [(entry.name, entry.documents, entry.tokens, entry.text_bytes) for entry in entries]
        for split, entries in manifest.splits.items()
    }
    assert shown == {
        "train": [
            ("p_train-00000-of-00002", 1, 2, 1),
            ("p_train-00001-of-00002", 1, 3, 1),
        ],
        "valid": [("p_valid-00000-of-00001", 1, 2, 1)],
    }


def test_a_single_split_has_no_name(tmp_path: Path) -> None:
    keys = write_docs(tmp_path / "p.work", {UnitKey(0, 0): [Doc("a", (5, 2))]})
    request = request_for(
        tmp_path / "p.work", tmp_path / "p", keys, splits=("train",), shard_tokens=None
    )
    assemble(request, workers=1)
    assert sorted(made(tmp_path)) == ["p.bin", "p.idx", "p.json", "p.manifest.json"]


def test_a_large_vocabulary_is_stored_in_32_bits(tmp_path: Path, upstream: ModuleType) -> None:
    docs = [Doc("a", (99_999, 2)), Doc("b", (70_000,), "valid")]
    keys = write_docs(tmp_path / "p.work", {UnitKey(0, 0): docs}, dtype="<i4")
    request = request_for(
        tmp_path / "p.work", tmp_path / "p", keys, splits=("train", "valid"), vocab_size=100_000
    )
    assemble(request, workers=1)
    dataset = upstream.IndexedDataset(str(tmp_path / "p_train-00000-of-00001"))
    assert dataset[0].tolist() == [99_999, 2]


def without_documents_of(split: str, folder: Path) -> AssemblyRequest:
    docs = [Doc("a", (1,), name) for name in SPLITS if name != split] + [Doc("e", (), split)]
    keys = write_docs(folder / "p.work", {UnitKey(0, 0): docs}, empty_documents=4)
    return request_for(folder / "p.work", folder / "p", keys, deduplicate=False)


@pytest.mark.parametrize("split", ["valid", "test"])
def test_a_held_out_split_without_documents_is_left_out_with_a_warning(
    tmp_path: Path, split: str, caplog: pytest.LogCaptureFixture
) -> None:
    manifest = assemble(without_documents_of(split, tmp_path), workers=1)
    assert {name: len(shards) for name, shards in manifest.splits.items()} == {
        name: int(name != split) for name in SPLITS
    }
    assert f"fell into the split {split} (4 were empty" in caplog.text
    assert f"--{split}-fraction" in caplog.text
    assert not any(f"p_{split}" in name for name in made(tmp_path))


def test_a_corpus_without_a_document_to_train_on_is_refused(tmp_path: Path) -> None:
    request = without_documents_of("train", tmp_path)
    with pytest.raises(DataError, match=r"split train: .*\(4 were empty.*--valid-fraction 0"):
        assemble(request, workers=1)
    assert made(tmp_path) == {}


def test_a_corpus_without_text_is_refused_without_a_word_on_splits(tmp_path: Path) -> None:
    keys = write_docs(tmp_path / "p.work", {UnitKey(0, 0): []}, empty_documents=4)
    request = request_for(tmp_path / "p.work", tmp_path / "p", keys)
    # The work of the empty corpus is there, so that another --input alone would be refused.
    message = r"no document with text \(4 were empty, 0 copies .*; pass other --input, and --overwr"
    with pytest.raises(DataError, match=message) as refused:
        assemble(request, workers=1)
    assert "fraction" not in str(refused.value)


def test_units_of_a_split_that_is_not_made_are_refused(tmp_path: Path) -> None:
    keys = write_docs(tmp_path / "p.work", {UnitKey(0, 0): [Doc("a", (1,), "test")]})
    request = request_for(tmp_path / "p.work", tmp_path / "p", keys, splits=("train", "valid"))
    with pytest.raises(DataError, match="split 2, which this job does not make"):
        assemble(request, workers=1)


def test_an_existing_output_stays_without_overwrite(tmp_path: Path) -> None:
    keys = write_docs(tmp_path / "p.work", random_units(0))
    (tmp_path / "p_test-00003-of-00009.bin").write_bytes(b"old")
    with pytest.raises(DataError, match=r"p_test-00003-of-00009\.bin; pass --overwrite"):
        assemble(request_for(tmp_path / "p.work", tmp_path / "p", keys), workers=1)
    assert made(tmp_path) == {"p_test-00003-of-00009.bin": b"old"}


def test_an_input_is_never_replaced(tmp_path: Path) -> None:
    keys = write_docs(tmp_path / "p.work", {UnitKey(0, 0): [Doc("a", (1,))]})
    (tmp_path / "p.json").write_text('{"text": "a"}')
    request = request_for(
        tmp_path / "p.work", tmp_path / "p", keys, splits=("train",), overwrite=True
    )
    request = replace(request, input_names=[str(tmp_path / "p.json")])
    with pytest.raises(DataError, match=r"p\.json has the name of an output"):
        assemble(request, workers=1)
    assert (tmp_path / "p.json").read_text() == '{"text": "a"}'


def test_finished_shards_are_not_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "undisturbed").mkdir()
    expected = assembled(tmp_path / "undisturbed", 5)
    keys = write_docs(tmp_path / "p.work", random_units(5))
    request = request_for(tmp_path / "p.work", tmp_path / "p", keys)
    names: list[str] = []

    def three_then_full(task: ShardTask) -> object:
        if len(names) == 3:
            raise DataError("disk full")
        names.append(task.name)
        return write_shard(task)

    monkeypatch.setattr(assembly, "write_shard", three_then_full)
    with pytest.raises(DataError, match="disk full"):
        assemble(request, workers=1)
    assert made(tmp_path) == {}
    # As if the first had ended last, in another process.
    (request.shards / f"{names.pop(0)}.json").unlink()
    left_over = request.shards / ".p_train.bin.123.tmp"
    left_over.write_bytes(b"half")
    again: list[str] = []
    reports: list[tuple[int, int]] = []

    def counted(task: ShardTask) -> object:
        again.append(task.name)
        # What was left over might need the space.
        assert not left_over.exists()
        return write_shard(task)

    monkeypatch.setattr(assembly, "write_shard", counted)
    assemble(request, workers=1, report=lambda done, total: reports.append((done, total)))
    assert made(tmp_path) == expected
    assert not set(again) & set(names)
    total = len(again) + 2
    assert reports == [(done, total) for done in range(2, total + 1)]


def test_an_error_in_a_worker_process_is_the_users_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = write_docs(tmp_path / "p.work", random_units(1))
    request = request_for(tmp_path / "p.work", tmp_path / "p", keys)

    def plan_and_lose_a_unit(wanted: PlanRequest) -> Plan:
        plan = plan_shards(wanted)
        (request.units / "0000001-0000000.tokens").write_bytes(b"short")
        return plan

    monkeypatch.setattr(assembly, "plan_shards", plan_and_lose_a_unit)
    with pytest.raises(DataError, match=r"0000001-0000000\.tokens: expected"):
        assemble(request, workers=2)
    assert made(tmp_path) == {}
    assert multiprocessing.active_children() == []


def end_at_once(task: ShardTask) -> object:
    """Stands for write_shard in a worker process that the system kills."""
    os._exit(9)


def test_the_death_of_a_worker_process_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = write_docs(tmp_path / "p.work", random_units(1))
    monkeypatch.setattr(assembly, "write_shard", end_at_once)
    with pytest.raises(DataError, match=r"died .*with fewer --workers \(2 now\)"):
        assemble(request_for(tmp_path / "p.work", tmp_path / "p", keys), workers=2)
    assert made(tmp_path) == {}


def never_end(task: ShardTask) -> object:
    """Stands for write_shard in a worker process with endless work."""
    (task.folder.parent / f"worker-{os.getpid()}").touch()
    threading.Event().wait()
    return None


def assemble_without_end(folder: Path) -> None:
    """The main function of a process that the next test kills."""
    keys = write_docs(folder / "p.work", random_units(1))
    assembly.write_shard = never_end
    assemble(request_for(folder / "p.work", folder / "p", keys), workers=2)


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_worker_processes_end_with_their_parent(tmp_path: Path) -> None:
    code = (
        "from pathlib import Path; from tests.data import test_assembly; "
        f"test_assembly.assemble_without_end(Path({str(tmp_path)!r}))"
    )
    root = Path(__file__).parent.parent.parent
    with subprocess.Popen([sys.executable, "-c", code], cwd=root) as parent:
        until(lambda: len(list((tmp_path / "p.work").glob("worker-*"))) == 2)
        workers = [int(path.name[7:]) for path in (tmp_path / "p.work").glob("worker-*")]
        assert all(process_start(pid) is not None for pid in workers)
        parent.kill()
    until(lambda: all(process_start(pid) is None for pid in workers))


def test_a_worker_process_loads_no_engine_and_no_torch() -> None:
    code = (
        "import sys, megatron_mup.data.assembly; "
        "print(sorted({'torch', 'pyarrow', 'sentencepiece', 'tokenizers', 'gigatoken', "
        "'splintr', 'megatron'} & sys.modules.keys()))"
    )
    shown = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=os.environ
    )
    assert shown.stdout.strip() == "[]"


def test_the_work_of_another_job_is_not_published(tmp_path: Path) -> None:
    keys = write_docs(tmp_path / "p.work", random_units(2))
    request = request_for(tmp_path / "p.work", tmp_path / "p", keys)
    assemble(request, workers=1)
    before = made(tmp_path)
    other = replace(request, options={"json_key": "content"})
    with pytest.raises(DataError, match="a job with other options"):
        assemble(other, workers=1)
    # The same job again finds everything published.
    assert json.loads(before["p.manifest.json"])["options"] == {"json_key": "text"}
    assemble(request, workers=1)
    assert made(tmp_path) == before
