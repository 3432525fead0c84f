"""The memory model against what Megatron's buffers, optimizers and autograd hold in 2 processes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_mup.memory import rank_memory
from megatron_mup.planning.contents import chunk_contents
from tests.configurations import tiny
from tests.distributed.spawn import run_ranks

RANKS = 2
COMMON = (
    "hidden_size=128",
    "base_hidden_size=128",
    "num_layers=4",
    "base_num_layers=4",
    "vocab_size=512",
    "seq_length=64",
    "global_batch_size=16",
    "micro_batch_size=2",
)
TP2, PP2 = "tensor_model_parallel_size=2", "pipeline_model_parallel_size=2"
SP, VIRTUAL = "sequence_parallel=true", "virtual_pipeline_model_parallel_size=2"
SHARDED = "use_distributed_optimizer=true"
BF16, LION = "bf16=true", "optimizer.optimizer=lion"
FULL = ("recompute_granularity=full", "recompute_num_layers=1")
UNFUSED = ("attention_backend=local", "num_attention_heads=8", "base_kv_channels=16")
LAYOUTS: list[dict[str, tuple[str, ...]]] = [
    {
        "TP2 SP fp32": (TP2, SP),
        "TP2 SP bf16 full": (TP2, SP, BF16, *FULL, "recompute_method=uniform"),
        "TP2 bf16 swiglu": (TP2, BF16, "activation=swiglu", "num_query_groups=2"),
        "TP2 selective": (TP2, BF16, LION, *UNFUSED, "recompute_granularity=selective"),
    },
    {
        "PP2 bf16": (PP2, BF16),
        "PP2 fp32 block": (PP2, *FULL, "recompute_method=block"),
    },
    {
        "PP2 virtual bf16": (PP2, VIRTUAL, BF16, "activation=squared_relu"),
        "PP2 virtual lion": (PP2, VIRTUAL, LION, "activation=relu"),
    },
    {
        "DP2 fp32": (SHARDED,),
        "DP2 bf16": (SHARDED, BF16),
        "DP2 bf16 whole": (BF16,),
        "DP2 lion full": (SHARDED, BF16, LION, *FULL, "recompute_method=block"),
        "DP2 muon": (SHARDED, BF16, "optimizer.optimizer=muon"),
    },
]
CELLS = {name: options for layout in LAYOUTS for name, options in layout.items()}


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with the counted bytes of every cell and rank."""
    folder = tmp_path_factory.mktemp("memory")
    layouts = [{name: [*COMMON, *options] for name, options in cells.items()} for cells in LAYOUTS]
    run_ranks("tests.planning.memory_worker", {"world_size": RANKS, "layouts": layouts}, folder)
    return folder


@pytest.mark.parametrize("name", CELLS)
def test_state_is_what_is_held_and_activations_are_within_a_tenth(
    name: str, measured: Path
) -> None:
    run = tiny(*COMMON, *CELLS[name])
    stages = run.parallel.pipeline_model_parallel_size
    data_size = RANKS // run.parallel.model_parallel_size
    for rank in range(RANKS):
        held = json.loads((measured / f"{name}.rank{rank}.json").read_text())
        stage = rank * stages // RANKS
        estimate = rank_memory(
            run, chunk_contents(run, stage), stage=stage, data_parallel_size=data_size
        )
        shares = {part: getattr(estimate, part) / held[part] for part in held}
        activations = shares.pop("activations")
        # Counted element by element; buffers of this size need no padding.
        assert shares == {"weights": 1.0, "gradients": 1.0, "optimizer": 1.0}, (stage, held)
        assert activations == pytest.approx(1.0, abs=0.1), (stage, held)
