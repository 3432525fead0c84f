"""One rank of the checkpoint layout test: saves on each layout, resumes on every other.

Started as ``python -m tests.distributed.checkpoint_worker JOB RANK``. The job names the layouts
(configuration overrides each), the options of all, and the folder; rank 0 writes ``losses.json``
with the losses after the resume, by layout of the save and of the resume.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch

from megatron_mup.training.loop import TrainData, train
from megatron_mup.training.processes import Launch
from tests.configurations import tiny
from tests.random_samples import RandomSamples


def silent(_line: str) -> None:
    """Print nothing."""


def losses_of(options: list[str], launch: Launch) -> list[float]:
    """Losses of a run; the ranks' processes stay."""
    run = tiny(*options)
    samples = RandomSamples(run.model.vocab_size, run.model.seq_length)
    result = train(run, data=TrainData(samples), launch=launch, echo=silent)
    return [row["lm loss"] for row in result.history if "lm loss" in row]


def all_pairs(job: dict[str, Any], launch: Launch) -> dict[str, dict[str, list[float]]]:
    """Losses after a resume, for each layout of the save and each of the resume."""
    found: dict[str, dict[str, list[float]]] = {}
    for saver, options in job["layouts"].items():
        folder = Path(job["output"]) / saver
        losses_of(
            [*job["common"], *options, "train_iters=3", "async_save=true", f"save={folder}"], launch
        )
        found[saver] = {}
        for reader, other in job["layouts"].items():
            resumed = [*job["common"], *other, "train_iters=6", f"load={folder}"]
            found[saver][reader] = losses_of(resumed, launch)
    return found


def main() -> None:
    """Run all pairs and write what the test compares."""
    torch.set_num_threads(1)
    job, rank = json.loads(Path(sys.argv[1]).read_text()), int(sys.argv[2])
    launch = Launch(rank, job["world_size"], rank, "127.0.0.1", job["port"])
    torch.distributed.init_process_group(
        "gloo",
        init_method=f"tcp://{launch.address}:{launch.port}",
        rank=rank,
        world_size=launch.world_size,
    )
    found = all_pairs(job, launch)
    if rank == 0:
        (Path(job["output"]) / "losses.json").write_text(json.dumps(found))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
