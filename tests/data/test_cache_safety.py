"""Malicious data files end in a DataError: nothing is run, and nothing big is allocated."""

from __future__ import annotations

import io
import json
import os
import pickle
import resource
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_mup.data.cache_safety import check_cache, guarded_cache
from megatron_mup.data.datasets import build_datasets
from megatron_mup.data.inspection import inspect_prefix
from megatron_mup.data.shards import open_shard, unigram_entropy
from megatron_mup.errors import DataError
from tests.configurations import tiny


class Malicious:
    """Makes a file when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
        return os.system, (f"touch {self.marker}",)


def write_shard(prefix: Path, ids: list[int], *, dtype: str = "<u2", code: int = 8) -> Path:
    """A shard of one document, by the format's definition."""
    array = np.array(ids, dtype=dtype)
    Path(f"{prefix}.bin").write_bytes(array.tobytes())
    write_index(prefix, code=code, lengths=[len(ids)], pointers=[0], boundaries=[0, 1])
    return prefix


def write_index(
    prefix: Path,
    *,
    code: int = 8,
    counts: tuple[int, int] | None = None,
    lengths: list[int],
    pointers: list[int],
    boundaries: list[int],
) -> None:
    stated = counts or (len(lengths), len(boundaries))
    Path(f"{prefix}.idx").write_bytes(
        b"MMIDIDX\0\0"
        + struct.pack("<QBQQ", 1, code, *stated)
        + struct.pack(f"<{len(lengths)}i", *lengths)
        + struct.pack(f"<{len(pointers)}q", *pointers)
        + struct.pack(f"<{len(boundaries)}q", *boundaries)
    )


def write_manifest(prefix: Path, **changes: object) -> None:
    """The manifest of a shard of five ids, with other values."""
    record: dict[str, object] = {
        "format_version": 2,
        "documents": 1,
        "tokens": 5,
        "text_bytes": 9,
        "largest_token_id": 7,
        "dtype": "uint16",
        "bin_bytes": 10,
        "bin_sha256": "0" * 64,
        "idx_sha256": "0" * 64,
        "tokenizer_sha256": "0" * 64,
        "vocab_size": 96,
        "eod": 2,
        "append_eod": True,
        "inputs": [{"file": "a.txt", "start": 0, "stop": 0, "documents": 1}],
    }
    Path(f"{prefix}.json").write_text(json.dumps(record | changes))


def built_cache(tmp_path: Path) -> Path:
    """The index cache that Megatron makes for a small shard."""
    prefix = write_shard(tmp_path / "s", [7] * 100)
    build(prefix)
    return tmp_path / "cache"


def build(prefix: Path) -> list[int]:
    """The first sample's tokens."""
    run = tiny(f"train_data_path=[{prefix}]")
    samples, _ = build_datasets(run, train_samples=5, valid_samples=0)
    return [int(token) for token in samples[0]["tokens"]]


@pytest.mark.parametrize("kind", ["object array", "pickle", "zip", "fields with objects"])
def test_an_index_that_is_no_plain_array_is_refused(kind: str, tmp_path: Path) -> None:
    cache = built_cache(tmp_path)
    payload = Malicious(tmp_path / "was-run")
    victim = next(cache.glob("*-shuffle_index.npy"))
    if kind == "object array":
        np.save(victim, np.array([payload], dtype=object), allow_pickle=True)
    elif kind == "pickle":
        victim.write_bytes(pickle.dumps(payload))
    elif kind == "zip":
        stream = io.BytesIO()
        np.savez(stream, np.array([payload], dtype=object), allow_pickle=True)
        victim.write_bytes(stream.getvalue())
    else:
        np.save(victim, np.array([(payload,)], dtype=[("a", object)]), allow_pickle=True)
    with pytest.raises(DataError, match=rf"{victim.name}: not an index .*data_cache_path"):
        build(tmp_path / "s")
    assert not (tmp_path / "was-run").exists()


