"""Flags of training at scale: layouts, FP8, recomputation, Muon, checkpoints, faults."""

from __future__ import annotations

from typing import Any

import pytest

from megatron_mup.config_io import config_from_dict
from megatron_mup.errors import ConfigError
from megatron_mup.megatron_args import translate

BASE = (
    "--num-layers 24 --hidden-size 2048 --num-attention-heads 16 --vocab-size 32000 "
    "--seq-length 1024 --train-iters 1000 --global-batch-size 32 --micro-batch-size 2 --lr 3e-4 "
    "--position-embedding-type rope --normalization RMSNorm --hidden-dropout 0 "
    "--attention-dropout 0.0 --calculate-per-token-loss "
)
LOCAL = BASE + "--transformer-impl local "
TE = BASE + "--transformer-impl transformer_engine --bf16 "


def section(name: str, flags: str) -> dict[str, Any]:
    """One section of a translation that loads, and leaves nothing unsaid."""
    translation = translate(flags)
    assert translation.unmapped == ()
    config_from_dict(translation.config)
    return translation.config.get(name, {})


def test_layout_flags_become_the_layout() -> None:
    flags = (
        "--tensor-model-parallel-size 4 --sequence-parallel --pipeline-model-parallel-size 2 "
        "--num-virtual-stages-per-pipeline-rank 3 --use-distributed-optimizer "
        "--overlap-grad-reduce --overlap-param-gather --distributed-timeout-minutes 30"
    )
    assert section("parallel", LOCAL + flags) == {
        "tensor_model_parallel_size": 4,
        "pipeline_model_parallel_size": 2,
        "virtual_pipeline_model_parallel_size": 3,
        "sequence_parallel": True,
        "use_distributed_optimizer": True,
        "overlap_grad_reduce": True,
        "overlap_param_gather": True,
        "distributed_timeout_minutes": 30,
    }


