"""Fill one real stage of a 10B model and write what it cost to stdout; run as a process of its own.

128 ranks: TP 8 x PP 4 x DP 4. The first stage holds 3 of 12 layers and the embedding; this is
tensor-parallel rank 3, whose vocabulary rows start and end inside a block of the random streams.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import torch

from megatron_mup.model.initialization import Shard, initialize
from tests.configurations import tiny
from tests.model.sharded_stage import ShardedStage

TEN_BILLION = (
    "hidden_size=8192",
    "num_layers=12",
    "num_attention_heads=64",
    "ffn_hidden_size=32768",
    "vocab_size=32128",
    "activation=squared_relu",
)


def peak_bytes() -> int:
    """Largest resident size of this program so far (Linux).

    Not ``ru_maxrss``: it survives exec, so a child of a large process starts with its peak.
    """
    status = Path("/proc/self/status").read_text(encoding="ascii")
    (line,) = (line for line in status.splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024


def cpu_seconds() -> float:
    """User and system time of this process, all threads."""
    return time.process_time()


def corner_stds(stage: torch.nn.Module) -> dict[str, float]:
    """Std over the first and last 64 rows and columns of each weight: all of it was written."""
    stds = {}
    for name, weight in stage.named_parameters():
        ends = torch.cat([weight[:64].flatten(), weight[-64:].flatten()])
        sides = torch.cat([weight[:, :64].flatten(), weight[:, -64:].flatten()])
        stds[name] = torch.cat([ends, sides]).std().item()
    return stds


def main() -> None:
    """Build, fill, measure."""
    run = tiny(*TEN_BILLION)
    stage = ShardedStage(run.model.shape, 8, (0, 1, 2), readout=False)
    memory, seconds = peak_bytes(), cpu_seconds()
    initialize(stage, run.table, run.model.shape, seed=1, shard=Shard(3, 8))
    report = {
        "seconds": cpu_seconds() - seconds,
        "bytes": peak_bytes() - memory,
        "values": sum(weight.numel() for weight in stage.parameters()),
    }
    json.dump({**report, "stds": corner_stds(stage)}, sys.stdout)


if __name__ == "__main__":
    main()