@pytest.mark.parametrize(
    "header",
    [
        "{'descr': '<i8', 'fortran_order': False, 'shape': (-5,)}",
        "{'descr': '|O', 'fortran_order': False, 'shape': (1,)}",
        "{'descr': '<i8', 'shape': (1,)}",
        "__import__('os').system('true')",
        "(" * 5000,
        "{'descr': '''",
    ],
)
def test_a_malformed_header_is_refused(header: str, tmp_path: Path) -> None:
    raw = header.encode() + b"\n"
    path = tmp_path / "x.npy"
    path.write_bytes(b"\x93NUMPY\x01\x00" + struct.pack("<H", len(raw)) + raw + bytes(64))
    with pytest.raises(DataError, match=r"x\.npy: not an index that Megatron wrote"):
        check_cache(tmp_path, remove_cut=True)


def test_a_folder_or_link_to_nothing_in_place_of_an_index_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.npy").mkdir()
    with pytest.raises(DataError, match="not a file"):
        check_cache(tmp_path, remove_cut=True)
    (tmp_path / "x.npy").rmdir()
    (tmp_path / "x.npy").symlink_to("gone")
    with pytest.raises(DataError, match="not a file"):
        check_cache(tmp_path, remove_cut=True)


@pytest.mark.parametrize("size", [0, 3, 7, 9, 60, -1])
def test_an_index_that_a_kill_cut_is_built_again(
    size: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cache = built_cache(tmp_path)
    victim = next(cache.glob("*-sample_index.npy"))
    whole = victim.read_bytes()
    victim.write_bytes(whole[:size])
    # Ranks that wait for the builder must not take its unfinished file away.
    check_cache(cache, remove_cut=False)
    assert victim.exists()
    assert build(tmp_path / "s") == [7] * 16
    assert victim.read_bytes() == whole
    assert "was cut by a killed run and is built again" in caplog.text


def test_a_file_that_the_builder_takes_away_meanwhile_is_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("a.npy", "b.npy"):
        np.save(tmp_path / name, np.zeros(3))
    listed = sorted(tmp_path.glob("*.npy"))
    (tmp_path / "a.npy").unlink()
    monkeypatch.setattr(Path, "glob", lambda _self, _pattern: listed)
    check_cache(tmp_path, remove_cut=False)


def test_a_huge_shape_is_a_cut_file_and_not_an_allocation(tmp_path: Path) -> None:
    header = b"{'descr': '<i8', 'fortran_order': False, 'shape': (4611686018427387904,)}\n"
    path = tmp_path / "x.npy"
    path.write_bytes(b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header)
    check_cache(tmp_path, remove_cut=True)
    assert not path.exists()


def test_a_genuine_cache_stays_and_a_missing_one_is_no_error(tmp_path: Path) -> None:
    cache = built_cache(tmp_path)
    before = {path.name: path.read_bytes() for path in cache.iterdir()}
    assert build(tmp_path / "s") == [7] * 16
    assert {path.name: path.read_bytes() for path in cache.iterdir()} == before
    check_cache(tmp_path / "absent", remove_cut=True)


def test_the_builder_waits_for_the_lock_of_another_job(tmp_path: Path) -> None:
    cache = built_cache(tmp_path)
    code = (
        "import fcntl, sys\n"
        "lock = open(sys.argv[1], 'ab')\n"
        "try:\n    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)\n"
        "except BlockingIOError:\n    print('held')\n"
        "else:\n    print('free')\n"
    )

    def seen() -> str:
        command = [sys.executable, "-c", code, str(cache / ".lock")]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    with guarded_cache(cache, builds=True):
        assert seen() == "held"
    assert seen() == "free"
    with guarded_cache(cache, builds=False):
        assert seen() == "free"


@pytest.mark.parametrize(
    "index",
    [
        # Counts of 2^62 and more with no such data behind them.
        {"counts": (2**62, 2), "lengths": [5], "pointers": [0], "boundaries": [0, 1]},
        {"counts": (1, 2**63), "lengths": [5], "pointers": [0], "boundaries": [0, 1]},
        # The product of the counts wraps to the true size in 64-bit arithmetic.
        {"counts": (1 + 2**62, 2), "lengths": [5], "pointers": [0], "boundaries": [0, 1]},
        {"lengths": [-5], "pointers": [0], "boundaries": [0, 1]},
        {"lengths": [2**31 - 1], "pointers": [0], "boundaries": [0, 1]},
        {"lengths": [5], "pointers": [2**40], "boundaries": [0, 1]},
        {"lengths": [5], "pointers": [-2], "boundaries": [0, 1]},
        {"lengths": [2, 3], "pointers": [0, 2**63 - 1], "boundaries": [0, 2]},
        {"lengths": [5], "pointers": [0], "boundaries": [0, 2**40, 1]},
        {"lengths": [5], "pointers": [0], "boundaries": [-1, 1]},
        {"code": 0, "lengths": [5], "pointers": [0], "boundaries": [0, 1]},
        {"code": 6, "lengths": [5], "pointers": [0], "boundaries": [0, 1]},
        {"code": 255, "lengths": [5], "pointers": [0], "boundaries": [0, 1]},
        # A wider type than the .bin was written with.
        {"code": 5, "lengths": [5], "pointers": [0], "boundaries": [0, 1]},
    ],
)
def test_a_malicious_index_of_a_shard_is_refused_in_little_memory(
    index: dict[str, Any], tmp_path: Path
) -> None:
    prefix = write_shard(tmp_path / "s", [7] * 5)
    write_index(prefix, **index)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(DataError, match=r"s\.(idx|bin): "):
        open_shard(prefix)
    # KiB; a count that is believed would take gigabytes or fail.
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 * 1024


@pytest.mark.parametrize(
    "change",
    [
        {"largest_token_id": -1},
        {"documents": -1},
        {"format_version": True},
        {"../../outside": 1},
        {"bin_sha256": ["../../x"]},
        {"inputs": "../../x"},
    ],
)
def test_a_manifest_of_other_names_or_types_is_refused(
    change: dict[str, object], tmp_path: Path
) -> None:
    prefix = write_shard(tmp_path / "s", [7] * 5)
    write_manifest(prefix, **change)
    with pytest.raises(DataError, match=r"s\.json: not a shard's manifest"):
        open_shard(prefix)


@pytest.mark.parametrize("raw", [b"[" * 200000, b"9" * 5000, b"\xff\xfe", b"\0", b""])
def test_a_manifest_that_no_parser_survives_is_refused(raw: bytes, tmp_path: Path) -> None:
    prefix = write_shard(tmp_path / "s", [7] * 5)
    Path(f"{prefix}.json").write_bytes(raw)
    with pytest.raises(DataError, match=r"s\.json: not a shard's manifest"):
        open_shard(prefix)


def test_a_pickle_in_place_of_a_manifest_is_refused_and_not_run(tmp_path: Path) -> None:
    prefix = write_shard(tmp_path / "s", [7] * 5)
    Path(f"{prefix}.json").write_bytes(pickle.dumps(Malicious(tmp_path / "was-run")))
    with pytest.raises(DataError, match=r"s\.json: not a shard's manifest"):
        open_shard(prefix)
    assert not (tmp_path / "was-run").exists()


def test_a_huge_manifest_is_not_read(tmp_path: Path) -> None:
    prefix = write_shard(tmp_path / "s", [7] * 5)
    Path(f"{prefix}.json").touch()
    # A sparse file: 1 TB by its size, nothing on the disk.
    os.truncate(f"{prefix}.json", 1 << 40)
    with pytest.raises(DataError, match="larger than 256 MiB"):
        open_shard(prefix)


def test_names_in_a_manifest_open_nothing(tmp_path: Path) -> None:
    prefix = write_shard(tmp_path / "s", [7] * 5)
    inputs = [{"file": "../../../../dev/zero", "start": 0, "stop": 0, "documents": 1}]
    write_manifest(prefix, inputs=inputs)
    assert open_shard(prefix, vocab_size=96).tokens == 5


def test_a_manifest_that_lies_about_the_largest_id_is_found_by_reading(tmp_path: Path) -> None:
    # An id of 2^61 behind a manifest that says 7: a table of counts would have 2^61 rows.
    prefix = write_shard(tmp_path / "s", [7, 7, 7, 7, 2**61], dtype="<i8", code=5)
    write_manifest(prefix, dtype="int64", bin_bytes=40)
    assert open_shard(prefix, vocab_size=96).tokens == 5
    with pytest.raises(DataError, match=rf"id is 7, the \.bin holds {2**61}"):
        unigram_entropy(prefix, prefix, 96)
    assert inspect_prefix(prefix).altered_files == [f"{prefix}.bin", f"{prefix}.idx"]
