"""The memory model against what the GPU's allocator has handed out at the peak of a step."""

from __future__ import annotations

import pytest
import torch

from megatron_mup.memory import GIB, rank_memory, workspace_bytes
from megatron_mup.planning.contents import chunk_contents
from megatron_mup.training.batches import micro_batches
from megatron_mup.training.processes import Launch, parallel_processes
from megatron_mup.training.state import build_state
from megatron_mup.training.step import train_step
from tests.configurations import tiny
from tests.gpu.conftest import Measured
from tests.random_samples import RandomSamples

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(300)]

# Large enough that the allocator's rounding and cuBLAS' workspace are small beside it.
COMMON = (
    "transformer_impl=transformer_engine",
    "bf16=true",
    "num_layers=4",
    "base_num_layers=4",
    "hidden_size=1024",
    "num_attention_heads=8",
    "vocab_size=8192",
    "seq_length=1024",
    "micro_batch_size=8",
    "global_batch_size=16",
)
CELLS = {
    "bf16": (),
    "bf16 swiglu": ("activation=swiglu",),
    "bf16 full recomputation": (
        "recompute_granularity=full",
        "recompute_method=uniform",
        "recompute_num_layers=1",
    ),
    "FP8": ("fp8_format=hybrid", "fp8_recipe=tensorwise"),
}


@pytest.mark.parametrize("name", CELLS)
def test_the_allocators_peak_is_within_a_tenth_of_the_estimate(
    name: str, measured: Measured
) -> None:
    run = tiny(*COMMON, *CELLS[name])
    estimate = rank_memory(run, chunk_contents(run, 0), stage=0, data_parallel_size=1)
    with parallel_processes(run, Launch()):
        state = build_state(run)
        for step in range(2):
            # The optimizer's moments are made in the first step.
            torch.cuda.reset_peak_memory_stats()
            batches = micro_batches(
                RandomSamples(run.model.vocab_size, run.model.seq_length),
                first=step * run.training.global_batch_size,
                batch_size=run.training.global_batch_size,
                micro_batch_size=run.training.micro_batch_size,
                data_rank=0,
                data_size=1,
            )
            train_step(state, batches, 2)
        peak = torch.cuda.max_memory_allocated()

    expected = estimate.total + workspace_bytes(run, readout=True)
    measured("peak, estimate in GiB", f"{peak / GIB:.3f}, {expected / GIB:.3f}")
    assert peak == pytest.approx(expected, rel=0.1)
