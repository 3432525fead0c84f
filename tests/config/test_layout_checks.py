"""Layouts that cannot work are refused with the option to change."""

from __future__ import annotations

import pytest

from megatron_mup.errors import ConfigError
from tests.configurations import tiny

ENGINE = ("transformer_impl=transformer_engine", "bf16=true")
FP8 = (*ENGINE, "fp8_format=hybrid")
BF16_LAYERS = (*FP8, "fp8_recipe=tensorwise", "first_last_layers_bf16=true")
TP2, PP2 = "tensor_model_parallel_size=2", "pipeline_model_parallel_size=2"
TP4 = "tensor_model_parallel_size=4"


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (("tensor_model_parallel_size=3",), "hidden_size 64 .* tensor_model_parallel_size 3"),
        ((TP2, "num_query_groups=1", "optimizer=muon"), "num_query_groups 1 is not divisible"),
        (("sequence_parallel=true",), "raise it or leave sequence_parallel out"),
        ((TP2, "sequence_parallel=true", "seq_length=15"), "seq_length 15 is not divisible"),
        (("pipeline_model_parallel_size=3",), "num_layers 2 is not divisible"),
        (("virtual_pipeline_model_parallel_size=2",), "chunks need at least 2 stages"),
        (
            (PP2, "virtual_pipeline_model_parallel_size=2"),
            "num_layers 2 .* x virtual_pipeline_model_parallel_size 2; change one",
        ),
        (("context_parallel_size=2",), "set model.transformer_impl=transformer_engine"),
        ((*ENGINE, "context_parallel_size=2", "seq_length=18"), "2 x context_parallel_size 2"),
        (
            (*ENGINE, "context_parallel_size=2", TP4, "sequence_parallel=true", "seq_length=20"),
            "seq_length 20 / context_parallel_size 2 is not divisible .* 4",
        ),
        (
            (*FP8, "fp8_param_gather=true", "use_distributed_optimizer=true", "optimizer=muon"),
            "muon has a layer-wise one; leave fp8_param_gather out",
        ),
        (("overlap_param_gather=true",), "needs use_distributed_optimizer=true and"),
        (
            ("overlap_param_gather=true", "use_distributed_optimizer=true"),
            "overlap_grad_reduce=true; set them",
        ),
        (("distributed_timeout_minutes=0",), "must be positive"),
        (("fp8_format=hybrid",), "set precision.bf16=true"),
        (("bf16=true", "fp8_format=hybrid"), "set model.transformer_impl=transformer_engine"),
        (("fp8_param_gather=true",), "set precision.fp8_format=hybrid or leave it out"),
        (("first_last_layers_bf16=true",), "has no effect without FP8"),
        ((*FP8, "fp8_param_gather=true"), "parallel.use_distributed_optimizer=true"),
        ((*FP8, "ffn_hidden_size=200"), r"ffn_hidden_size .* \(200\) to be divisible by 16"),
        ((*FP8, "seq_length=12"), r"tokens of a microbatch on one rank \(24\)"),
        ((*FP8, "first_last_layers_bf16=true"), "fp8_recipe=tensorwise or blockwise"),
        ((*BF16_LAYERS,), "nothing is left for FP8"),
        (
            (*BF16_LAYERS, PP2, "num_layers=4", "num_layers_at_end_in_bf16=3"),
            "must each fit into one pipeline stage of 2 layers",
        ),
        (("recompute_granularity=full",), "'full' needs both"),
        (
            ("recompute_granularity=selective", "recompute_num_layers=1"),
            "nothing else takes them",
        ),
        (("recompute_granularity=selective",), "use full, or leave it out"),
        (
            ("recompute_granularity=full", "recompute_method=uniform", "recompute_num_layers=3"),
            "exceeds the 2 layers of a pipeline stage",
        ),
    ],
)
def test_layout_is_refused_with_its_cure(overrides: tuple[str, ...], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        tiny(*overrides)


@pytest.mark.parametrize(
    "overrides",
    [
        (TP2, "sequence_parallel=true"),
        (PP2, "num_layers=4", "virtual_pipeline_model_parallel_size=2"),
        (*ENGINE, "context_parallel_size=2"),
        (*BF16_LAYERS, PP2, "num_layers=4", "num_layers_at_end_in_bf16=2"),
        (*FP8, "fp8_param_gather=true", "use_distributed_optimizer=true"),
        ("recompute_granularity=selective", "attention_backend=local"),
        ("recompute_granularity=selective", *ENGINE),
    ],
)
def test_layout_that_works_is_accepted(overrides: tuple[str, ...]) -> None:
    assert tiny(*overrides).parallel.model_parallel_size in (1, 2)


def test_waiting_for_a_dead_owner_must_not_outlast_the_other_ranks() -> None:
    saving = ("checkpoint.save=here", "lease_timeout_seconds=120")
    with pytest.raises(ConfigError, match="lower the first or raise the second"):
        tiny(*saving, "distributed_timeout_minutes=2")
    tiny(*saving, "distributed_timeout_minutes=2.1")
