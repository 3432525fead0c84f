"""Checkpoints are published whole or not at all, and training neither waits nor is seen in them."""

from __future__ import annotations

import errno
import json
import os
import resource
import signal
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync

from megatron_mup.checkpoint import save as save_module
from megatron_mup.checkpoint.contents import chunk_names, saved_tree
from megatron_mup.checkpoint.folders import TRACKER
from megatron_mup.checkpoint.integrity import CHECKSUMS, check_files, read_checksums
from megatron_mup.checkpoint.load import load_checkpoint
from megatron_mup.checkpoint.retention import Remover
from megatron_mup.checkpoint.save import CheckpointSaver, _give_name, save_checkpoint
from megatron_mup.checkpoint.writing import ForkedWriter, plan_writing
from megatron_mup.training import loop as loop_module
from megatron_mup.training.loop import TrainData, train
from tests.checkpoint.held_writers import Gate
from tests.checkpoint.short_runs import folders, losses, names, run_training, step, trained
from tests.configurations import tiny
from tests.random_samples import RandomSamples


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """Let no file of this process, or of one it starts, grow beyond a size."""
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, old[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)


def writers() -> list[psutil.Process]:
    """Forked children of this process; other tests may have left it children of other programs."""
    program = psutil.Process().cmdline()
    return [child for child in psutil.Process().children() if child.cmdline() == program]


@pytest.mark.parametrize("variant", ["bf16=false", "bf16=true", "use_distributed_optimizer=true"])
def test_training_during_a_save_is_not_seen_in_it(variant: str, gate: Gate, tmp_path: Path) -> None:
    for name in ("true", "false"):
        run = tiny(variant, f"async_save={name}", f"save={tmp_path / name}")
        with trained(run, steps=2) as state:
            saver = CheckpointSaver(run)
            if name == "false":
                gate.open()
            saver.start(state)
            step(state)
            step(state)
            saver.poll()
            assert saver.in_flight == (name == "true")
            if name == "true":
                gate.open()
            saver.wait()
            assert saver.failed is None
    asynchronous = read_checksums(tmp_path / "true" / "iter_0000002")
    synchronous = read_checksums(tmp_path / "false" / "iter_0000002")
    assert asynchronous["__0_0.distcp"] == synchronous["__0_0.distcp"]
    assert check_files(tmp_path / "true" / "iter_0000002") == []


def test_a_run_resumed_from_asynchronous_checkpoints_equals_the_whole_run(tmp_path: Path) -> None:
    options = ["lr_decay_iters=8", "save_interval=1", "async_save=true"]
    whole = run_training(tiny("train_iters=8"))
    first = run_training(tiny(*options, "train_iters=5", *folders(tmp_path)))
    second = run_training(tiny(*options, "train_iters=8", *folders(tmp_path, load=True)))
    assert losses(first) + losses(second) == losses(whole)
    assert names(tmp_path) == {f"iter_{i:07d}" for i in range(1, 9)} | {TRACKER}


