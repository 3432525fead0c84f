"""One rank of a test run: trains every cell of a job and writes what the test compares.

Started as ``python -m tests.distributed.worker JOB RANK``; the job is JSON with the world size, a
port, an output folder, and for each layout its patches and cells. The cells of a layout share
Megatron's groups, whose making costs more than a cell.
"""

from __future__ import annotations

import json
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
from megatron_mup.training.step import evaluate_batches, train_step
from tests.configurations import tiny
from tests.distributed.cells import STEPS
from tests.distributed.masked_samples import MaskedSamples
from tests.distributed.ranks import joined
from tests.distributed.worker_patches import patched
from tests.random_samples import RandomSamples

EVALUATED_AFTER = 5

Weights = dict[str, np.ndarray]


def logical_weights(state: TrainState) -> Weights:
    """This rank's part of every logical tensor, by logical name."""
    weights = {}
    for chunk in state.model_chunks:
        parameters = dict(chunk.named_parameters())
        for local, rows in rows_of_parameters(chunk, state.table).items():
            for row in rows:
                whole = parameters[local].detach()
                # An FP8 weight cannot be looked at in parts.
                if hasattr(parameters[local], "get_high_precision_init_val"):
                    whole = whole.dequantize()
                view = part_view(whole, row.tensor.part, state.run.model.shape)
                # QKV views are grouped, [G, rows, M]; the logical matrix has its rows in order.
                flat = view.flatten(0, 1) if view.dim() == 3 else view
                weights[row.tensor.name] = flat.clone().float().cpu().numpy()
    return weights


def optimizer_elements(state: TrainState) -> int:
    """Elements of the optimizer's moments on this rank."""
    return sum(
        moment.numel()
        for part in state.optimizer.chained_optimizers
        for moments in part.optimizer.state.values()
        for moment in moments.values()
        if isinstance(moment, torch.Tensor) and moment.dim() > 0
    )


def _global_loss(report: torch.Tensor) -> float:
    total, tokens = sum_over_data_parallel(report.double()).tolist()
    return float(total / tokens)


def run_cell(run: RunConfig, launch: Launch, *, masked: bool) -> tuple[Weights, dict[str, Any]]:
    """Initial weights, and what ten steps and an evaluation between them report.

    Needs the parallel state of the run's layout.
    """
    # Megatron may be imported only after this package.
    from megatron.core import parallel_state

    data_size = check_layout(run, launch.world_size)
    samples = (MaskedSamples if masked else RandomSamples)(
        run.model.vocab_size, run.model.seq_length
    )
    state = build_state(run)
    weights = logical_weights(state)
    result: dict[str, list[float]] = {"losses": [], "norms": [], "factors": [], "evaluation": []}
    training = run.training
    for step in range(STEPS):
        places = {
            "first": step * training.global_batch_size,
            "batch_size": training.global_batch_size,
            "micro_batch_size": training.micro_batch_size,
            "data_rank": parallel_state.get_data_parallel_rank(),
            "data_size": data_size,
        }
        count = training.global_batch_size // training.micro_batch_size // data_size
        if step == EVALUATED_AFTER:
            report = evaluate_batches(state, micro_batches(samples, **places), count)
            result["evaluation"].append(_global_loss(report))
        done = train_step(state, micro_batches(samples, **places), count)
        result["losses"].append(_global_loss(done.loss_sum_and_tokens))
        result["norms"].append(done.grad_norm)
        result["factors"].append(done.factor)
    place = {
        "tensor_rank": parallel_state.get_tensor_model_parallel_rank(),
        "tensor_size": parallel_state.get_tensor_model_parallel_world_size(),
    }
    return weights, {**result, **place, "optimizer_elements": optimizer_elements(state)}


def _run_layout(layout: dict[str, Any], launch: Launch, output: Path) -> None:
    cells = layout["cells"]
    with patched(layout["patches"]):
        runs = [tiny(*cell["overrides"]) for cell in cells]
        with parallel_processes(runs[0], launch):
            for cell, run in zip(cells, runs, strict=True):
                with patched(cell["mutation"]):
                    weights, result = run_cell(run, launch, masked=cell["masked"])
                stem = output / f"{cell['name']}.rank{launch.rank}"
                np.savez(f"{stem}.npz", **weights)
                Path(f"{stem}.json").write_text(json.dumps(result))


def main() -> None:
    """Train every cell and write ``CELL.rankR.json`` and ``.npz``."""
    with joined() as (job, launch):
        for layout in job["layouts"]:
            _run_layout(layout, launch, Path(job["output"]))


if __name__ == "__main__":
    main()
