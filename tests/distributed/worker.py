"""One rank of a test run: trains every cell of a job and writes what the test compares.

Started as ``python -m tests.distributed.worker JOB RANK``; the job is JSON with the world size, a
port, an output folder and the cells (a name and configuration overrides each).
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megatron_mup.config import RunConfig
from megatron_mup.model.initialization import part_view
from megatron_mup.model.naming import rows_of_parameters
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
from tests.random_samples import RandomSamples

STEPS = 10


def logical_weights(state: TrainState) -> dict[str, np.ndarray]:
    """This rank's part of every logical tensor, by logical name."""
    parameters = dict(state.model_chunks[0].named_parameters())
    weights = {}
    for local, rows in rows_of_parameters(state.model_chunks[0], state.table).items():
        for row in rows:
            view = part_view(parameters[local].detach(), row.tensor.part, state.run.model.shape)
            # QKV views are grouped, [G, rows, M]; the logical matrix has its rows in that order.
            flat = view.flatten(0, 1) if view.dim() == 3 else view
            weights[row.tensor.name] = flat.clone().numpy()
    return weights


def run_cell(run: RunConfig, launch: Launch) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Initial weights, and losses and gradient norms of ten steps."""
    data_size = check_layout(run, launch.world_size)
    samples = RandomSamples(run.model.vocab_size, run.model.seq_length)
    with parallel_processes(run, launch):
        from megatron.core import parallel_state

        state = build_state(run)
        weights = logical_weights(state)
        losses, norms = [], []
        for step in range(STEPS):
            batches = micro_batches(
                samples,
                first=step * run.training.global_batch_size,
                batch_size=run.training.global_batch_size,
                micro_batch_size=run.training.micro_batch_size,
                data_rank=parallel_state.get_data_parallel_rank(),
                data_size=data_size,
            )
            count = run.training.global_batch_size // run.training.micro_batch_size // data_size
            report = train_step(state, batches, count)
            total, tokens = sum_over_data_parallel(report.loss_sum_and_tokens.double()).tolist()
            losses.append(total / tokens)
            norms.append(report.grad_norm)
        place = {
            "tensor_rank": parallel_state.get_tensor_model_parallel_rank(),
            "tensor_size": parallel_state.get_tensor_model_parallel_world_size(),
        }
    return weights, {"losses": losses, "norms": norms, **place}


def main() -> None:
    """Train every cell and write ``CELL.rankR.json`` and ``.npz``."""
    torch.set_num_threads(1)
    job, rank = json.loads(Path(sys.argv[1]).read_text()), int(sys.argv[2])
    launch = Launch(rank, job["world_size"], rank, "127.0.0.1", job["port"])
    torch.distributed.init_process_group(
        "gloo",
        init_method=f"tcp://{launch.address}:{launch.port}",
        rank=rank,
        world_size=launch.world_size,
    )
    for name, overrides in job["cells"].items():
        weights, result = run_cell(tiny(*overrides), launch)
        stem = Path(job["output"]) / f"{name}.rank{rank}"
        np.savez(f"{stem}.npz", **weights)
        Path(f"{stem}.json").write_text(json.dumps(result))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
