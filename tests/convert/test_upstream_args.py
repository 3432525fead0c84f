"""Upstream's arguments: those that our checkpoints hold, and what others' say of a model."""

from __future__ import annotations

import json
import os
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core import dist_checkpointing

from megatron_mup.checkpoint import contents
from megatron_mup.checkpoint.load import load_checkpoint
from megatron_mup.checkpoint.safe_pickle import safe_reading
from megatron_mup.checkpoint.save import save_checkpoint
from megatron_mup.checkpoint.upstream_args import upstream_args, upstream_flags, upstream_line
from megatron_mup.config import Activation, ModelConfig
from megatron_mup.convert.upstream_model import upstream_model, upstream_multipliers
from megatron_mup.convert.upstream_source import UpstreamSource
from megatron_mup.errors import CheckpointError
from megatron_mup.parameterization.evaluation import Multipliers
from megatron_mup.parameterization.roles import NormGain
from tests.checkpoint.malicious import Reduced
from tests.checkpoint.short_runs import trained
from tests.configurations import tiny

_PLAIN = ("norm_gain=vector", "name=sp")


def upstream(**changes: Any) -> Namespace:
    """Upstream's arguments for a model of two layers; every other argument is absent."""
    values = {
        "num_layers": 2,
        "hidden_size": 64,
        "num_attention_heads": 4,
        "group_query_attention": False,
        "num_query_groups": 1,
        "ffn_hidden_size": 96,
        "seq_length": 16,
        "normalization": "RMSNorm",
        "position_embedding_type": "rope",
        "layernorm_epsilon": 1e-6,
        "add_bias_linear": False,
        "swiglu": True,
    }
    return Namespace(**{**values, **changes})


def read(**changes: Any) -> ModelConfig:
    return upstream_model(upstream(**changes), vocabulary=96, where="there")


def test_saved_arguments_have_upstreams_names_and_plain_values() -> None:
    run = tiny(
        "activation=squared_relu",
        "num_query_groups=2",
        "rotary_base=700",
        "tensor_model_parallel_size=2",
        "norm_epsilon=0.001",
    )
    args = vars(upstream_args(run, consumed_train_samples=12))
    expected = {
        "num_layers": 2,
        "hidden_size": 64,
        "ffn_hidden_size": 256,
        "num_attention_heads": 4,
        "group_query_attention": True,
        "num_query_groups": 2,
        "kv_channels": 16,
        "seq_length": 16,
        "max_position_embeddings": 16,
        "add_position_embedding": True,
        "position_embedding_type": "rope",
        "rotary_base": 700,
        "normalization": "RMSNorm",
        "layernorm_epsilon": 0.001,
        "swiglu": False,
        "squared_relu": True,
        "padded_vocab_size": 96,
        "tensor_model_parallel_size": 2,
        "pipeline_model_parallel_size": 1,
        "consumed_train_samples": 12,
        "ckpt_format": "torch_dist",
        "no_save_optim": True,
        "no_save_rng": True,
        # Scores over D = 16.
        "use_mup": True,
        "mup_attn_scale_power": 1.0,
        "mup_base_head_dim": None,
    }
    assert {name: args[name] for name in expected} == expected
    assert {type(value) for value in args.values()} <= {int, float, bool, str, type(None)}


def test_multipliers_come_back_from_the_saved_arguments() -> None:
    for overrides in (
        [*_PLAIN, "embedding_multiplier=1"],
        [*_PLAIN, "embedding_multiplier=3"],
        ["embedding_multiplier=3", "logit_multiplier=0.7"],
        ["base_kv_channels=4", "attention_scale=base_head_dim"],
        ["output_form=multiplier"],
    ):
        run = tiny("norm_gain=vector", *overrides)
        found = upstream_multipliers(upstream_args(run), run.model)
        expected = run.table.multipliers
        assert found.attention == pytest.approx(expected.attention, rel=1e-15)
        assert (found.embedding, found.logit) == (expected.embedding, expected.logit)


