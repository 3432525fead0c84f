"""Which of Megatron's model options each option of a run sets, with literal values."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from megatron.core.models.common.embeddings import rope_utils

from megatron_mup.model.gpt import transformer_config
from tests.configurations import tiny

ENGINE = ("transformer_impl=transformer_engine", "bf16=true")
FP8 = (*ENGINE, "fp8_format=hybrid")


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (
            (),
            {
                "tensor_model_parallel_size": 1,
                "virtual_pipeline_model_parallel_size": None,
                "sequence_parallel": False,
                "recompute_granularity": None,
                "deterministic_mode": False,
                "fp8": None,
                "fp8_param": False,
                "params_dtype": torch.float32,
                "pipeline_dtype": torch.float32,
                "calculate_per_token_loss": True,
                "deallocate_pipeline_outputs": True,
            },
        ),
        (
            ("tensor_model_parallel_size=2", "sequence_parallel=true"),
            {"tensor_model_parallel_size": 2, "sequence_parallel": True},
        ),
        (
            (
                "pipeline_model_parallel_size=2",
                "num_layers=4",
                "virtual_pipeline_model_parallel_size=2",
            ),
            {
                "pipeline_model_parallel_size": 2,
                "virtual_pipeline_model_parallel_size": 2,
                "overlap_p2p_comm": True,
                "batch_p2p_comm": False,
            },
        ),
        (
            # One chunk is the plain schedule.
            ("pipeline_model_parallel_size=2", "virtual_pipeline_model_parallel_size=1"),
            {"virtual_pipeline_model_parallel_size": None, "batch_p2p_comm": True},
        ),
        ((*ENGINE, "context_parallel_size=2"), {"context_parallel_size": 2, "bf16": True}),
        (
            ("recompute_granularity=full", "recompute_method=block", "recompute_num_layers=2"),
            {
                "recompute_granularity": "full",
                "recompute_method": "block",
                "recompute_num_layers": 2,
            },
        ),
        (
            ("recompute_granularity=selective", "attention_backend=local"),
            {"recompute_granularity": "selective", "recompute_modules": ["core_attn"]},
        ),
        (("deterministic_mode=true",), {"deterministic_mode": True}),
        (
            (*FP8, "fp8_margin=1", "fp8_amax_history_len=16", "fp8_amax_compute_algo=most_recent"),
            {
                "fp8": "hybrid",
                "fp8_recipe": "delayed",
                "fp8_margin": 1,
                "fp8_amax_history_len": 16,
                "fp8_amax_compute_algo": "most_recent",
                "params_dtype": torch.bfloat16,
            },
        ),
        (
            (
                *FP8,
                "num_layers=4",
                "fp8_recipe=tensorwise",
                "first_last_layers_bf16=true",
                "num_layers_at_start_in_bf16=2",
                "use_distributed_optimizer=true",
                "fp8_param_gather=true",
            ),
            {
                "fp8_recipe": "tensorwise",
                "first_last_layers_bf16": True,
                "num_layers_at_start_in_bf16": 2,
                "num_layers_at_end_in_bf16": 1,
                "fp8_param": True,
            },
        ),
        ((*FP8, "fp8_recipe=blockwise"), {"fp8_recipe": "blockwise"}),
    ],
)
def test_options_reach_megatron(
    overrides: tuple[str, ...], expected: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Megatron looks for TransformerEngine's rotation while it checks the configuration.
    for name in ("fused_apply_rotary_pos_emb", "fused_apply_rotary_pos_emb_thd"):
        monkeypatch.setattr(rope_utils, name, object())
    run = tiny(*overrides)
    config = transformer_config(run, run.table.multipliers)

    assert {name: getattr(config, name) for name in expected} == expected
