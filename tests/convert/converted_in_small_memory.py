"""Writes, converts and reshards a model in a process of its own and prints how its memory grew.

The source draws each tensor when it is read, so nothing but the conversions holds weights. What is
counted is the process's largest resident set (VmHWM) over what it was when a tiny model had gone
the same way: all of torch's own allocations, and no page cache. Started with a folder; prints the
growth of each conversion in bytes, as JSON.
"""

from __future__ import annotations

import ctypes
import json
import sys
from collections.abc import Callable
from pathlib import Path

from megatron_mup import platform

platform.prepare()

from megatron_mup.convert.megatron_source import MegatronSource  # noqa: E402
from megatron_mup.convert.megatron_target import write_megatron  # noqa: E402
from megatron_mup.convert.reshard import reshard  # noqa: E402
from tests.convert.memory_weights import DrawnWeights  # noqa: E402
from tests.convert.small_checkpoints import LLAMA, small_run  # noqa: E402

LARGE = (
    "num_layers=24",
    "hidden_size=256",
    "ffn_hidden_size=1024",
    "vocab_size=8192",
    "base_num_layers=24",
)
"""128 MiB in fp32, of which embedding and readout are 8 MiB each: the largest tensors."""


def resident(kind: str) -> int:
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return 1024 * next(int(line.split()[1]) for line in status.splitlines() if kind in line)


def growth(work: Callable[[], object]) -> int:
    """Bytes by which the resident set grows at most during some work."""
    # What was freed before must not be there to be used again (glibc).
    ctypes.CDLL(None).malloc_trim(0)
    # Makes the largest resident set that of now (proc(5)).
    Path("/proc/self/clear_refs").write_text("5")
    before = resident("VmRSS")
    work()
    return resident("VmHWM") - before


def convert(root: Path, *overrides: str) -> dict[str, int]:
    run = small_run(*LLAMA, "bf16=true", *overrides)
    drawn, first = DrawnWeights(run.model, run.table.multipliers), root / "a"
    return {
        "write": growth(lambda: write_megatron(drawn, first, run=run)),
        "convert": growth(lambda: write_megatron(MegatronSource(first), root / "b", run=run)),
        "reshard": growth(
            lambda: reshard(first, root / "c", layout=["tensor_model_parallel_size=2"])
        ),
        "reshard back": growth(
            lambda: reshard(root / "c", root / "d", layout=["tensor_model_parallel_size=1"])
        ),
        "stored": sum(path.stat().st_size for path in first.glob("*/*.distcp")),
    }


def main() -> None:
    """Warm up, then measure."""
    root = Path(sys.argv[1])
    convert(root / "tiny")
    sys.stdout.write(json.dumps(convert(root / "large", *LARGE)))


if __name__ == "__main__":
    main()
