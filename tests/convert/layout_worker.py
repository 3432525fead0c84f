"""One rank of a job that trains on several layouts and reshards in between.

Started as ``python -m tests.convert.layout_worker JOB RANK``; the job is JSON with the world size,
a port and an output folder; layouts are those of ``tests.convert.layouts``. Rank 0 writes
``losses.json``.
"""

from __future__ import annotations

from pathlib import Path

import torch.distributed as dist

from megatron_mup.convert.reshard import reshard
from megatron_mup.training.loop import TrainData, train
from megatron_mup.training.processes import Launch
from tests.convert.layouts import BOXES, LAYERS, ONE, SPREAD, options
from tests.convert.small_checkpoints import small_run
from tests.distributed.ranks import joined, write_result
from tests.random_samples import RandomSamples


def losses(launch: Launch, *overrides: str) -> list[float]:
    """What a run logs."""
    run = small_run(*overrides)
    samples = RandomSamples(run.model.vocab_size, run.model.seq_length)
    result = train(run, data=TrainData(samples), launch=launch, echo=lambda _line: None)
    return [row["lm loss"] for row in result.history]


def main() -> None:
    """Train, reshard to one rank and back, and train on."""
    with joined() as (job, launch):
        root = Path(job["output"])
        spread = options(*LAYERS, *SPREAD)
        losses(launch, *spread, "train_iters=3", f"save={root / 'spread'}")
        losses(launch, *options(*BOXES), "train_iters=2", f"save={root / 'boxes'}")
        if launch.rank == 0:
            reshard(root / "spread", root / "one", layout=ONE)
            reshard(root / "one", root / "back", layout=SPREAD)
        dist.barrier()
        found = {
            name: losses(launch, *spread, "train_iters=6", f"load={root / name}")
            for name in ("spread", "back")
        }
        if launch.rank == 0:
            write_result(job, "losses.json", found)


if __name__ == "__main__":
    main()
