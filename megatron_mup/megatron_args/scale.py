"""Flags of training at scale: pipeline chunks, sequence parallelism, FP8, recomputation, Muon.

What differs from a plain copy of the value: Megatron's derived sizes, its own defaults where ours
differ, and combinations that it drops with a warning. Source: megatron-core 0.19.2,
``training/arguments.py``. Must not import torch or megatron.
"""

from __future__ import annotations

from megatron_mup.errors import ConfigError
from megatron_mup.megatron_args.draft import Draft


def translate_scale(draft: Draft) -> None:
    """Finish the options whose flags have been copied; see the module's text.

    Args:
        draft: changed in place.

    Raises:
        ConfigError: contradictory flags, or sizes that do not divide.
    """
    _virtual_stages(draft)
    _sequence_parallel(draft)
    _transformer_engine(draft)
    _fp8(draft)
    _recomputation(draft)
    _muon(draft)
    _retention(draft)


def _virtual_stages(draft: Draft) -> None:
    """Megatron also takes the layers of a chunk instead of the number of chunks."""
    per_chunk = draft.flags.take("num-layers-per-virtual-pipeline-stage", int)
    key = "parallel.virtual_pipeline_model_parallel_size"
    if per_chunk is None:
        return
    if draft.get(key) is not None:
        raise ConfigError(
            "--num-layers-per-virtual-pipeline-stage and --num-virtual-stages-per-pipeline-rank "
            "are both given; give one"
        )
    layers, stages = draft.get("model.num_layers"), draft.get(_PIPELINE) or 1
    if not layers or per_chunk < 1 or layers % (stages * per_chunk):
        raise ConfigError(
            f"--num-layers-per-virtual-pipeline-stage {per_chunk} does not divide --num-layers "
            f"{layers} over --pipeline-model-parallel-size {stages}; change one of them"
        )
    draft.set(key, layers // stages // per_chunk)


_PIPELINE = "parallel.pipeline_model_parallel_size"


def _sequence_parallel(draft: Draft) -> None:
    tensor = draft.get("parallel.tensor_model_parallel_size") or 1
    if draft.get("parallel.sequence_parallel") and tensor == 1:
        draft.drop("parallel.sequence_parallel")
        draft.notes.append(
            "--sequence-parallel: has no effect without tensor parallelism; Megatron switches it "
            "off too"
        )


def _transformer_engine(draft: Draft) -> None:
    """FP8 and context parallelism exist in TransformerEngine alone, Megatron's default."""
    context = draft.get("parallel.context_parallel_size") or 1
    if not (draft.get("precision.fp8_format") or context > 1):
        return
    if draft.get("model.transformer_impl") is None:
        draft.set("model.transformer_impl", "transformer_engine")
        # What is said of a missing flag holds no longer.
        absent = "--transformer-impl is not given"
        draft.notes[:] = [note for note in draft.notes if not note.startswith(absent)]


def _fp8(draft: Draft) -> None:
    if draft.get("precision.fp8_format") is None:
        # Without a format Megatron ignores the other FP8 flags; this package refuses them.
        for name in ("fp8_param_gather", "first_last_layers_bf16"):
            if draft.get(f"precision.{name}"):
                draft.drop(f"precision.{name}")
                flag = name.replace("_", "-")
                draft.notes.append(f"--{flag}: has no effect without --fp8-format")
        return
    # Megatron's defaults; ours are the history and maximum of TransformerEngine's documentation.
    if (draft.get("precision.fp8_recipe") or "delayed") == "delayed":
        draft.default("precision.fp8_amax_history_len", 1)
        draft.default("precision.fp8_amax_compute_algo", "most_recent")


def _recomputation(draft: Draft) -> None:
    key = "recompute.recompute_granularity"
    if draft.flags.take("recompute-activations", bool):
        draft.set(key, "selective")
    fused = (
        draft.get("model.transformer_impl") != "transformer_engine"
        and draft.get("model.attention_backend") != "local"
    )
    if draft.get(key) == "selective" and fused:
        draft.drop(key)
        draft.notes.append(
            "--recompute-granularity selective: recomputes the core attention, which "
            "attention_backend=sdpa does inside its kernel; left out"
        )


def _muon(draft: Draft) -> None:
    """Muon's scaling, momentum and split differ by default, and with them the trained model."""
    if draft.get("optimizer.optimizer") != "muon":
        return
    draft.default("optimizer.muon_momentum", 0.9)
    # --muon-tp-mode has been taken if it was given with a value that exists here.
    given = set(draft.flags.given)
    if draft.get("optimizer.muon_tp_mode") is not None:
        given.add("muon-tp-mode")
    for flag, ours in (
        ("muon-scale-mode", "unit_rms_norm, whose LR does not depend on width"),
        ("muon-tp-mode", "duplicated: Megatron's blockwise update depends on the layout"),
        ("muon-nesterov", "Nesterov momentum"),
    ):
        if flag not in given:
            draft.notes.append(
                f"--{flag} is not given: Megatron's default differs, here it is {ours}"
            )


def _retention(draft: Draft) -> None:
    """With --save-retain-interval Megatron deletes each older checkpoint after a save."""
    interval = draft.get("checkpoint.save_retain_interval")
    if interval is not None:
        draft.set("checkpoint.keep_last", 1)
        draft.notes.append(
            f"--save-retain-interval {interval}: Megatron keeps only the newest checkpoint and "
            "these, so checkpoint.keep_last is 1; 2 leaves one to fall back to"
        )
