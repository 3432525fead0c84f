"""The package as a library: what a script of its own gets, and what it is refused.

Models are upstream's, built here; M = 64 over P = 32, 4 heads of 16, F = 256.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as functional
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules

from megatron_mup.errors import ConfigError, ParameterizationError
from megatron_mup.library import Extras, Mup, resolve
from megatron_mup.model.gpt import build_model
from megatron_mup.parameterization.options import ParameterizationConfig
from megatron_mup.training.processes import Launch, parallel_processes
from tests.configurations import tiny

_BASE: dict[str, Any] = {
    "base_hidden_size": 32,
    "base_ffn_hidden_size": 128,
    "base_kv_channels": 16,
    "base_num_layers": 2,
}
_VOCAB = 96


@pytest.fixture(scope="module", autouse=True)
def _parallel_state() -> Iterator[None]:
    with parallel_processes(tiny(), Launch()):
        yield


def transformer(**changes: Any) -> TransformerConfig:
    options: dict[str, Any] = {
        "num_layers": 2,
        "hidden_size": 64,
        "num_attention_heads": 4,
        "ffn_hidden_size": 256,
        "normalization": "RMSNorm",
        "add_bias_linear": False,
        "use_cpu_initialization": True,
    }
    return TransformerConfig(**(options | changes))


def adam(**changes: Any) -> OptimizerConfig:
    options: dict[str, Any] = {"lr": 2**-6, "min_lr": 2**-9, "weight_decay": 1e-4}
    return OptimizerConfig(**(options | changes))


def resolved(
    config: TransformerConfig | None = None,
    optimizer: OptimizerConfig | None = None,
    *,
    options: dict[str, Any] | None = None,
    **extras: Any,
) -> Mup:
    parameterization = ParameterizationConfig(**(_BASE | (options or {})))
    return resolve(
        config or transformer(),
        optimizer or adam(),
        parameterization,
        Extras(vocab_size=_VOCAB, **extras),
    )


def built(
    mup: Mup, *, with_spec: bool = False, tied: bool = False, stage: Any = None, **changes: Any
) -> Any:
    """Upstream's model with the table's attention scale."""
    config = transformer(softmax_scale=mup.softmax_scale, **changes)
    spec = get_gpt_layer_local_spec(normalization="RMSNorm")
    return GPTModel(
        config,
        mup.layer_spec(spec) if with_spec else spec,
        _VOCAB,
        16,
        share_embeddings_and_output_weights=tied,
        position_embedding_type="rope",
        **(stage or {}),
    )


def test_softmax_scale_is_one_over_the_head_dim() -> None:
    assert resolved().softmax_scale == 1 / 16
    assert resolved(options={"name": "sp"}).softmax_scale == 0.25


def test_choices_may_be_given_by_their_values_and_are_checked() -> None:
    assert resolved(options={"name": "abs_mup"}).table.rows[1].tensor.role == "gain"
    with pytest.raises(
        ParameterizationError, match="name='up' is no Parameterization; use one of sp"
    ):
        resolved(options={"name": "up"})
    with pytest.raises(
        ParameterizationError, match="norm_gain='no' is no NormGain; use one of none"
    ):
        resolved(norm_gain="no")


def test_apply_gives_the_weights_of_the_package_over_upstreams_own_initialization() -> None:
    run = tiny("norm_gain=vector", "seed=7")
    expected = dict(build_model(run, run.table).named_parameters())
    mup = resolved()
    model = mup.apply(built(mup), seed=7)
    found = dict(model.named_parameters())
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())


@pytest.mark.parametrize(
    ("options", "extras"),
    [
        ({"embedding_multiplier": 3.0, "logit_multiplier": 5.0}, {}),
        ({"output_form": "multiplier"}, {"tied_embeddings": True}),
        ({"name": "completep", "base_num_layers": 1}, {"norm_gain": "none"}),
        ({}, {"unembedding_bias": True, "embedding_norm": True}),
    ],
)
def test_forward_is_that_of_the_package(options: Any, extras: Any) -> None:
    overrides = [f"{key}={value}" for key, value in options.items()]
    tied = extras.get("tied_embeddings", False)
    gain = extras.get("norm_gain", "vector")
    run = tiny(
        *overrides,
        f"norm_gain={gain}",
        "attention_backend=local",
        f"untie_embeddings_and_output_weights={str(not tied).lower()}",
        *(f"{key}=true" for key in ("unembedding_bias", "embedding_norm") if key in extras),
        "seed=3",
    )
    mup = resolved(options=options, **extras)
    model = mup.apply(built(mup, with_spec=True, tied=tied).eval(), seed=3)
    tokens = torch.arange(32).view(2, 16)
    positions = torch.arange(16).expand(2, -1)
    expected = build_model(run, run.table)(tokens, positions, None)
    assert float(expected.detach().std()) > 0
    assert torch.allclose(model(tokens, positions, None), expected, rtol=1e-6, atol=1e-7)


def test_residual_multiplier_is_refused_in_a_model_built_without_the_spec() -> None:
    mup = resolved(options={"residual_multiplier": 0.5})
    with pytest.raises(
        ParameterizationError,
        match=r"decoder.layers.0.self_attn_bda multiplies its branch by 1.0, the table says 0.5; "
        r".* build the model from layer_spec\(spec\)",
    ):
        mup.apply(built(mup), seed=0)
    mup.apply(built(mup, with_spec=True), seed=0)


def test_layers_of_a_block_that_share_a_spec_still_share_it() -> None:
    shared = get_gpt_layer_local_spec(normalization="RMSNorm")
    block = TransformerBlockSubmodules(layer_specs=[shared, shared], layer_norm=None)
    changed = resolved(options={"residual_multiplier": 0.5}).layer_spec(block)
    assert changed.layer_specs[0] is changed.layer_specs[1]
    assert changed.layer_specs[0] is not shared
    assert block.layer_specs[0].submodules.mlp_bda is not changed.layer_specs[0].submodules.mlp_bda


def test_gains_are_frozen_at_one_on_request() -> None:
    mup = resolved(norm_gain="none")
    model = mup.apply(built(mup), seed=0)
    gains = {name: value for name, value in model.named_parameters() if "layernorm" in name}
    assert len(gains) == 5
    assert all(not gain.requires_grad and bool((gain == 1).all()) for gain in gains.values())


REFUSED_LAYERS = {
    "num_moe_experts": (4, "MoE experts and their router"),
    "multi_latent_attention": (True, "multi-latent attention"),
    "is_hybrid_model": (True, "Mamba layers"),
    "mtp_num_layers": (1, "multi-token prediction"),
    "experimental_attention_variant": ("dsa", "experimental attention"),
    "heterogeneous_block_specs": (True, "different shapes"),
    "attention_output_gate": (True, "a gate on the attention"),
    "softmax_type": ("learnable", "learned softmax offsets"),
    "normalization": ("LayerNorm", "a norm with a bias"),
    "layernorm_zero_centered_gamma": (True, "gains that start at 0"),
    "apply_residual_connection_post_layernorm": (True, "post-norm"),
    "qk_layernorm": (True, "QK norm"),
    "qk_l2_norm": (True, "QK norm"),
}


@pytest.mark.parametrize("option", REFUSED_LAYERS)
def test_layers_without_rules_are_refused_by_name(option: str) -> None:
    value, name = REFUSED_LAYERS[option]
    config = transformer()
    # Set afterwards: upstream's own checks ask for more options than are of interest here.
    setattr(config, option, value)
    with pytest.raises(ParameterizationError, match=rf"\.{option}={value} builds .*{name}.*; use"):
        resolved(config)


@pytest.mark.parametrize(
    "option", ["use_mup", "apply_query_key_layer_scaling", "init_model_with_meta_device"]
)
def test_options_that_contradict_the_table_are_refused(option: str) -> None:
    config = transformer()
    setattr(config, option, True)
    with pytest.raises(ParameterizationError, match=rf"{option}=True .*; set {option}=False"):
        resolved(config)


def test_biases_of_query_key_and_value_alone_are_refused() -> None:
    with pytest.raises(ParameterizationError, match="set both or none"):
        resolved(transformer(add_qkv_bias=True))


def test_another_softmax_scale_is_refused_in_the_configuration_and_in_the_model() -> None:
    with pytest.raises(ParameterizationError, match=r"softmax_scale is 0.25, the table says 0.06"):
        resolved(transformer(softmax_scale=0.25))
    mup = resolved()
    other = dataclasses.replace(resolved(options={"name": "sp"}), table=mup.table)
    model = built(resolved(options={"name": "sp"}))
    with pytest.raises(ParameterizationError, match=r"scales attention scores by .*0.25"):
        other.apply(model, seed=0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"optimizer": "sgd"}, "the rules hold for adam"),
        ({"optimizer": "lion"}, "megatron-mup train"),
        ({"decoupled_weight_decay": False}, "set it to True"),
        ({"lr": None, "min_lr": None}, "lr is unset"),
        ({"decoupled_lr": 0.1}, "embedding_lr_exponent"),
    ],
)
def test_optimizers_without_rules_are_refused(changes: Any, message: str) -> None:
    config = adam()
    for option, value in changes.items():
        setattr(config, option, value)
    with pytest.raises(ConfigError, match=message):
        resolved(optimizer=config)


def test_horizon_rule_is_refused_with_the_function_that_does_it() -> None:
    with pytest.raises(ParameterizationError, match="scaled_for_horizon"):
        resolved(options={"horizon_rule": "token_power", "base_train_tokens": 10})


def test_positions_that_are_learned_are_refused_by_the_name_of_their_module() -> None:
    mup = resolved()
    config = transformer(softmax_scale=mup.softmax_scale)
    spec = get_gpt_layer_local_spec(normalization="RMSNorm")
    model = GPTModel(config, spec, _VOCAB, 16, position_embedding_type="learned_absolute")
    with pytest.raises(
        ParameterizationError,
        match=r"'embedding.position_embeddings.weight' \(Embedding\) has no role",
    ):
        mup.apply(model, seed=0)


def test_a_model_of_another_shape_or_with_other_tensors_is_refused() -> None:
    mup = resolved()
    with pytest.raises(ParameterizationError, match=r"shape \(128, 64\), the table says \(256, 64"):
        mup.apply(built(mup, ffn_hidden_size=128), seed=0)
    with pytest.raises(ParameterizationError, match=r"the table has 'output_layer.weight', which"):
        mup.apply(built(mup, tied=True), seed=0)
    with pytest.raises(ParameterizationError, match=r"bias' \(\w+ParallelLinear\)"):
        mup.apply(built(mup, add_bias_linear=True), seed=0)
    gated = resolved(transformer(gated_linear_unit=True, activation_func=functional.silu))
    with pytest.raises(ParameterizationError, match=r"the table says \(512, 64\)"):
        gated.apply(built(gated), seed=0)


def test_a_stage_without_embedding_or_readout_gets_its_share() -> None:
    mup = resolved(options={"embedding_multiplier": 2.0, "logit_multiplier": 2.0})
    whole = dict(mup.apply(built(mup), seed=5).named_parameters())
    for stage in ({"pre_process": False}, {"post_process": False}):
        model = mup.apply(built(mup, stage=stage), seed=5)
        mup.check(model)
        names = dict(model.named_parameters())
        assert 0 < len(names) < len(whole)
        assert all(torch.equal(whole[name], value) for name, value in names.items())


def test_apply_is_refused_twice_and_after_wrapping() -> None:
    mup = resolved(options={"logit_multiplier": 2.0})
    model = mup.apply(built(mup), seed=0)
    with pytest.raises(ParameterizationError, match="would act twice"):
        mup.apply(model, seed=0)
    wrapped = DistributedDataParallel(model.config, DistributedDataParallelConfig(), model)
    with pytest.raises(ParameterizationError, match="got a DistributedDataParallel"):
        mup.apply(wrapped, seed=0)
    mup.check(wrapped)


@pytest.mark.parametrize("extras", [{}, {"embedding_norm": True}])
def test_a_second_apply_is_refused_without_multipliers_too(extras: dict[str, Any]) -> None:
    mup = resolved(**extras)
    model = mup.apply(built(mup), seed=0)
    with pytest.raises(ParameterizationError, match="would act twice"):
        mup.apply(model, seed=0)


def test_check_notices_a_multiplier_that_is_gone() -> None:
    mup = resolved(options={"embedding_multiplier": 2.0})
    model = mup.apply(built(mup), seed=0)
    model.embedding._forward_hooks.clear()
    with pytest.raises(ParameterizationError, match=r"multiplied by \(1.0, 1.0\), .* \(2.0, 1.0\)"):
        mup.check(model)


def training(mup: Mup, *, overrides: bool = True) -> Any:
    """An upstream optimizer over an applied model."""
    model = mup.apply(built(mup), seed=0)
    wrapped = DistributedDataParallel(model.config, DistributedDataParallelConfig(), model)
    given = {"config_overrides": mup.config_overrides([wrapped])} if overrides else {}
    return get_megatron_optimizer(mup.optimizer, [wrapped], **given)


def schedule(optimizer: Any, **changes: Any) -> OptimizerParamScheduler:
    options: dict[str, Any] = {
        "init_lr": 0.0,
        "max_lr": 2**-6,
        "min_lr": 2**-9,
        "lr_warmup_steps": 4,
        "lr_decay_steps": 10,
        "lr_decay_style": "linear",
        "start_wd": 1e-4,
        "end_wd": 1e-4,
        "wd_incr_steps": 10,
        "wd_incr_style": "constant",
    }
    return OptimizerParamScheduler(optimizer, **(options | changes))


def test_groups_follow_the_table_through_upstreams_schedule() -> None:
    mup = resolved()
    optimizer = training(mup)
    scheduler = schedule(optimizer)
    mup.check_training(optimizer, scheduler)
    # alpha 2^-6, m 2, independent lambda: LR times decay is s(t) lambda wherever there is decay.
    for steps, factor in ((0, 0.0), (2, 0.5), (2, 1.0), (6, 0.125)):
        scheduler.step(steps)
        rates = [group["lr"] for group in optimizer.param_groups]
        assert max(rates) == pytest.approx(2**-6 * factor)
        assert min(rates) == pytest.approx(2**-7 * factor)
        decays = {group["lr"] * group["weight_decay"] for group in optimizer.param_groups}
        assert max(decays) == pytest.approx(1e-4 * factor, rel=1e-12)


def test_optimizer_without_the_overrides_is_noticed() -> None:
    mup = resolved()
    with pytest.raises(ParameterizationError, match="pass config_overrides="):
        mup.check_training(training(mup, overrides=False))


def test_absolute_warmup_start_and_another_decay_are_refused() -> None:
    mup = resolved()
    optimizer = training(mup)
    with pytest.raises(ConfigError, match=r"init_lr=0.001 starts every group"):
        mup.check_training(optimizer, schedule(optimizer, init_lr=1e-3))
    with pytest.raises(ConfigError, match=r"end_wd=0.1 replaces"):
        mup.check_training(optimizer, schedule(optimizer, start_wd=0.1, end_wd=0.1))


def test_describe_prints_every_row() -> None:
    text = resolved().describe()
    assert all(f" {role} " in text for role in ("embedding", "query", "ffn_out", "unembedding"))
    assert "attention scores 0.0625" in text


def test_a_model_that_never_went_through_apply_is_refused() -> None:
    mup = resolved()
    model = built(mup)
    for ask in (lambda: mup.check(model), lambda: mup.config_overrides([model])):
        with pytest.raises(ParameterizationError, match=r"never went through apply\(\)"):
            ask()
