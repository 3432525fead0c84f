"""Checkpoints that ``megatron.training`` saved on two ranks: TP2, and PP2.

Each rank keeps what it holds; here the parts are put together by hand.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_mup.convert.upstream_source import UpstreamSource
from tests.distributed.spawn import run_ranks

pytestmark = pytest.mark.dist

FLAGS = """
--num-layers 2 --hidden-size 64 --num-attention-heads 4 --ffn-hidden-size 96 --seq-length 16
--max-position-embeddings 16 --normalization RMSNorm --vocab-size 89 --rotary-base 500
--make-vocab-size-divisible-by 16 --position-embedding-type rope --attention-dropout 0
--hidden-dropout 0 --swiglu --group-query-attention --num-query-groups 2 --disable-bias-linear
--untie-embeddings-and-output-weights
"""
LAYOUTS = {
    "tensor": ("--tensor-model-parallel-size 2", "tensor_model_parallel_size=2"),
    "pipeline": ("--pipeline-model-parallel-size 2", "pipeline_model_parallel_size=2"),
}
LAYER = "decoder.layers.1."
QKV = "self_attention.linear_qkv.weight"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``NAME/`` with the checkpoint, ``NAME.RANK.pt`` with what a rank held."""
    root = tmp_path_factory.mktemp("upstream")
    tasks = [
        {"name": name, "save": str(root / name), "flags": [*FLAGS.split(), *flag.split()]}
        | {"layout": [option]}
        for name, (flag, option) in LAYOUTS.items()
    ]
    run_ranks("tests.convert.upstream_layout_worker", {"world_size": 2, "tasks": tasks}, root)
    return root


def held(folder: Path, name: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    first, second = (torch.load(folder / f"{name}.{rank}.pt") for rank in (0, 1))
    return first, second


def test_tensors_that_tensor_parallelism_cut_are_whole(folder: Path) -> None:
    source, ranks = UpstreamSource(folder / "tensor"), held(folder, "tensor")

    def parts(name: str) -> tuple[Tensor, Tensor]:
        return ranks[0][name], ranks[1][name]

    for name, axis in (
        ("embedding.word_embeddings.weight", 0),
        ("output_layer.weight", 0),
        (f"{LAYER}self_attention.linear_proj.weight", 1),
        (f"{LAYER}mlp.linear_fc2.weight", 1),
    ):
        assert torch.equal(source.read(name), torch.cat(parts(name), axis)), name
    # Each rank has one query group: two queries, a key and a value of 16 rows.
    groups = [part.view(4, 16, 64) for part in parts(LAYER + QKV)]
    for kind, rows in (("query", slice(0, 2)), ("key", slice(2, 3)), ("value", slice(3, 4))):
        expected = torch.cat([group[rows].reshape(-1, 64) for group in groups])
        assert torch.equal(source.read(f"{LAYER}{QKV}.{kind}"), expected), kind
    # And its half of the gate before its half of the rest.
    gated = [part.view(2, 48, 64) for part in parts(f"{LAYER}mlp.linear_fc1.weight")]
    for index, kind in enumerate(("gate", "up")):
        expected = torch.cat([part[index] for part in gated])
        assert torch.equal(source.read(f"{LAYER}mlp.linear_fc1.weight.{kind}"), expected), kind
    norm = "decoder.final_layernorm.weight"
    assert torch.equal(source.read(norm), ranks[0][norm])


def test_layers_of_every_pipeline_stage_are_found(folder: Path) -> None:
    source, (first, last) = UpstreamSource(folder / "pipeline"), held(folder, "pipeline")
    # Each stage calls its own layer 0.
    name = "mlp.linear_fc2.weight"
    assert torch.equal(source.read(f"decoder.layers.0.{name}"), first[f"decoder.layers.0.{name}"])
    assert torch.equal(source.read(f"decoder.layers.1.{name}"), last[f"decoder.layers.0.{name}"])
    assert not torch.equal(first[f"decoder.layers.0.{name}"], last[f"decoder.layers.0.{name}"])
    for name, stage in (("embedding.word_embeddings.weight", first), ("output_layer.weight", last)):
        assert torch.equal(source.read(name), stage[name]), name


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_model_is_that_of_one_rank(name: str, folder: Path) -> None:
    model: Any = UpstreamSource(folder / name).model
    assert (model.num_layers, model.hidden_size, model.ffn_width) == (2, 64, 96)
    assert (model.num_attention_heads, model.query_groups) == (4, 2)
    assert model.padded_vocab_size == 96