def test_a_full_disk_costs_the_save_and_nothing_else(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = tiny("async_save=true", f"save={tmp_path}")
    with trained(run, steps=1) as state:
        saver = CheckpointSaver(run)
        saver.start(state)
        saver.wait()
        step(state)
        with largest_file(100_000):
            saver.start(state)
        saver.wait()
        assert saver.failed is not None
        assert saver.failed.endswith("iter_0000002.tmp/__0_0.distcp: File too large")
        assert "could not save iteration 2" in caplog.text
        assert "the newest is iteration 1" in caplog.text
        assert names(tmp_path) == {"iter_0000001", TRACKER}
        assert check_files(tmp_path / "iter_0000001") == []
        step(state)
        saver.start(state)
        saver.wait()
        assert saver.failed is None
    assert names(tmp_path) == {"iter_0000001", "iter_0000003", TRACKER}
    assert (tmp_path / TRACKER).read_text() == "3"


def test_a_disk_that_fills_up_with_the_last_files_costs_the_save_as_well(tmp_path: Path) -> None:
    run = tiny("async_save=true", f"save={tmp_path}")
    with trained(run, steps=1) as state:
        saver = CheckpointSaver(run)
        saver.start(state)
        # The writer has the old limit, the metadata and checksums of this process do not fit.
        with largest_file(2000):
            saver.wait()
        assert saver.failed is not None
        assert "File too large" in saver.failed
    assert names(tmp_path) == set()


def test_a_killed_writer_is_reported(gate: Gate, tmp_path: Path) -> None:
    run = tiny("async_save=true", f"save={tmp_path}")
    with trained(run, steps=1) as state:
        saver = CheckpointSaver(run)
        saver.start(state)
        (writer,) = writers()
        os.kill(writer.pid, signal.SIGKILL)
        saver.wait()
        assert saver.failed == "the writing process ended with exit status -9"
    assert names(tmp_path) == set()


def test_a_writer_that_cannot_be_forked_costs_the_save_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refused() -> int:
        raise BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable")

    run = tiny("async_save=true", f"save={tmp_path}")
    with trained(run, steps=1) as state:
        saver = CheckpointSaver(run)
        monkeypatch.setattr(os, "fork", refused)
        saver.start(state)
        saver.wait()
        words = "cannot start a writing process: Resource temporarily unavailable"
        assert saver.failed == words
        assert f"could not save iteration 1: {words}" in caplog.text
        assert names(tmp_path) == set()
        saver.start(state)
        saver.close()
        monkeypatch.undo()
        step(state)
        saver.start(state)
        saver.wait()
        assert saver.failed is None
    # What is given up by ``close`` is left to the next start.
    assert names(tmp_path) == {"iter_0000001.tmp", "iter_0000002", TRACKER}


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (MemoryError(), "out of memory"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), "DefaultCPUAllocator: can't"),
    ],
)
def test_too_little_memory_to_stage_costs_the_save_only(
    error: Exception, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(_buckets: object) -> object:
        raise error

    run = tiny("async_save=true", f"save={tmp_path}")
    with trained(run, steps=1) as state:
        saver = CheckpointSaver(run)
        monkeypatch.setattr(FileSystemWriterAsync, "preload_tensors", staticmethod(refused))
        saver.start(state)
        assert writers() == []
        saver.wait()
        assert saver.failed is not None
        assert f"cannot stage the weights of rank 0 in host memory: {words}" in saver.failed
        assert names(tmp_path) == set()
        monkeypatch.undo()
        saver.start(state)
        saver.wait()
        assert saver.failed is None
    assert names(tmp_path) == {"iter_0000001", TRACKER}


def is_running(pid: int) -> bool:
    """Whether a process exists that is not only waiting to be collected."""
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


def test_the_writer_dies_with_its_rank(gate: Gate, tmp_path: Path) -> None:
    temporary = tmp_path / "iter_0000001.tmp"
    temporary.mkdir()
    with trained(tiny(), steps=1) as state:
        plan = plan_writing(saved_tree(state), temporary)
        # Stands for the rank; it has no process groups of its own, so it only writes.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            rank = os.fork()
        if rank == 0:
            ForkedWriter(plan)
            (writer,) = writers()
            (tmp_path / "writer").write_text(str(writer.pid))
            os.kill(os.getpid(), signal.SIGKILL)
        os.waitpid(rank, 0)
    writer_pid = int((tmp_path / "writer").read_text())
    deadline = time.monotonic() + 20
    while is_running(writer_pid) and time.monotonic() < deadline:
        time.sleep(0.01)
    survived = is_running(writer_pid)
    if survived:
        os.kill(writer_pid, signal.SIGKILL)
    assert not survived


def test_an_unwritable_folder_costs_the_save_only(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    run = tiny(f"save={tmp_path / 'file' / 'checkpoints'}")
    with trained(run, steps=1) as state:
        saver = CheckpointSaver(run)
        saver.start(state)
        assert saver.failed is not None
        assert saver.failed.endswith("iter_0000001.tmp: Not a directory")


def test_old_checkpoints_are_deleted_but_for_the_last_ones_and_every_nth(tmp_path: Path) -> None:
    options = ["train_iters=7", "save_interval=1", "keep_last=2", "save_retain_interval=3"]
    run_training(tiny(*options, *folders(tmp_path)))
    kept = {"iter_0000003", "iter_0000006", "iter_0000007"}
    assert names(tmp_path) == kept | {TRACKER}


def test_a_tracker_that_was_not_written_leaves_the_checkpoint_newest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def killed(_root: Path, _iteration: int) -> None:
        raise OSError("the disk is gone")

    options = ["lr_decay_iters=6", "save_interval=2"]
    run_training(tiny(*options, "train_iters=2", *folders(tmp_path)))
    monkeypatch.setattr(save_module, "write_tracker", killed)
    run_training(tiny(*options, "train_iters=4", *folders(tmp_path, load=True)))
    assert (tmp_path / TRACKER).read_text() == "2"
    monkeypatch.undo()
    result = run_training(tiny(*options, "train_iters=5", *folders(tmp_path, load=True)))
    assert "names '2', but iteration 4 is used; checkpoint.ckpt_step chooses" in caplog.text
    assert [row["iteration"] for row in result.history] == [5.0]


def test_a_run_that_went_back_leaves_its_abandoned_future_behind(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    options = ["lr_decay_iters=6"]
    run_training(tiny(*options, "train_iters=4", "save_interval=2", *folders(tmp_path)))
    back = [*options, "train_iters=3", "keep_last=1", "ckpt_step=2"]
    run_training(tiny(*back, *folders(tmp_path, load=True)))
    assert names(tmp_path) == {"iter_0000003", "iter_0000004.abandoned", TRACKER}
    assert "ckpt_step=2 goes back behind iterations [4]" in caplog.text
    result = run_training(tiny(*options, "train_iters=4", *folders(tmp_path, load=True)))
    assert [row["iteration"] for row in result.history] == [4.0]


def test_a_checkpoint_of_the_same_name_is_replaced_whole(tmp_path: Path) -> None:
    final, temporary = tmp_path / "iter_0000002", tmp_path / "iter_0000002.tmp"
    for folder, content in ((final, "old"), (temporary, "new")):
        folder.mkdir()
        (folder / "weights").write_text(content)
    remover = Remover()
    _give_name(temporary, final, remover)
    assert (final / "weights").read_text() == "new"
    remover.wait(20)
    assert names(tmp_path) == {"iter_0000002"}


def test_a_checkpoint_keeps_its_name_if_its_successor_cannot_have_it(tmp_path: Path) -> None:
    final = tmp_path / "iter_0000002"
    final.mkdir()
    with pytest.raises(FileNotFoundError):
        _give_name(tmp_path / "iter_0000002.tmp", final, Remover())
    assert names(tmp_path) == {"iter_0000002"}


def test_the_last_checkpoint_is_published_before_the_last_evaluation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tiny("train_iters=2", "eval_iters=1", "async_save=true", f"save={tmp_path}")
    data = TrainData(*(RandomSamples(run.model.vocab_size, run.model.seq_length),) * 2)

    def gone(*_arguments: object) -> None:
        raise OSError("the held-out shard is gone")

    monkeypatch.setattr(loop_module, "evaluate_batches", gone)
    with pytest.raises(OSError, match="held-out shard is gone"):
        train(run, data=data, echo=lambda _line: None)
    assert (tmp_path / "iter_0000002" / CHECKSUMS).is_file()


def test_every_file_of_a_checkpoint_has_a_checksum(tmp_path: Path) -> None:
    run_training(tiny("train_iters=1", *folders(tmp_path)))
    folder = tmp_path / "iter_0000001"
    assert set(read_checksums(folder)) == {
        "__0_0.distcp",
        ".metadata",
        "metadata.json",
        "parameterization.json",
    }
    assert {path.name for path in folder.iterdir()} == {*read_checksums(folder), CHECKSUMS}
    record = json.loads((folder / "parameterization.json").read_text())
    assert record["provenance"]["world_size"] == 1
    assert record["provenance"]["packages"]["megatron-core"] == "0.19.2"
    assert record["provenance"]["revision"].startswith("0.")


def test_a_failed_run_stops_its_writer(gate: Gate, tmp_path: Path) -> None:
    run = tiny("async_save=true", f"save={tmp_path}")
    with trained(run, steps=1) as state:
        saver = CheckpointSaver(run)
        saver.start(state)
        assert len(writers()) == 1
        saver.close()
        assert writers() == []
        assert not saver.in_flight


def test_counters_and_the_memory_of_bad_steps_come_back(tmp_path: Path) -> None:
    with trained(tiny(), steps=2) as state:
        state.skipped_iterations, state.health = 3, {"losses": [1.5, 2.0], "skipped": 3}
        folder = save_checkpoint(state, tmp_path)
    with trained(tiny(), steps=0) as state:
        load_checkpoint(state, folder, weights_only=False)
        assert (state.iteration, state.consumed_samples, state.skipped_iterations) == (2, 8, 3)
        assert state.health == {"losses": [1.5, 2.0], "skipped": 3}


def test_many_chunks_keep_their_order() -> None:
    assert chunk_names(1) == ["model"]
    assert chunk_names(12)[1::9] == ["model1", "model10"]
