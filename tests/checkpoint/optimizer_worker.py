"""One rank of a job that trains, saves and exchanges optimizer states between layouts.

Started as ``python -m tests.checkpoint.optimizer_worker JOB RANK``; the job is JSON with the world
size, a port, an output folder, ``trained`` (cells whose losses are wanted), ``saved`` (cells whose
state after three steps is wanted) and ``moved`` (pairs of saved cells: the second loads the first).
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch

from megatron_mup.checkpoint.optimizer_state import optimizer_tree
from megatron_mup.config import RunConfig
from megatron_mup.training.processes import Launch, parallel_processes
from megatron_mup.training.state import TrainState, build_state
from tests.configurations import tiny
from tests.optimizer.trained_runs import load_state, model_tree, save_state, train_steps

STEPS = 10


def trained(run: RunConfig, launch: Launch) -> list[float]:
    """Losses of ten steps."""
    with parallel_processes(run, launch):
        return train_steps(build_state(run), STEPS)


def elements_held(state: TrainState) -> int:
    """Elements of exp_avg in this rank's tree."""
    tensors = optimizer_tree(state, model_tree(state), loading=True)["tensors"]
    return sum(
        piece.data.numel() for kinds in tensors.values() for piece in kinds["exp_avg"].values()
    )


def saved(run: RunConfig, launch: Launch, folder: Path) -> dict[str, Any]:
    """Save after three steps, then go on to six."""
    with parallel_processes(run, launch):
        state = build_state(run)
        train_steps(state, 3)
        save_state(state, folder)
        held = 0 if run.optimizer.optimizer.value == "muon" else elements_held(state)
        return {"losses": train_steps(state, 3), "held": held}


def moved(run: RunConfig, launch: Launch, folder: Path, again: Path) -> dict[str, Any]:
    """Load what another layout saved, save it again, then go on to six."""
    with parallel_processes(run, launch):
        state = build_state(run)
        load_state(state, folder)
        save_state(state, again)
        return {"losses": train_steps(state, 3)}


def main() -> None:
    """Work through the job and write ``rankR.json``."""
    torch.set_num_threads(1)
    job, rank = json.loads(Path(sys.argv[1]).read_text()), int(sys.argv[2])
    launch = Launch(rank, job["world_size"], rank, "127.0.0.1", job["port"])
    torch.distributed.init_process_group(
        "gloo",
        init_method=f"tcp://{launch.address}:{launch.port}",
        rank=rank,
        world_size=launch.world_size,
    )
    root, cells = Path(job["output"]), job["cells"]
    result: dict[str, dict[str, Any]] = {
        "trained": {name: trained(tiny(*cells[name]), launch) for name in job["trained"]},
        "saved": {name: saved(tiny(*cells[name]), launch, root / name) for name in job["saved"]},
    }
    result["moved"] = {
        f"{source}>{target}": moved(
            tiny(*cells[target]), launch, root / source, root / f"{source}>{target}"
        )
        for source, target in job["moved"]
    }
    (root / f"rank{rank}.json").write_text(json.dumps(result))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
