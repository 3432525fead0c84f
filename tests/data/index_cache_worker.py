"""One of several processes that build datasets on one cache at the same time."""

from __future__ import annotations

import importlib
import json
import logging
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

DEADLINE_SECONDS = 90


def wait_for(folder: Path, *names: str) -> None:
    """Wait until all of these files are there."""
    end = time.monotonic() + DEADLINE_SECONDS
    while not all((folder / name).exists() for name in names):
        assert time.monotonic() < end, f"{names} did not come"
        time.sleep(0.01)


class _Waiting(logging.Handler):
    """Tells the others, with a file, that this process waits for the cache's lock."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path

    def emit(self, record: logging.LogRecord) -> None:
        if "waiting for another job" in record.getMessage():
            self.path.touch()


def build(job: dict[str, Any], rank: int) -> None:
    """Build, and write what was read and how many files this process saved."""
    import numpy as np
    import torch.distributed as dist

    from megatron_mup import platform
    from megatron_mup.data.datasets import build_datasets
    from tests.configurations import tiny

    # What takes seconds comes before the start, or the first has finished when the last begins.
    platform.prepare()
    importlib.import_module("megatron.core.datasets.gpt_dataset")
    importlib.import_module("megatron.core.datasets.blended_megatron_dataset_builder")
    folder = Path(job["output"])
    killed = job.get("killed") == rank
    others = [f"waiting-{number}" for number in range(job["world_size"]) if number != rank]
    if job["one_job"]:
        address = f"tcp://127.0.0.1:{job['port']}"
        dist.init_process_group("gloo", init_method=address, rank=rank, world_size=4)
    logging.getLogger("megatron_mup").addHandler(_Waiting(folder / f"waiting-{rank}"))
    saved: list[str] = []
    save = np.save

    def counted(path: str, array: Any, **options: Any) -> None:
        saved.append(path)
        save(path, array, **options)
        if killed and len(saved) == 3:
            # Half a file under its final name, and the lock held: where a kill hurts most.
            os.truncate(path, os.path.getsize(path) // 2)
            (folder / "half").touch()
            wait_for(folder, *others)
            os.kill(os.getpid(), signal.SIGKILL)
        if len(saved) == 1 and not job["one_job"] and "killed" not in job:
            # The other jobs have all met the lock while this one has most of the work before it.
            wait_for(folder, *others)

    np.save = counted
    (folder / f"ready-{rank}").touch()
    wait_for(folder, *(f"ready-{number}" for number in range(job["world_size"])))
    if "killed" in job and not killed:
        wait_for(folder, "half")
    train, valid = build_datasets(tiny(*job["options"]), train_samples=90, valid_samples=20)
    assert valid is not None
    read = [[part[n]["tokens"].tolist() for n in range(20)] for part in (train, valid)]
    (folder / f"{rank}.json").write_text(json.dumps({"read": read, "saved": len(saved)}))


def main() -> None:
    job, rank = json.loads(Path(sys.argv[1]).read_text()), int(sys.argv[2])
    if job.get("killed") != rank:
        build(job, rank)
        return
    # Before torch is imported: the child dies, and this process tells how.
    child = os.fork()
    if child == 0:
        build(job, rank)
        os._exit(1)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status)
    assert os.WTERMSIG(status) == signal.SIGKILL


if __name__ == "__main__":
    main()
