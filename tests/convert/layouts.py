"""Checkpoints of four ranks: the layouts, and the job that trains on them once per session."""

from __future__ import annotations

from pathlib import Path

from tests.convert.small_checkpoints import GQA
from tests.distributed.spawn import run_ranks

LAYERS = ("num_layers=4", "base_num_layers=4")
SPREAD = (
    "tensor_model_parallel_size=2",
    "pipeline_model_parallel_size=2",
    "virtual_pipeline_model_parallel_size=2",
    "use_distributed_optimizer=true",
)
"""Every layer is a chunk of its own, on alternating stages."""
ONE = (
    "tensor_model_parallel_size=1",
    "pipeline_model_parallel_size=1",
    "virtual_pipeline_model_parallel_size=1",
    "use_distributed_optimizer=false",
)
THREE = ("num_layers=3", "base_num_layers=3", "bf16=true")
BOXES = (*THREE, "tensor_model_parallel_size=2", "use_distributed_optimizer=true")
"""Two data-parallel ranks, whose shares of the main weights meet inside the second layer."""

_COMMON = (*GQA, "global_batch_size=4", "micro_batch_size=1", "lr_decay_iters=6")


def options(*layout: str) -> tuple[str, ...]:
    """Overrides of ``small_run`` for a layout."""
    return (*_COMMON, *layout)


def train_on_layouts(folder: Path) -> Path:
    """Run the job; ``folder`` then holds ``spread``, ``one``, ``back``, ``boxes`` and losses."""
    run_ranks("tests.convert.layout_worker", {"world_size": 4}, folder)
    return folder
