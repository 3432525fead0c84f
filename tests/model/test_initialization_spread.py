"""Stds measured on built models, and the cost of drawing a 10B model on 128 ranks."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections import Counter
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest

from megatron_mup.config import RunConfig
from megatron_mup.model import initialization
from megatron_mup.model.gpt import build_model
from megatron_mup.model.initialization import Shard, initialize
from megatron_mup.training.processes import Launch, parallel_processes
from tests.configurations import tiny
from tests.model import ten_billion_stage
from tests.model.sharded_stage import ShardedStage
from tests.model.ten_billion_stage import TEN_BILLION

_WIDE = ("hidden_size=128", "num_attention_heads=8", "vocab_size=512")
_R128, _R512 = 0.08838834764831845, 0.04419417382415922


def measured(run: RunConfig) -> dict[str, float]:
    """Std of layer 1's logical matrices, the embedding and the readout of the built model."""
    with parallel_processes(run, Launch()):
        weights = {n: p.detach() for n, p in build_model(run, run.table).named_parameters()}
    layer = "decoder.layers.1"
    groups, heads = run.model.query_groups, run.model.num_attention_heads
    per_group = heads // groups * 16
    qkv = weights[f"{layer}.self_attention.linear_qkv.weight"].view(groups, per_group + 32, -1)
    tensors = {
        "embedding": weights["embedding.word_embeddings.weight"],
        "query": qkv[:, :per_group],
        "key": qkv[:, per_group : per_group + 16],
        "value": qkv[:, per_group + 16 :],
        "attention_out": weights[f"{layer}.self_attention.linear_proj.weight"],
        "ffn_in": weights[f"{layer}.mlp.linear_fc1.weight"],
        "ffn_out": weights[f"{layer}.mlp.linear_fc2.weight"],
    }
    if "output_layer.weight" in weights:
        tensors["unembedding"] = weights["output_layer.weight"]
    return {name: value.std().item() for name, value in tensors.items()}


def stds(hidden: float, **others: float) -> dict[str, float]:
    roles = ("query", "key", "value", "attention_out", "ffn_in")
    return {**dict.fromkeys(roles, hidden), **others}


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        # arXiv:2404.05728, Table 2: 1, 1/sqrt(M), 1/sqrt(F), 1/M.
        ((), stds(_R128, embedding=1.0, ffn_out=_R512, unembedding=0.0078125)),
        (
            ("output_form=multiplier",),
            stds(_R128, embedding=1.0, ffn_out=_R512, unembedding=0.03125),
        ),
        (
            ("name=sp", "u_init=sp"),
            stds(_R128, embedding=1.0, ffn_out=_R512, unembedding=_R128),
        ),
        (("u_init=zero",), stds(_R128, embedding=1.0, ffn_out=_R512, unembedding=0.0)),
        # 0.02/sqrt(4); 0.02/sqrt(4)/sqrt(2 * 2 layers); 0.02/4.
        (
            ("init=sigma",),
            {
                **stds(0.01, embedding=0.02, ffn_out=0.005, unembedding=0.005),
                "attention_out": 0.005,
            },
        ),
        (
            ("num_query_groups=2", "activation=swiglu", "ffn_multiplier=2.67"),
            stds(_R128, embedding=1.0, ffn_out=0.05415303610738823, unembedding=0.0078125),
        ),
        (
            (
                "num_query_groups=1",
                "untie_embeddings_and_output_weights=false",
                "output_form=multiplier",
            ),
            stds(_R128, embedding=1.0, ffn_out=_R512),
        ),
    ],
)
def test_built_models_have_the_papers_spread(
    overrides: tuple[str, ...], expected: dict[str, float]
) -> None:
    # The smallest tensor has 16 * 128 values: a relative error of 1.6%, times four.
    assert measured(tiny(*_WIDE, *overrides)) == pytest.approx(expected, rel=0.065)


class CountingGenerator:
    """Counts the values asked for and returns zeros at no cost."""

    drawn: ClassVar[Counter[str]] = Counter()
    counting: ClassVar[threading.Lock] = threading.Lock()

    def __init__(self, name: str) -> None:
        self.name = name

    def standard_normal(self, size: tuple[int, int], dtype: type) -> np.ndarray:
        with self.counting:
            self.drawn[self.name] += size[0] * size[1]
        return np.broadcast_to(dtype(0.0), size)


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Values drawn per tensor; nothing random happens."""
    CountingGenerator.drawn.clear()
    monkeypatch.setattr(
        initialization, "block_generator", lambda seed, name, block: CountingGenerator(name)
    )
    return CountingGenerator.drawn


@pytest.mark.parametrize("rank", [0, 3, 7])
def test_a_rank_of_a_10b_model_draws_only_its_own_share(rank: int, drawn: Counter[str]) -> None:
    # 128 ranks: TP 8 x PP 4 x DP 4. A stage holds 3 of 12 layers and at most one of the two
    # vocabulary matrices; one layer and both matrices are drawn here.
    run = tiny(*TEN_BILLION)
    module = ShardedStage(run.model.shape, 8, (11,))
    initialize(module, run.table, run.model.shape, seed=1, shard=Shard(rank, 8))
    readout = drawn.pop("output_layer.weight")
    assert readout == drawn.pop("embedding.word_embeddings.weight")
    # 12 M^2 / 8 of a layer; 32128/8 = 4016 rows of the vocabulary touch at most 33 blocks.
    assert sum(drawn.values()) == 100_663_296
    assert 4016 * 8192 <= readout <= 33 * 128 * 8192


def test_filling_a_real_stage_of_a_10b_model_costs_seconds_and_little_more_than_its_weights() -> (
    None
):
    # A process of its own, so that its peak memory is that of the filling.
    filled = subprocess.run(
        [sys.executable, "-m", ten_billion_stage.__name__],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=False,
    )
    assert filled.returncode == 0, filled.stderr
    report = json.loads(filled.stdout)
    # Three layers of 12 M^2 / 8 values and 32128 / 8 rows of M, in fp32.
    assert report["values"] == 3 * 100_663_296 + 4016 * 8192
    # CPU time, so that other work on the machine does not count.
    assert report["seconds"] < 60.0
    # The pages of the weights become resident as they are filled; everything else is small.
    assert 4 * report["values"] <= report["bytes"] < 2e9
    assert len(report["stds"]) == 13
    for name, std in report["stds"].items():
        # 1; 1/sqrt(32768); 1/sqrt(8192).
        narrow = 0.005524271728019903 if "fc2" in name else 0.011048543456039806
        expected = 1.0 if "embedding" in name else narrow
        assert std == pytest.approx(expected, rel=0.01), name


def test_the_10b_models_table_has_its_published_sizes() -> None:
    # 12 L M^2 + 2 V M = 9.664e9 + 0.526e9.
    rows = tiny(*TEN_BILLION).table.rows
    total = sum(int(np.prod(row.tensor.shape)) for row in rows)
    assert total == 9_663_676_416 + 526_385_152
