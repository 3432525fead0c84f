"""To and from ``megatron.training`` itself, which runs in a process of its own.

Upstream's flags are M = 64, F = 96, 2 layers, V = 89 padded to 96; our checkpoints are those of
``small_checkpoints``.
"""

from __future__ import annotations

import logging
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

from megatron_mup.checkpoint.upstream_args import upstream_line
from megatron_mup.config import Activation, RunConfig
from megatron_mup.convert import upstream_source
from megatron_mup.convert.commands import app
from megatron_mup.convert.megatron_forward import megatron_logprobs
from megatron_mup.convert.megatron_source import MegatronSource
from megatron_mup.convert.megatron_target import write_megatron
from megatron_mup.convert.rescaling import RescaledWeights
from megatron_mup.convert.target_run import standard_run
from megatron_mup.convert.upstream_source import UpstreamSource
from megatron_mup.errors import CheckpointError
from megatron_mup.parameterization.evaluation import Multipliers
from tests.convert.small_checkpoints import MakeCheckpoint, small_run
from tests.distributed.spawn import run_ranks

_TOKENS = torch.arange(32).view(2, 16) * 7 % 89
_MODEL = """
--num-layers 2 --hidden-size 64 --num-attention-heads 4 --ffn-hidden-size 96 --seq-length 16
--max-position-embeddings 16 --normalization RMSNorm --vocab-size 89 --rotary-base 500
--make-vocab-size-divisible-by 32 --position-embedding-type rope --attention-dropout 0
--hidden-dropout 0
"""
_SAVED = {
    "plain": "--swiglu --group-query-attention --num-query-groups 2 --disable-bias-linear "
    "--untie-embeddings-and-output-weights --use-distributed-optimizer",
    "mup": "--squared-relu --no-bias-gelu-fusion --use-mup --mup-base-hidden-size 32 "
    "--mup-embedding-mult 3 --mup-base-head-dim 4 --kv-channels 8 --norm-epsilon 0.001",
    "bf16": "--bf16 --swiglu --disable-bias-linear --untie-embeddings-and-output-weights",
    "bf16_sharded": "--bf16 --swiglu --disable-bias-linear --use-distributed-optimizer",
}
_GATED = ("activation=swiglu", "norm_gain=vector", "num_query_groups=2", "ffn_hidden_size=96")
_LOADED = {
    "sp": (
        "name=sp",
        *_GATED,
        "rotary_base=700",
        *(f"{name}_multiplier=1" for name in ("embedding", "residual", "logit")),
    ),
    # Embedding 2.5, logits 1.7, attention 1/16.
    "mup": (*_GATED, "residual_multiplier=1", "norm_epsilon=0.001"),
}

_FOLDED = ("activation=swiglu", "norm_gain=vector", "ffn_hidden_size=96", "rotary_base=500")
"""None of the four multipliers is plain: upstream's GPT has no residual one."""


def standard(checkpoint: Path, root: Path) -> Path:
    """The same function without multipliers, as 'convert to-sp' writes it."""
    source = MegatronSource(checkpoint, check=False)
    run = standard_run(source.run, gains=False)
    write_megatron(RescaledWeights(source, run.model, run.table.multipliers), root, run=run)
    return root


def told_flags(run: RunConfig) -> list[str]:
    """What users are told to pass behind ``--load DIR``, and the vocabulary of a NullTokenizer."""
    load, folder, *flags = upstream_line(run).removeprefix("Megatron-LM: ").split()
    assert (load, folder) == ("--load", "DIR")
    return [*flags, "--vocab-size", "95"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, checkpoint_of: MakeCheckpoint) -> Path:
    """What upstream saved (``NAME/``) and what it found (``NAME.pt``, ``loaded_NAME.pt``)."""
    root = tmp_path_factory.mktemp("upstream")
    tokens = _TOKENS.tolist()
    tasks: list[dict[str, Any]] = []
    for name, flags in _SAVED.items():
        words = [*_MODEL.split(), *flags.split()]
        tasks.append({"name": name, "save": str(root / name), "flags": words, "tokens": tokens})
    for name, overrides in _LOADED.items():
        load = str(checkpoint_of(*overrides, steps=1).parent)
        words = told_flags(small_run(*overrides))
        tasks.append({"name": f"loaded_{name}", "load": load, "flags": words, "tokens": tokens})
    run = standard_run(small_run(*_FOLDED), gains=False)
    words = told_flags(run)
    load = str(standard(checkpoint_of(*_FOLDED), root / "folded"))
    tasks.append({"name": "loaded_folded", "load": load, "flags": words, "tokens": tokens})
    run_ranks("tests.convert.upstream_worker", {"world_size": 1, "tasks": tasks}, root)
    return root