def test_flags_say_what_upstream_does_not_take_from_the_checkpoint() -> None:
    assert upstream_flags(tiny(*_PLAIN)) == ("--norm-epsilon", "1e-05")
    flags = upstream_flags(tiny("add_bias_linear=true", "embedding_multiplier=3"))
    assert " ".join(flags) == (
        "--norm-epsilon 1e-05 --no-bias-gelu-fusion --use-mup --mup-base-hidden-size 64 "
        "--mup-embedding-mult 3.0 --mup-output-mult 1.0 --mup-attn-scale-power 1.0"
    )
    scaled = upstream_flags(tiny("attention_scale=base_head_dim", "base_kv_channels=4"))
    # 2/16 of the scores: sqrt(4)/16.
    assert scaled[-4:] == ("--mup-base-head-dim", "4.0", "--mup-attn-scale-power", "1.0")


@pytest.mark.parametrize(
    ("overrides", "lack"),
    [
        (["residual_multiplier=0.5"], r"residual multiplier \(0.5\)"),
        (["activation=relu"], "model.activation=relu"),
        (["norm_gain=scalar"], "model.norm_gain=scalar"),
        (["embedding_norm=true", "unembedding_bias=true"], "embedding_norm, no model.unembedding"),
    ],
)
def test_models_that_upstream_has_not_get_no_flags(overrides: list[str], lack: str) -> None:
    with pytest.raises(CheckpointError, match=f"own GPT has no .*{lack}.*; build the model with"):
        upstream_flags(tiny(*overrides))


def test_users_are_told_the_flags_or_why_there_are_none() -> None:
    assert upstream_line(tiny(*_PLAIN, "add_bias_linear=true", "norm_epsilon=0.001")) == (
        "Megatron-LM: --load DIR --use-checkpoint-args --no-load-optim --norm-epsilon 0.001 "
        "--no-bias-gelu-fusion"
    )
    lack = upstream_line(tiny("activation=relu"))
    assert lack.startswith("Megatron-LM: megatron.training's own GPT has no model.activation=relu")


def test_a_checkpoint_holds_the_arguments_and_is_read_without_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tiny("norm_gain=vector")
    with trained(run, 1) as state:
        folder = save_checkpoint(state, tmp_path / "new")
        with safe_reading(folder):
            common = dist_checkpointing.load_common_state_dict(folder)
        assert isinstance(common["args"], Namespace)
        assert common["args"].consumed_train_samples == 4
        with monkeypatch.context() as patch:
            # What earlier versions saved.
            patch.setattr(contents, "upstream_args", lambda *_a, **_k: None)
            old = save_checkpoint(state, tmp_path / "old")
        state.iteration = 0
        for path in (old, folder):
            load_checkpoint(state, path, weights_only=False)
        assert state.consumed_samples == 4


def test_architecture_is_read_from_the_arguments_that_are_there() -> None:
    model = read(kv_channels=8, rotary_percent=0.5)
    assert model == ModelConfig(
        num_layers=2,
        hidden_size=64,
        num_attention_heads=4,
        kv_channels=8,
        ffn_hidden_size=96,
        vocab_size=96,
        make_vocab_size_divisible_by=1,
        seq_length=16,
        activation=Activation.SWIGLU,
        norm_gain=NormGain.VECTOR,
        norm_epsilon=1e-6,
        rotary_percent=0.5,
        untie_embeddings_and_output_weights=False,
    )
    assert read(swiglu=False).activation is Activation.GELU
    assert read(layernorm_epsilon=None, norm_epsilon=0.1).norm_epsilon == 0.1
    assert read(group_query_attention=True).query_groups == 1


def test_padding_follows_the_rows_that_are_stored() -> None:
    # Upstream pads to 16 times the tensor-parallel size of 3.
    padded = read(vocab_size=50, make_vocab_size_divisible_by=16, tensor_model_parallel_size=3)
    assert (padded.vocab_size, padded.padded_vocab_size) == (50, 96)
    other = read(vocab_size=50, make_vocab_size_divisible_by=16)
    assert (other.vocab_size, other.padded_vocab_size) == (96, 96)


