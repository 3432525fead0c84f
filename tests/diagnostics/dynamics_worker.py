"""One rank of ``test_dynamics_layouts``: trains every cell and measures its updates.

Started as ``python -m tests.diagnostics.dynamics_worker JOB RANK``; the job is JSON with the world
size, a port, an output folder, and for each cell its overrides and patches.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from megatron_mup.diagnostics.dynamics import observer_for
from megatron_mup.training.loop import TrainData, train
from megatron_mup.training.processes import Launch
from tests.configurations import tiny
from tests.distributed.ranks import joined, write_result
from tests.distributed.worker_patches import patched
from tests.random_samples import RandomSamples


def measure(overrides: Sequence[str], path: Path, launch: Launch) -> list[dict[str, float]]:
    """Train a cell; the role means of its measured iterations, on this rank."""
    run = tiny(*overrides, f"diagnostics_path={path}")
    samples = RandomSamples(run.model.vocab_size, run.model.seq_length)
    result = train(
        run,
        data=TrainData(samples),
        launch=launch,
        observer=observer_for(run),
        echo=lambda _line: None,
    )
    return [row for row in result.history if "weight-norm/query" in row]


def main() -> None:
    """Write ``CELL.jsonl`` on the first rank and ``means.rankR.json`` on all."""
    with joined() as (job, launch):
        output, means = Path(job["output"]), {}
        for name, cell in job["cells"].items():
            with patched(cell["patches"]):
                means[name] = measure(cell["overrides"], output / f"{name}.jsonl", launch)
        write_result(job, f"means.rank{launch.rank}.json", means)


if __name__ == "__main__":
    main()