def test_layers_of_a_chunk_become_the_number_of_chunks() -> None:
    flags = "--pipeline-model-parallel-size 4 --num-layers-per-virtual-pipeline-stage 2"
    parallel = section("parallel", LOCAL + flags)
    assert parallel["virtual_pipeline_model_parallel_size"] == 3


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            "--pipeline-model-parallel-size 4 --num-layers-per-virtual-pipeline-stage 2 "
            "--num-virtual-stages-per-pipeline-rank 3",
            "are both given; give one",
        ),
        (
            "--pipeline-model-parallel-size 4 --num-layers-per-virtual-pipeline-stage 4",
            "4 does not divide --num-layers 24 over --pipeline-model-parallel-size 4",
        ),
        ("--num-layers-per-virtual-pipeline-stage 0", "0 does not divide"),
    ],
)
def test_contradictory_pipeline_flags_are_refused(flags: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        translate(LOCAL + flags)
    assert message in str(caught.value)


def test_sequence_parallel_without_tensor_parallel_is_left_out_as_in_megatron() -> None:
    translation = translate(LOCAL + "--sequence-parallel")
    assert "sequence_parallel" not in translation.config.get("parallel", {})
    assert translation.unmapped[0].startswith("--sequence-parallel: has no effect")


def test_fp8_flags_become_the_precision() -> None:
    flags = (
        "--fp8-format hybrid --fp8-recipe tensorwise --fp8-param-gather "
        "--use-distributed-optimizer --first-last-layers-bf16 --num-layers-at-start-in-bf16 2 "
        "--num-layers-at-end-in-bf16 3 --deterministic-mode"
    )
    assert section("precision", TE + flags) == {
        "bf16": True,
        "fp8_format": "hybrid",
        "fp8_recipe": "tensorwise",
        "fp8_param_gather": True,
        "first_last_layers_bf16": True,
        "num_layers_at_start_in_bf16": 2,
        "num_layers_at_end_in_bf16": 3,
        "deterministic_mode": True,
    }


def test_delayed_scaling_gets_megatrons_short_history() -> None:
    assert section("precision", TE + "--fp8-format e4m3 --fp8-margin 1") == {
        "bf16": True,
        "fp8_format": "e4m3",
        "fp8_margin": 1,
        "fp8_amax_history_len": 1,
        "fp8_amax_compute_algo": "most_recent",
    }
    flags = TE + "--fp8-format e4m3 --fp8-amax-history-len 16 --fp8-amax-compute-algo max"
    precision = section("precision", flags)
    assert (precision["fp8_amax_history_len"], precision["fp8_amax_compute_algo"]) == (16, "max")


@pytest.mark.parametrize("flags", ["--bf16 --fp8-format hybrid", "--context-parallel-size 2"])
def test_what_needs_transformer_engine_selects_megatrons_default(flags: str) -> None:
    assert section("model", BASE + flags)["transformer_impl"] == "transformer_engine"


def test_fp8_flags_without_a_format_are_listed() -> None:
    translation = translate(LOCAL + "--fp8-param-gather --fp8-recipe mxfp8")
    assert "precision" not in translation.config
    notes = "\n".join(translation.unmapped)
    assert "--fp8-param-gather: has no effect without --fp8-format" in notes
    assert "--fp8-recipe mxfp8: not available" in notes


def test_recomputation_flags_become_recomputation() -> None:
    flags = "--recompute-granularity full --recompute-method uniform --recompute-num-layers 2"
    assert section("recompute", LOCAL + flags) == {
        "recompute_granularity": "full",
        "recompute_method": "uniform",
        "recompute_num_layers": 2,
    }
    for selective in ("--recompute-activations", "--recompute-granularity selective"):
        assert section("recompute", TE + selective) == {"recompute_granularity": "selective"}
        unfused = LOCAL + "--attention-backend unfused " + selective
        assert section("recompute", unfused) == {"recompute_granularity": "selective"}


def test_selective_recomputation_of_fused_attention_is_left_out() -> None:
    translation = translate(LOCAL + "--recompute-granularity selective")
    assert "recompute" not in translation.config
    assert "does inside its kernel; left out" in translation.unmapped[0]
    config_from_dict(translation.config)


def test_muon_flags_become_muon() -> None:
    flags = (
        "--optimizer muon --muon-momentum 0.95 --muon-num-ns-steps 6 --muon-tp-mode distributed "
        "--muon-scale-mode unit_rms_norm --muon-nesterov"
    )
    optimizer = section("optimizer", LOCAL + flags)
    assert optimizer["optimizer"] == "muon"
    assert optimizer["muon_momentum"] == 0.95
    assert optimizer["muon_num_ns_steps"] == 6
    assert optimizer["muon_tp_mode"] == "distributed"


def test_muon_without_flags_has_megatrons_momentum_and_says_what_differs() -> None:
    translation = translate(LOCAL + "--optimizer muon")
    assert translation.config["optimizer"]["muon_momentum"] == 0.9
    assert [note.split(":")[0] for note in translation.unmapped] == [
        "--muon-scale-mode is not given",
        "--muon-tp-mode is not given",
        "--muon-nesterov is not given",
    ]
    config_from_dict(translation.config)


def test_checkpoint_and_fault_flags_become_ours() -> None:
    flags = (
        "--save a --load a --save-interval 100 --async-save --ckpt-step 300 "
        "--exit-duration-in-mins 230"
    )
    assert section("checkpoint", LOCAL + flags) == {
        "save": "a",
        "save_interval": 100,
        "async_save": True,
        "load": "a",
        "ckpt_step": 300,
    }
    assert section("faults", LOCAL + flags) == {"exit_duration_in_mins": 230}


def test_retained_checkpoints_are_beside_the_newest_one() -> None:
    translation = translate(LOCAL + "--save a --save-interval 10 --save-retain-interval 100")
    checkpoint = config_from_dict(translation.config).checkpoint
    assert (checkpoint.keep_last, checkpoint.save_retain_interval) == (1, 100)
    assert "so checkpoint.keep_last is 1" in translation.unmapped[0]


@pytest.mark.parametrize(
    ("flags", "note"),
    [
        ("--exit-signal-handler", "SIGTERM, SIGUSR1 and SIGINT always save and end the run"),
        ("--override-opt_param-scheduler", "checkpoint.override=[optimizer.lr]"),
        ("--override-opt-param-scheduler", "checkpoint.override=[optimizer.lr]"),
        ("--recompute-modules mlp", "takes the core attention, nothing else"),
        ("--fp8-interval 2", "there is no such FP8 switch"),
        ("--no-fp8-wgrad", "there is no such FP8 switch"),
        ("--fp4-format e2m1", "FP4 is not available"),
        ("--muon-extra-scale-factor 0.2", "there is no such Muon option"),
    ],
)
def test_flags_without_counterpart_are_listed_with_the_way_to_go(flags: str, note: str) -> None:
    assert note in translate(LOCAL + flags).unmapped[0]
