"""Preprocessing that is killed, runs out of disk, or gets its text through a pipe."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest

from megatron_mup.data import tokenization
from megatron_mup.data.engines import EngineOption
from megatron_mup.data.preprocess import PreprocessOptions, preprocess
from megatron_mup.data.tokenizer import Tokenizer
from megatron_mup.errors import DataError

_RUN = """
import sys
from pathlib import Path
from megatron_mup.data.engines import EngineOption
from megatron_mup.data import tokenization
from megatron_mup.data.engines import EngineOption
from megatron_mup.data.preprocess import PreprocessOptions, preprocess
from megatron_mup.data.tokenizer import load_tokenizer
from megatron_mup.errors import DataError

if __name__ == "__main__":
    model, source, output, workers = sys.argv[1:]
    options = PreprocessOptions(
        valid_fraction=0.2, shard_tokens=20000, deduplicate=True, unit_bytes=4000,
        workers=int(workers), engine=EngineOption.reference,
    )
    try:
        preprocess([source], Path(output), tokenizer=load_tokenizer(Path(model)), options=options)
    except DataError as error:
        sys.exit(f"error: {error}")
"""
_OPTIONS = PreprocessOptions(
    valid_fraction=0.2, shard_tokens=20000, deduplicate=True, unit_bytes=4000
)
_DEADLINE_SECONDS = 60


@pytest.fixture(scope="module")
def script(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("script") / "run.py"
    path.write_text(_RUN)
    return path


@pytest.fixture(scope="module")
def corpus(jsonl: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every document twice, in another order: copies are far from their originals."""
    lines = jsonl.read_text("utf-8").splitlines(keepends=True)
    path = tmp_path_factory.mktemp("twice") / "twice.jsonl"
    path.write_text("".join(lines + lines[::-1]), "utf-8")
    return path


@pytest.fixture(scope="module")
def whole(
    corpus: Path, tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("whole")
    preprocess([corpus], folder / "s", tokenizer=tokenizer, options=_OPTIONS)
    return contents(folder)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def start(
    script: Path, model_path: Path, source: Path | str, folder: Path, workers: int
) -> subprocess.Popen[str]:
    arguments = [str(script), str(model_path), str(source), str(folder / "s"), str(workers)]
    return subprocess.Popen(
        [sys.executable, *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finished_units(folder: Path) -> int:
    return len(list(folder.glob("s.work/units/*.unit")))


def wait_for_units(folder: Path, units: int) -> None:
    deadline = time.monotonic() + _DEADLINE_SECONDS
    while finished_units(folder) < units:
        assert time.monotonic() < deadline


def finish(process: subprocess.Popen[str], text: str | None = None) -> None:
    """Let a run end by itself, and well."""
    output, _ = process.communicate(text, timeout=_DEADLINE_SECONDS)
    assert process.returncode == 0, output


def kill_after(process: subprocess.Popen[str], folder: Path, units: int) -> list[psutil.Process]:
    """Kill as soon as so many units are there; returns the workers that the process had."""
    deadline = time.monotonic() + _DEADLINE_SECONDS
    while finished_units(folder) < units and process.poll() is None:
        assert time.monotonic() < deadline
    children: list[psutil.Process] = []
    if process.poll() is None:
        children = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    process.communicate()
    return children


@pytest.mark.parametrize("workers", [1, 2])
def test_killed_again_and_again_it_ends_with_the_same_bytes(
    tmp_path: Path,
    script: Path,
    model_path: Path,
    corpus: Path,
    whole: dict[str, bytes],
    workers: int,
) -> None:
    units = 0
    for _ in range(4):
        workers_left = kill_after(
            start(script, model_path, corpus, tmp_path, workers), tmp_path, units + 5
        )
        _, alive = psutil.wait_procs(workers_left, timeout=_DEADLINE_SECONDS)
        assert alive == []
        # Nothing that was finished is lost, and nothing unfinished has a final name.
        assert finished_units(tmp_path) >= units + 5
        units = finished_units(tmp_path)
        assert [path.name for path in tmp_path.iterdir()] == ["s.work"]
    finish(start(script, model_path, corpus, tmp_path, workers))
    assert contents(tmp_path) == whole


def test_an_interrupt_ends_all_processes_and_keeps_what_is_finished(
    tmp_path: Path, script: Path, model_path: Path, corpus: Path, whole: dict[str, bytes]
) -> None:
    process = start(script, model_path, corpus, tmp_path, 2)
    wait_for_units(tmp_path, 5)
    children = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=_DEADLINE_SECONDS)
    _, alive = psutil.wait_procs(children, timeout=_DEADLINE_SECONDS)
    assert alive == []
    finish(start(script, model_path, corpus, tmp_path, 2))
    assert contents(tmp_path) == whole


def test_a_worker_that_dies_is_said_and_costs_only_its_unit(
    tmp_path: Path, script: Path, model_path: Path, corpus: Path, whole: dict[str, bytes]
) -> None:
    process = start(script, model_path, corpus, tmp_path, 2)
    wait_for_units(tmp_path, 5)
    # Workers are children of the server that they are forked from.
    parent = psutil.Process(process.pid)
    direct = parent.children()
    victims = [child for child in parent.children(recursive=True) if child not in direct]
    os.kill(victims[0].pid, signal.SIGKILL)
    output, _ = process.communicate(timeout=_DEADLINE_SECONDS)
    assert process.returncode == 1
    assert "a worker process died" in output
    assert "fewer --workers (2 now)" in output
    finish(start(script, model_path, corpus, tmp_path, 2))
    assert contents(tmp_path) == whole


def test_a_disk_that_takes_no_more_leaves_nothing_that_looks_finished(
    tmp_path: Path, tokenizer: Tokenizer, corpus: Path, whole: dict[str, bytes]
) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    # Units of 4 kB fit, a shard of 40 kB does not.
    resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, hard))
    try:
        with pytest.raises(DataError, match=r"File too large.*run the same command again"):
            preprocess([corpus], tmp_path / "s", tokenizer=tokenizer, options=_OPTIONS)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)
    assert [path.name for path in tmp_path.iterdir()] == ["s.work"]
    preprocess([corpus], tmp_path / "s", tokenizer=tokenizer, options=_OPTIONS)
    assert contents(tmp_path) == whole