def found(folder: Path, name: str) -> dict[str, Any]:
    values: dict[str, Any] = torch.load(folder / f"{name}.pt")
    return values


def assert_same_function(ours: Tensor, theirs: Tensor) -> None:
    """Per-token log-probabilities of two forward passes in fp32."""
    assert float(theirs.std()) > 0.4
    assert float((ours.mean() - theirs.mean()).abs()) < 1e-6
    # Another attention kernel: rounding of single tokens.
    assert float((ours - theirs).abs().max()) < 5e-6


@pytest.mark.parametrize("name", _LOADED)
def test_upstream_loads_our_checkpoint_and_computes_the_same(
    name: str, folder: Path, checkpoint_of: MakeCheckpoint
) -> None:
    ours = MegatronSource(checkpoint_of(*_LOADED[name], steps=1), check=False)
    theirs = found(folder, f"loaded_{name}")
    logprobs = megatron_logprobs(ours, _TOKENS, dtype=torch.float32)
    assert_same_function(logprobs, theirs["logprobs"])


def test_upstream_computes_a_mup_model_whose_multipliers_were_folded(
    folder: Path, checkpoint_of: MakeCheckpoint
) -> None:
    ours = MegatronSource(checkpoint_of(*_FOLDED), check=False)
    assert ours.multipliers == Multipliers(embedding=2.5, attention=1 / 16, residual=0.3, logit=1.7)
    logprobs = megatron_logprobs(ours, _TOKENS, dtype=torch.float32)
    assert_same_function(logprobs, found(folder, "loaded_folded")["logprobs"])


def test_upstream_takes_architecture_and_progress_from_our_checkpoint(folder: Path) -> None:
    theirs = found(folder, "loaded_sp")
    assert theirs["args"] == {
        "num_layers": 2,
        "hidden_size": 64,
        "ffn_hidden_size": 96,
        "num_attention_heads": 4,
        "num_query_groups": 2,
        "swiglu": True,
        "add_bias_linear": False,
        "normalization": "RMSNorm",
        "position_embedding_type": "rope",
        "rotary_base": 700,
        "untie_embeddings_and_output_weights": True,
        "padded_vocab_size": 96,
        "seq_length": 16,
    }
    assert (theirs["iteration"], theirs["consumed"]) == (1, 4)


@pytest.mark.parametrize("name", ["plain", "mup"])
def test_upstreams_checkpoint_computes_the_same_here(name: str, folder: Path) -> None:
    source = UpstreamSource(folder / name)
    ours = megatron_logprobs(source, _TOKENS, dtype=torch.float32)
    assert_same_function(ours, found(folder, name)["logprobs"])


def test_architecture_and_multipliers_come_from_upstreams_arguments(folder: Path) -> None:
    plain, mup = UpstreamSource(folder / "plain"), UpstreamSource(folder / "mup")
    model = plain.model
    assert (model.activation, model.query_groups, model.ffn_width) == (Activation.SWIGLU, 2, 96)
    assert (model.vocab_size, model.padded_vocab_size, model.rotary_base) == (89, 96, 500)
    assert model.untie_embeddings_and_output_weights
    assert not model.add_bias_linear
    assert plain.multipliers == Multipliers(embedding=1, attention=0.25, residual=1, logit=1)
    # sqrt(4) / 8, and 1 / (64 / 32).
    assert mup.multipliers == Multipliers(embedding=3, attention=0.25, residual=1, logit=0.5)
    assert (mup.model.head_dim, mup.model.norm_epsilon) == (8, 0.001)
    assert mup.model.activation is Activation.SQUARED_RELU
    assert mup.model.add_bias_linear
    assert not mup.model.untie_embeddings_and_output_weights


