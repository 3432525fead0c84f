"""``megatron-mup train --preset``, as a user types it, on padded documents."""

from __future__ import annotations

import math
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.distributed.spawn import ROOT

SMALL = (
    "lr=0.05",
    "num_layers=2",
    "vocab_size=128",
    "seq_length=32",
    "global_batch_size=16",
    "train_iters=12",
    "lr_warmup_iters=3",
    "log_interval=1",
    "eval_iters=0",
)


def write_documents(prefix: Path) -> None:
    """A shard of counting documents, each shorter or longer than a sequence, ended by id 1."""
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.uint16)
    generator = np.random.default_rng(0)
    for length in generator.integers(4, 48, size=200):
        start = int(generator.integers(0, 126))
        document = [*(2 + (start + np.arange(length)) % 126), 1]
        builder.add_document(np.array(document, dtype=np.uint16), [len(document)])
    builder.finalize(f"{prefix}.idx")


# Two imports of torch and megatron while other jobs use the machine.
@pytest.mark.timeout(400)
def test_a_user_trains_the_papers_largest_experiment_small_on_a_cpu(tmp_path: Path) -> None:
    write_documents(tmp_path / "counting")
    preset = ["--preset", "combined", "--width", "64", "--head-dim", "16"]
    data = f"train_data_path=[{tmp_path / 'counting'}]"
    finished = subprocess.run(
        [sys.executable, "-m", "megatron_mup", "train", *preset, *SMALL, data],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert finished.returncode == 0, finished.stderr[-3000:]
    # The absolute rule at F = 4 M: alpha / M and alpha / (4 M). Warmup starts at 1e-4 of the peak.
    for number in (f"{0.05 / 64:.4g}", f"{0.05 / 256:.4g}", "learning-rate 5.000e-06"):
        assert number in finished.stdout
    losses = [float(text) for text in re.findall(r"lm loss (\S+)", finished.stdout)]
    assert len(losses) == 12
    # Zero queries and small logits: the first guess is uniform over 128 ids.
    assert losses[0] == pytest.approx(math.log(128), abs=0.02)
    assert all(math.isfinite(loss) for loss in losses)
    # The first step's rate is next to nothing.
    assert losses[1:] == sorted(losses[1:], reverse=True)
    assert losses[-1] < losses[0] - 0.3
