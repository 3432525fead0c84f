"""Freed tensors stay with the process; a fresh one, because heaps remember what ran before."""

from __future__ import annotations

import subprocess
import sys

# 256 MiB in blocks like activations, freed together, then wanted again: 65536 pages of 4 KiB.
PROGRAM = """
import resource, torch
from megatron_mup import platform
platform.prepare()
for _ in range(4):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    blocks = [torch.empty(4 << 20).fill_(1.0) for _ in range(16)]
    del blocks
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def test_freed_activations_are_not_faulted_in_again() -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True
    )
    assert int(done.stdout) < 1000