def shards(found: dict[str, bytes]) -> dict[str, bytes]:
    """Without the manifests, which name the inputs."""
    return {name: raw for name, raw in found.items() if name.endswith((".bin", ".idx"))}


@pytest.mark.parametrize("workers", [1, 2])
def test_text_through_a_pipe_gives_the_same_shards(
    tmp_path: Path,
    script: Path,
    model_path: Path,
    corpus: Path,
    whole: dict[str, bytes],
    workers: int,
) -> None:
    finish(start(script, model_path, "-", tmp_path, workers), corpus.read_text("utf-8"))
    assert shards(contents(tmp_path)) == shards(whole)


def test_text_through_a_pipe_can_be_one_document(
    tmp_path: Path, model_path: Path, tokenizer: Tokenizer
) -> None:
    text = "One text\r\nwith \u00e9 and two lines"
    command = [sys.executable, "-m", "megatron_mup", "data", "preprocess", "--input", "-"]
    options = ["--input-format", "text", "--valid-fraction", "0", "--tokenizer-model"]
    subprocess.run(
        [*command, *options, str(model_path), "--output-prefix", str(tmp_path / "s")],
        input=text.encode(),
        check=True,
        timeout=_DEADLINE_SECONDS,
    )
    ids = np.fromfile(tmp_path / "s.bin", "<u2").tolist()
    assert ids == [*tokenizer.encode(text), 2]


def test_a_wrong_engine_cannot_read_a_pipe_twice_but_the_next_run_can(
    tmp_path: Path,
    tokenizer: Tokenizer,
    corpus: Path,
    whole: dict[str, bytes],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    options = dataclasses.replace(_OPTIONS, engine=EngineOption.gigatoken)
    for _ in range(2):
        with corpus.open("rb") as stream, monkeypatch.context() as patch:
            patch.setattr(sys, "stdin", io.TextIOWrapper(stream))
            patch.setattr(tokenization, "audit", lambda *_: 0)
            if not (tmp_path / "s.work/engine-rejected.json").exists():
                with pytest.raises(DataError, match="give the same text to the same command"):
                    preprocess(["-"], tmp_path / "s", tokenizer=tokenizer, options=options)
            else:
                preprocess(["-"], tmp_path / "s", tokenizer=tokenizer, options=options)
    assert shards(contents(tmp_path)) == shards(whole)


def test_a_pipe_is_read_again_after_a_kill_and_must_bring_the_same_text(
    tmp_path: Path, script: Path, model_path: Path, corpus: Path, whole: dict[str, bytes]
) -> None:
    text = corpus.read_text("utf-8")
    process = start(script, model_path, "-", tmp_path, 2)
    assert process.stdin is not None
    process.stdin.write(text)
    process.stdin.close()
    process.stdin = None
    kill_after(process, tmp_path, 5)
    other = json.dumps({"text": "other"}) + "\n"
    process = start(script, model_path, "-", tmp_path, 2)
    output, _ = process.communicate(other + text, timeout=_DEADLINE_SECONDS)
    assert "standard input differs from the first run's at byte 0" in output
    finish(start(script, model_path, "-", tmp_path, 2), text)
    assert shards(contents(tmp_path)) == shards(whole)
