"""One rank of a job that trains, saves and exchanges optimizer states between layouts.

Started as ``python -m tests.checkpoint.optimizer_worker JOB RANK``; the job is JSON with the world
size, a port, an output folder, ``trained`` (cells whose losses are wanted), ``saved`` (cells whose
state after three steps is wanted) and ``moved`` (pairs of saved cells: the second loads the first).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron_mup.checkpoint.optimizer_state import optimizer_tree
from megatron_mup.config import RunConfig
from megatron_mup.training.processes import Launch, parallel_processes
from megatron_mup.training.state import TrainState, build_state
from tests.configurations import tiny
from tests.distributed.ranks import joined, write_result
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
    with joined() as (job, launch):
        root = Path(job["output"])
        runs = {name: tiny(*overrides) for name, overrides in job["cells"].items()}
        result: dict[str, dict[str, Any]] = {
            "trained": {name: trained(runs[name], launch) for name in job["trained"]},
            "saved": {name: saved(runs[name], launch, root / name) for name in job["saved"]},
        }
        result["moved"] = {
            f"{source}>{target}": moved(
                runs[target], launch, root / source, root / f"{source}>{target}"
            )
            for source, target in job["moved"]
        }
        write_result(job, f"rank{launch.rank}.json", result)


if __name__ == "__main__":
    main()
