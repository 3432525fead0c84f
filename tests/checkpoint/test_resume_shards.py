"""Resuming on real token shards continues the data order exactly, over epochs."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

from megatron_mup.config import RunConfig
from megatron_mup.errors import CheckpointError
from megatron_mup.training.loop import train
from tests.configurations import tiny

VOCABULARY = 96


def make_shard(prefix: Path, documents: int) -> None:
    """Write a shard of random documents that end with id 2."""
    generator = np.random.default_rng(len(prefix.name))
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=DType.optimal_dtype(VOCABULARY))
    for _ in range(documents):
        length = int(generator.integers(5, 60))
        tokens = (generator.random(length) ** 2 * (VOCABULARY - 3)).astype(np.int64) + 3
        tokens[-1] = 2
        builder.add_document(torch.from_numpy(tokens), [length])
    builder.finalize(f"{prefix}.idx")


def losses(run: RunConfig) -> list[float]:
    """Training losses of a run on its configured shards."""
    result = train(run, echo=lambda _line: None)
    return [row["lm loss"] for row in result.history if "lm loss" in row]


def test_resume_over_several_epochs_of_a_shard_is_bit_exact(tmp_path: Path) -> None:
    for name in ("text_train", "text_valid"):
        make_shard(tmp_path / name, documents=40)
    # About 75 sequences of 16 tokens in the shard; 60 steps of 4 are more than three epochs, and
    # 30 steps fewer than two.
    common = [
        f"train_data_path=[{tmp_path / 'text_train'}]",
        f"valid_data_path=[{tmp_path / 'text_valid'}]",
        "eval_iters=1",
        "eval_interval=10",
        "lr_decay_iters=60",
    ]
    whole = losses(tiny(*common, "train_iters=60"))
    checkpoints = tmp_path / "checkpoints"
    first = losses(tiny(*common, "train_iters=30", f"save={checkpoints}"))
    second = losses(tiny(*common, "train_iters=60", f"load={checkpoints}"))
    assert first + second == whole
    assert len(whole) == 60


def test_a_run_on_a_blend_file_of_sets_resumes_and_knows_its_shards(tmp_path: Path) -> None:
    for number in range(2):
        make_shard(tmp_path / f"set-0000{number}-of-00002", documents=40)
    make_shard(tmp_path / "single", documents=40)
    blend = tmp_path / "blend.json"
    blend.write_text(json.dumps({"train": ["0.7", f"{tmp_path}/set", "0.3", f"{tmp_path}/single"]}))
    common = [f"per_split_data_args_path={blend}", "lr_decay_iters=20"]
    whole = losses(tiny(*common, "train_iters=20"))
    checkpoints = tmp_path / "checkpoints"
    first = losses(tiny(*common, "train_iters=10", f"save={checkpoints}"))
    resumed = [*common, "train_iters=20", f"load={checkpoints}"]
    assert first + losses(tiny(*resumed)) == whole
    make_shard(tmp_path / "set-00001-of-00002", documents=41)
    with pytest.raises(CheckpointError, match="sha256 of the training shards was"):
        losses(tiny(*resumed))