def test_parts_of_fused_parameters_are_read_in_logical_order(folder: Path) -> None:
    source, weights = UpstreamSource(folder / "plain"), found(folder, "plain")["weights"]
    # Two groups of two queries, a key and a value of 16 rows each.
    rows = weights["decoder.layers.1.self_attention.linear_qkv.weight"].view(2, 4, 16, 64)
    prefix = "decoder.layers.1.self_attention.linear_qkv.weight"
    assert torch.equal(source.read(f"{prefix}.query"), rows[:, :2].reshape(64, 64))
    assert torch.equal(source.read(f"{prefix}.key"), rows[:, 2].reshape(32, 64))
    assert torch.equal(source.read(f"{prefix}.value"), rows[:, 3].reshape(32, 64))
    gated = weights["decoder.layers.0.mlp.linear_fc1.weight"]
    assert torch.equal(source.read("decoder.layers.0.mlp.linear_fc1.weight.up"), gated[96:])
    norm = "decoder.layers.1.pre_mlp_layernorm.weight"
    assert torch.equal(source.read(norm), weights[norm])
    with pytest.raises(CheckpointError, match="plain/iter_0000003 has no tensor lost"):
        source.read("lost")


def test_main_weights_are_read_where_upstream_stores_them(folder: Path) -> None:
    source, weights = UpstreamSource(folder / "bf16"), found(folder, "bf16")["weights"]
    for name in ("embedding.word_embeddings.weight", "decoder.layers.1.mlp.linear_fc2.weight"):
        values = source.read(name)
        assert torch.equal(values, weights[name])
        assert not torch.equal(values, values.bfloat16().float())
    assert source.provenance == {
        "trained_by": "megatron.training",
        "iteration": 3,
        "consumed_train_samples": 6,
        "weights_dtype": "float32",
    }


def test_main_weights_that_only_upstream_can_place_are_told_of(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        source = UpstreamSource(folder / "bf16_sharded")
    assert "so the bfloat16 weights are read" in caplog.text
    assert "--dist-ckpt-optim-fully-reshardable" in caplog.text
    assert source.provenance["weights_dtype"] == "bfloat16"
    name = "decoder.layers.1.mlp.linear_fc2.weight"
    expected = found(folder, "bf16_sharded")["weights"][name].bfloat16().float()
    assert torch.equal(source.read(name), expected)


def test_a_checkpoint_is_found_by_tracker_number_or_folder(folder: Path) -> None:
    root = folder / "plain"
    assert UpstreamSource(root).folder == root / "iter_0000003"
    assert UpstreamSource(root, iteration=3).where == str(root / "iter_0000003")
    assert UpstreamSource(root / "iter_0000003").folder == root / "iter_0000003"
    with pytest.raises(CheckpointError, match="iter_0000004 is missing; give another iteration"):
        UpstreamSource(root, iteration=4)
    with pytest.raises(CheckpointError, match=r"has no latest_checkpointed_iteration.txt"):
        UpstreamSource(folder)
    with pytest.raises(CheckpointError, match="nowhere is no folder"):
        UpstreamSource(folder / "nowhere")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_experts": 8}, r"num_experts=8 \(mixture of experts is not available\)"),
        (
            {"ffn_hidden_size": 80},
            r"linear_fc1.weight has shape \(2, 192, 64\), not \(2, 160, 64\)",
        ),
        ({"num_layers": 1}, r"has shape \(2, 64\), not \(1, 64\)"),
        ({"add_bias_linear": True}, r"linear_qkv.bias is missing, not \(2, 128\)"),
        (
            {"untie_embeddings_and_output_weights": False},
            r"output_layer.weight \(96, 64\) has no place in the model; only models that",
        ),
    ],
)
def test_tensors_that_do_not_fit_the_arguments_are_refused(
    changes: dict[str, Any], message: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stock = upstream_source._common_state

    def changed(path: Path) -> Mapping[str, Any]:
        common = dict(stock(path))
        return {**common, "args": Namespace(**{**vars(common["args"]), **changes})}

    monkeypatch.setattr(upstream_source, "_common_state", changed)
    with pytest.raises(CheckpointError, match=message):
        UpstreamSource(folder / "plain")


def test_the_command_takes_a_checkpoint_over(folder: Path, tmp_path: Path) -> None:
    words = ["from-megatron", "--load", str(folder / "mup"), "--save", str(tmp_path / "taken")]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0, result.output
    assert "Verification passed" in result.stdout
    taken = MegatronSource(tmp_path / "taken")
    assert taken.run.parameterization.name == "sp"
    # 3 is --mup-embedding-mult.
    assert taken.run.table.multipliers.embedding == 3.0
