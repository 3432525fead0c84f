"""One rank of the checkpoint layout test: saves on each layout, resumes on every other.

Started as ``python -m tests.distributed.checkpoint_worker JOB RANK``. The job names the layouts
(configuration overrides each), the options of all, and ``folders``, the checkpoints of other jobs
by name. Rank 0 writes ``found.json``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron_mup.training.loop import TrainData, train
from megatron_mup.training.processes import Launch
from tests.configurations import tiny
from tests.distributed.ranks import joined, write_result
from tests.random_samples import RandomSamples

Trajectory = dict[str, list[float]]
"""``lm loss`` and ``grad-norm`` of each step, unrounded."""
Found = dict[str, dict[str, Trajectory]]
"""By what was resumed and the layout that resumed it."""

SAVED, END = "train_iters=3", "train_iters=6"
"""Ends of the run that saves, and of the one that continues it."""


def silent(_line: str) -> None:
    """Print nothing."""


def trajectory(options: list[str], launch: Launch) -> Trajectory:
    """What a run logs; the ranks' processes stay."""
    run = tiny(*options)
    samples = RandomSamples(run.model.vocab_size, run.model.seq_length)
    result = train(run, data=TrainData(samples), launch=launch, echo=silent)
    return {key: [row[key] for row in result.history] for key in ("lm loss", "grad-norm")}


def save_all(job: dict[str, Any], launch: Launch) -> dict[str, str]:
    """Folders of the checkpoints after three steps, by layout; written in the background."""
    folders = {name: str(Path(job["output"]) / name) for name in job["layouts"]}
    for name, options in job["layouts"].items():
        trajectory(
            [*job["common"], *options, SAVED, "async_save=true", f"save={folders[name]}"], launch
        )
    return folders


def continue_all(job: dict[str, Any], folders: dict[str, str], launch: Launch) -> Found:
    """Runs after the resume of each folder on each layout, and without one under "nothing"."""
    loads = {"nothing": [], **{saver: [f"load={path}"] for saver, path in folders.items()}}
    return {
        saver: {
            reader: trajectory([*job["common"], *options, END, *load], launch)
            for reader, options in job["layouts"].items()
        }
        for saver, load in loads.items()
    }


def main() -> None:
    """Save, resume, and write what the test compares."""
    with joined() as (job, launch):
        found = continue_all(job, {**job["folders"], **save_all(job, launch)}, launch)
        if launch.rank == 0:
            write_result(job, "found.json", found)


if __name__ == "__main__":
    main()
