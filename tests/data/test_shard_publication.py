from __future__ import annotations

import os
from pathlib import Path
from types import ModuleType

import pytest

from megatron_mup.data.assembly import AssemblyRequest, assemble
from megatron_mup.data.shard_publication import existing_outputs, shard_name
from megatron_mup.errors import DataError
from tests.data.corpora import contents, random_units, request_for, write_docs


class Killed(BaseException):
    """Stands for the end of the process."""


def published_files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in existing_outputs(folder / "p")}


def overwriting(folder: Path, seed: int, shard_tokens: int | None) -> AssemblyRequest:
    folder.mkdir(exist_ok=True)
    keys = write_docs(folder / "p.work", random_units(seed))
    return request_for(
        folder / "p.work", folder / "p", keys, shard_tokens=shard_tokens, overwrite=True
    )


def readable(upstream: ModuleType, folder: Path) -> dict[str, list[list[int]]]:
    """What a trainer can open, by shard."""
    found = {}
    for path in folder.glob("p_*.idx"):
        dataset = upstream.IndexedDataset(str(path.with_suffix("")))
        found[path.stem] = [dataset[number].tolist() for number in range(len(dataset))]
    return found


def assemble_until(request: AssemblyRequest, call: str, alive: int) -> bool:
    """Assemble, but die in the call of that number and never reach another; was it reached?"""
    calls, original = 0, getattr(os, call)

    def dying(*args: object, **options: object) -> None:
        nonlocal calls
        calls += 1
        if calls > alive:
            raise Killed
        original(*args, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, call, dying)
        try:
            assemble(request, workers=1)
        except Killed:
            return True
    return False


@pytest.mark.parametrize("call", ["replace", "unlink", "fsync"])
@pytest.mark.parametrize(("old_tokens", "new_tokens"), [(None, None), (60, 80), (None, 80)])
def test_a_publication_over_an_older_set_that_is_killed_anywhere_is_continued(
    tmp_path: Path,
    upstream: ModuleType,
    call: str,
    old_tokens: int | None,
    new_tokens: int | None,
) -> None:
    assemble(overwriting(tmp_path / "old", 1, old_tokens), workers=1)
    assemble(overwriting(tmp_path / "new", 2, new_tokens), workers=1)
    old, new = (published_files(tmp_path / name) for name in ("old", "new"))
    old_read, new_read = (readable(upstream, tmp_path / name) for name in ("old", "new"))
    dead, folder = 0, tmp_path / "0"
    while True:
        request = overwriting(folder, 2, new_tokens)
        for name, raw in old.items():
            (folder / name).write_bytes(raw)
        if not assemble_until(request, call, dead):
            break
        found = readable(upstream, folder)
        assert found.items() <= old_read.items() or found.items() <= new_read.items()
        if (folder / "p.manifest.json").exists():
            assert published_files(folder) in (old, new)
        assemble(request, workers=1)
        assert published_files(folder) == new
        dead += 1
        folder = tmp_path / f"{dead}"
    assert published_files(folder) == new
    # Every file is made and moved, the two records are made.
    assert dead == {"replace": 2 * (len(new) - 1) + 2}.get(call, dead)
    assert dead > 9


def test_names_are_those_of_the_prefix() -> None:
    prefix = Path("out/p")
    assert shard_name(prefix, "train", 17, 64) == "p_train-00017-of-00064"
    assert shard_name(prefix, None, 17, 64) == "p-00017-of-00064"
    assert shard_name(prefix, "test", 0, None) == "p_test"
    assert shard_name(prefix, None, 0, None) == "p"


OURS = [
    "p.b.bin",
    "p.b.idx",
    "p.b.json",
    "p.b.manifest.json",
    "p.b_train.bin",
    "p.b_valid-00000-of-00001.idx",
    "p.b-00012-of-00034.json",
    "p.b_test-00012-of-00034.bin",
]
FOREIGN = [
    "p.b",
    "p.b.txt",
    "p.b.work",
    "pxb.bin",
    "p.b2.bin",
    "xp.b.bin",
    "p.b_train2.bin",
    "p.b_dev.bin",
    "p.b_train-1-of-2.bin",
    "p.b_train-00001-of-00002.bin.old",
    "p.b_train.manifest.json",
    ".p.b.bin.123.tmp",
    "p.b_train-00001-of-00002_valid.bin",
]


def test_only_the_files_of_this_very_prefix_are_outputs(tmp_path: Path) -> None:
    for name in OURS + FOREIGN:
        (tmp_path / name).touch()
    assert [path.name for path in existing_outputs(tmp_path / "p.b")] == sorted(OURS)
    assert existing_outputs(tmp_path / "missing" / "p") == []


def test_files_of_others_stay_and_those_of_an_older_set_go(tmp_path: Path) -> None:
    request = overwriting(tmp_path, 2, None)
    foreign = {name.replace("p.b", "p"): name.encode() for name in FOREIGN if name != "p.b.work"}
    for name, raw in foreign.items():
        (tmp_path / name).write_bytes(raw)
    (tmp_path / "p_train-00007-of-00008.idx").write_bytes(b"old")
    (tmp_path / "p_train-00007-of-00008.bin").symlink_to(tmp_path / "nowhere")
    assemble(request, workers=1)
    found = {name: raw for name, raw in contents(tmp_path).items() if not name.startswith("p.work")}
    assert foreign.items() <= found.items()
    assert len(found) == len(foreign) + 10
    assert not os.path.lexists(tmp_path / "p_train-00007-of-00008.bin")


@pytest.mark.parametrize("lost", [True, False])
def test_a_shard_that_got_lost_or_cut_before_its_publication_is_missed(
    tmp_path: Path, lost: bool
) -> None:
    request = overwriting(tmp_path, 2, None)
    # Dies in the first move: after 9 files, their record, and before anything has its final name.
    assert assemble_until(request, "replace", 10)
    if lost:
        (request.shards / "p_valid.bin").unlink()
    else:
        (request.shards / "p_valid.bin").write_bytes(b"cut")
    with pytest.raises(DataError, match=r"p_valid\.bin: missing or not the one that was made"):
        assemble(request, workers=1)
    assert published_files(tmp_path) == {}


def test_a_set_that_is_published_stays_whole_while_the_run_is_repeated(tmp_path: Path) -> None:
    request = overwriting(tmp_path, 2, None)
    assemble(request, workers=1)
    before = published_files(tmp_path)
    assert assemble_until(request, "replace", 0)
    assert published_files(tmp_path) == before
