from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import yaml

from tests.configurations import TINY
from tests.data.test_datasets import write_shard
from tests.faults.command_line import Starter
from tests.faults.runs import TRAIN_ITERS, Run


@pytest.fixture(scope="session")
def starter() -> Iterator[Starter]:
    """The zygote; its start costs what importing torch and megatron costs."""
    with Starter() as starter:
        yield starter


@pytest.fixture(scope="session")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small run over a real shard: 24 iterations, warmup, decay and clipping active."""
    folder = tmp_path_factory.mktemp("faults")
    generator = np.random.default_rng(0)
    documents = [[int(t) for t in (generator.random(40) ** 2 * 90) + 3] for _ in range(60)]
    shard = write_shard(folder / "shard", documents)
    options = {
        **TINY,
        "optimizer": {"lr": 0.015625, "weight_decay": 0.01, "clip_grad": 0.5},
        "schedule": {"lr_warmup_iters": 4},
        "training": {**TINY["training"], "train_iters": 24},
        "data": {"train_data_path": [shard]},
    }
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(options))
    return path


@pytest.fixture
def run(starter: Starter, config: Path, tmp_path: Path) -> Run:
    """A run that has not been started."""
    return Run(starter, config, tmp_path)


@pytest.fixture(scope="session")
def uninterrupted(
    starter: Starter, config: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[int, float]:
    """Losses of the run that nothing happened to."""
    run = Run(starter, config, tmp_path_factory.mktemp("uninterrupted"))
    assert run.start().wait() == 0
    assert list(run.losses) == list(range(1, TRAIN_ITERS + 1))
    return run.losses