def test_multipliers_of_upstreams_mup_are_derived_as_it_does() -> None:
    model = read()
    plain = Multipliers(embedding=1, attention=0.25, residual=1, logit=1)
    mup: dict[str, Any] = {
        "use_mup": True,
        "mup_base_hidden_size": 16,
        "mup_embedding_mult": 2.0,
        "mup_output_mult": 1.0,
        "mup_base_head_dim": None,
        "mup_attn_scale_power": 1.0,
    }
    assert upstream_multipliers(upstream(), model) == plain
    assert upstream_multipliers(upstream(**mup | {"use_mup": False}), model) == plain
    assert upstream_multipliers(upstream(**mup), model) == Multipliers(
        embedding=2, attention=1 / 16, residual=1, logit=0.25
    )
    changes = {"mup_output_mult": 3.0, "mup_base_head_dim": 64, "mup_base_hidden_size": None}
    assert upstream_multipliers(upstream(**mup | changes), model) == Multipliers(
        embedding=2, attention=0.5, residual=1, logit=3
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"normalization": "LayerNorm"}, r"normalization=LayerNorm \(only RMSNorm"),
        ({"position_embedding_type": "learned_absolute"}, "position_embedding_type=learned"),
        ({"use_rope_scaling": True}, r"use_rope_scaling=True \(only plain RoPE"),
        ({"num_experts": 4}, "num_experts=4"),
        ({"multi_latent_attention": True}, "multi_latent_attention=True"),
        ({"qk_layernorm": True}, "qk_layernorm=True"),
        ({"layernorm_zero_centered_gamma": True}, "layernorm_zero_centered_gamma=True"),
        ({"window_size": (128, 0)}, r"window_size=\(128, 0\)"),
        ({"add_qkv_bias": True}, "add_qkv_bias=True without add_bias_linear"),
        ({"swiglu": False, "add_bias_linear": True}, r"bias_gelu_fusion=True \(it is the tanh"),
        ({"rotary_base": 10000.5}, "rotary_base=10000.5"),
        ({"num_layers": None, "seq_length": None}, "there lack num_layers, seq_length"),
        ({"layernorm_epsilon": None}, "say no norm_epsilon"),
    ],
)
def test_what_this_gpt_has_not_is_refused_by_the_arguments_name(
    changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(CheckpointError, match=message):
        read(**changes)


def test_all_refused_arguments_are_named_at_once() -> None:
    with pytest.raises(CheckpointError, match=r"normalization=LayerNorm .*; quick_geglu=True .*;"):
        read(normalization="LayerNorm", quick_geglu=True)


def legacy_folder(root: Path, common: dict[str, Any]) -> Path:
    """A torch_dist folder whose plain values are in a file, as in versions before 0.19."""
    folder = root / "iter_0000005"
    folder.mkdir()
    metadata = {"sharded_backend": "torch_dist", "sharded_backend_version": 1}
    (folder / "metadata.json").write_text(json.dumps(metadata))
    torch.save(common, folder / "common.pt")
    return folder


def test_code_in_the_arguments_is_refused_and_not_run(tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    args = upstream(spec=Reduced(os.system, f"touch {marker}"))
    folder = legacy_folder(tmp_path, {"args": args, "checkpoint_version": 3.0})
    with pytest.raises(CheckpointError, match=r"names 'posix\.system', which no checkpoint needs"):
        UpstreamSource(folder)
    assert not marker.exists()


def test_checkpoints_without_arguments_or_of_another_row_order_are_refused(tmp_path: Path) -> None:
    cases: list[tuple[dict[str, Any], str]] = [
        ({"iteration": 5}, "holds no arguments of megatron.training"),
        ({"args": upstream(), "checkpoint_version": 2.0}, "has checkpoint_version 2.0, whose"),
    ]
    for number, (common, message) in enumerate(cases):
        root = tmp_path / str(number)
        root.mkdir()
        with pytest.raises(CheckpointError, match=message):
            UpstreamSource(legacy_folder(root, common))


@pytest.mark.parametrize(
    ("file", "message"),
    [
        (
            "mp_rank_00/model_optim_rng.pt",
            r"legacy format \(mp_rank_\*\).*--ckpt-format torch_dist",
        ),
        ("parameterization.json", "was saved by this package"),
        ("__0_0.distcp", "no metadata.json, so it is incomplete"),
    ],
)
def test_other_formats_are_refused_with_what_to_do(file: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "iter_0000005" / file
    path.parent.mkdir(parents=True)
    path.touch()
    with pytest.raises(CheckpointError, match=message):
        UpstreamSource(tmp_path / "iter_0000005")
