"""One rank of the presets' layout test: the paper's trajectories, and the parts added to GPTModel.

Started as ``python -m tests.distributed.reference_worker JOB RANK``. The job is JSON: ``layouts``
(name -> options, experiments of the paper, cells of the added parts, and cells with a defect) and
``checkpoints`` (see ``checkpoint_worker``). Writes ``LAYOUT-NAME.rankR.json`` for each experiment
and cell, and ``resumed.json`` with the runs after the resumes.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from megatron_mup.config import RunConfig
from megatron_mup.model.naming import canonical_names
from megatron_mup.training.batches import micro_batches
from megatron_mup.training.processes import (
    Launch,
    check_layout,
    parallel_processes,
    sum_over_data_parallel,
)
from megatron_mup.training.state import TrainState, build_state
from megatron_mup.training.step import train_step
from tests.configurations import tiny
from tests.distributed.checkpoint_worker import continue_all, save_all
from tests.distributed.masked_samples import MaskedSamples
from tests.distributed.ranks import joined, write_result
from tests.distributed.worker_patches import patched
from tests.training.trajectories import follow, preset_run, to_plain

ADDED = ("embedding.norm.weight", "output_layer.bias")
"""The parameters that GPTModel does not have by itself."""

STEPS = 6


def added_parameters(state: TrainState) -> dict[str, torch.nn.Parameter]:
    """Those of this rank, by name."""
    return {
        name: dict(chunk.named_parameters())[local]
        for chunk in state.model_chunks
        for local, name in canonical_names(chunk).items()
        if name in ADDED
    }


def train_cell(run: RunConfig, launch: Launch) -> dict[str, Any]:
    """Six steps on masked samples; needs the parallel state of the run's layout.

    Returns:
        losses and gradient norms, and of the added parameters on this rank the gradients of the
        first step (the distributed optimizer keeps only its part) and the final values.
    """
    # Megatron may be imported only after this package.
    from megatron.core import parallel_state

    data_size = check_layout(run, launch.world_size)
    samples = MaskedSamples(run.model.vocab_size, run.model.seq_length)
    state, training = build_state(run), run.training
    result: dict[str, Any] = {"losses": [], "norms": []}
    for step in range(STEPS):
        batches = micro_batches(
            samples,
            first=step * training.global_batch_size,
            batch_size=training.global_batch_size,
            micro_batch_size=training.micro_batch_size,
            data_rank=parallel_state.get_data_parallel_rank(),
            data_size=data_size,
        )
        count = training.global_batch_size // training.micro_batch_size // data_size
        report = train_step(state, batches, count)
        total, tokens = sum_over_data_parallel(report.loss_sum_and_tokens.double()).tolist()
        result["losses"].append(total / tokens)
        result["norms"].append(report.grad_norm)
        if step == 0:
            result["gradients"] = {
                name: parameter.main_grad.tolist()
                for name, parameter in added_parameters(state).items()
            }
    finals = added_parameters(state).items()
    return result | {"values": {name: parameter.tolist() for name, parameter in finals}}


def _run_layout(name: str, layout: dict[str, Any], launch: Launch, output: Path) -> None:
    experiments = {
        experiment: preset_run(experiment, *layout["options"], *options)
        for experiment, options in layout["experiments"].items()
    }
    cells = {cell: tiny(*options, *layout["options"]) for cell, options in layout["cells"].items()}
    results = {}
    with parallel_processes(next(iter({**experiments, **cells}.values())), launch):
        for experiment, run in experiments.items():
            results[experiment] = to_plain(follow(run, experiment))
        for cell, run in cells.items():
            results[cell] = train_cell(run, launch)
        for cell, defect in layout["defects"].items():
            with patched([defect]):
                results[defect] = train_cell(cells[cell], launch)
    for key, result in results.items():
        (output / f"{name}-{key}.rank{launch.rank}.json").write_text(json.dumps(result))


def main() -> None:
    """Train everything that the job names."""
    with joined() as (job, launch):
        for name, layout in job["layouts"].items():
            _run_layout(name, layout, launch, Path(job["output"]))
        resumed = {}
        for name, model in job["checkpoints"].items():
            part = {"output": str(Path(job["output"]) / name), **model}
            resumed[name] = continue_all(part, save_all(part, launch), launch)
        if launch.rank == 0:
            write_result(job, "resumed.json", resumed)


if __name__ == "__main__":
    main()
