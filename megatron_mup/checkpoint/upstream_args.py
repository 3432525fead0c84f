"""The arguments that Megatron-LM's ``megatron.training`` finds in our checkpoints.

Upstream saves its parsed command line in the common state, as an ``argparse.Namespace``, and reads
from it what ``--use-checkpoint-args`` takes over, what must not differ on resuming, the layout and
the consumed samples. Owns the names (megatron-core 0.19.2, ``training/checkpointing.py``:
``load_args_from_checkpoint``, ``check_checkpoint_args``, ``load_checkpoint``). Nothing here reads
them back: this package goes by its own record. Must not import torch or megatron.
"""

from __future__ import annotations

import math
from argparse import Namespace
from typing import Any

from megatron_mup.config import Activation, ModelConfig, RunConfig
from megatron_mup.errors import CheckpointError
from megatron_mup.parameterization.evaluation import Multipliers
from megatron_mup.parameterization.roles import NormGain


def upstream_args(run: RunConfig, *, consumed_train_samples: int = 0) -> Namespace:
    """A run's configuration in the names of upstream's command line.

    Args:
        run: the run's configuration.
        consumed_train_samples: sequences consumed so far; upstream keeps its count in here.

    Returns:
        Plain values only, the same on every rank.
    """
    return Namespace(
        **_shape(run.model),
        **_layers(run.model),
        **_mup(run.model, run.table.multipliers),
        **_layout(run),
        consumed_train_samples=consumed_train_samples,
        consumed_valid_samples=0,
        skipped_train_samples=0,
        data_parallel_random_init=False,
        # Upstream then asks neither for its own optimizer's tensors nor for random states.
        no_save_optim=True,
        no_save_rng=True,
        async_save=False,
        ckpt_format="torch_dist",
    )


def upstream_flags(run: RunConfig) -> tuple[str, ...]:
    """What upstream must be told beside ``--use-checkpoint-args`` to compute the same function.

    Args:
        run: the configuration of the checkpoint.

    Returns:
        Words of a command line; ``--use-checkpoint-args`` does not take these over. A factor on
        the attention scores enters through upstream's muP, whose base width is the model's own.

    Raises:
        CheckpointError: upstream's GPT cannot compute it, whatever the flags.
    """
    _refuse_foreign(run.model, run.table.multipliers)
    flags = ["--norm-epsilon", repr(run.model.norm_epsilon)]
    if run.model.add_bias_linear and run.model.activation is not Activation.SWIGLU:
        # Upstream's fused bias and GELU is the tanh approximation, and refuses squared ReLU.
        flags.append("--no-bias-gelu-fusion")
    mup = _mup(run.model, run.table.multipliers)
    if mup.pop("use_mup"):
        flags.append("--use-mup")
        for name, value in mup.items():
            if value is not None:
                flags += ["--" + name.replace("_", "-"), repr(value)]
    return tuple(flags)


def upstream_line(run: RunConfig) -> str:
    """Say in one line how upstream loads a checkpoint of this run, or why it cannot.

    Args:
        run: the configuration of the checkpoint.

    Returns:
        For the user: the flags of megatron.training, without its data, tokenizer and optimizer.
    """
    try:
        flags = upstream_flags(run)
    except CheckpointError as error:
        return f"Megatron-LM: {error}"
    return f"Megatron-LM: --load DIR --use-checkpoint-args --no-load-optim {' '.join(flags)}"


def _shape(model: ModelConfig) -> dict[str, Any]:
    return {
        "num_layers": model.num_layers,
        "encoder_num_layers": model.num_layers,
        "hidden_size": model.hidden_size,
        "ffn_hidden_size": model.ffn_width,
        "num_attention_heads": model.num_attention_heads,
        "group_query_attention": model.query_groups != model.num_attention_heads,
        "num_query_groups": model.query_groups,
        "kv_channels": model.head_dim,
        "untie_embeddings_and_output_weights": model.untie_embeddings_and_output_weights,
        "vocab_size": model.vocab_size,
        "padded_vocab_size": model.padded_vocab_size,
        "make_vocab_size_divisible_by": model.make_vocab_size_divisible_by,
        "tokenizer_type": None,
        "transformer_impl": model.transformer_impl.value,
        "seq_length": model.seq_length,
        "encoder_seq_length": model.seq_length,
        "max_position_embeddings": model.seq_length,
        "position_embedding_type": "rope",
        "add_position_embedding": True,
        "use_rotary_position_embeddings": False,
        "rotary_base": model.rotary_base,
        "rotary_percent": model.rotary_percent,
        "rotary_interleaved": False,
    }


def _layers(model: ModelConfig) -> dict[str, Any]:
    return {
        "normalization": "RMSNorm",
        # 0.19.2 reads the first name, versions before it the second.
        "layernorm_epsilon": model.norm_epsilon,
        "norm_epsilon": model.norm_epsilon,
        "layernorm_zero_centered_gamma": False,
        "apply_layernorm_1p": False,
        "apply_query_key_layer_scaling": False,
        "qk_layernorm": False,
        "add_bias_linear": model.add_bias_linear,
        "add_qkv_bias": False,
        "swiglu": model.activation is Activation.SWIGLU,
        "squared_relu": model.activation is Activation.SQUARED_RELU,
        "bias_gelu_fusion": False,
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
        "num_experts": None,
    }


def _mup(model: ModelConfig, multipliers: Multipliers) -> dict[str, Any]:
    """Multipliers as upstream's muP of width 1: scores are scaled by sqrt(base head dim)/D^power.

    Source: ``core/transformer/transformer_config.py``, ``__post_init__``.
    """
    head_dim, scale = model.head_dim, multipliers.attention
    # 1/sqrt(D) and D**-0.5 may differ in the last bit.
    plain = math.isclose(scale, head_dim**-0.5, rel_tol=1e-12)
    inverse = math.isclose(scale, 1 / head_dim, rel_tol=1e-12)
    base_head_dim = None if plain or inverse else (scale * head_dim) ** 2
    return {
        "use_mup": not (plain and multipliers.embedding == multipliers.logit == 1.0),
        # Without a width of its own it leaves learning rates and the logit multiplier alone.
        "mup_base_hidden_size": model.hidden_size,
        "mup_embedding_mult": multipliers.embedding,
        "mup_output_mult": multipliers.logit,
        "mup_base_head_dim": base_head_dim,
        "mup_attn_scale_power": 0.5 if plain else 1.0,
    }


def _layout(run: RunConfig) -> dict[str, Any]:
    parallel = run.parallel
    return {
        "tensor_model_parallel_size": parallel.tensor_model_parallel_size,
        "pipeline_model_parallel_size": parallel.pipeline_model_parallel_size,
        "virtual_pipeline_model_parallel_size": parallel.virtual_stages,
        "context_parallel_size": parallel.context_parallel_size,
        "expert_model_parallel_size": 1,
        "sequence_parallel": parallel.sequence_parallel,
        "use_distributed_optimizer": parallel.use_distributed_optimizer,
        "global_batch_size": run.training.global_batch_size,
        "micro_batch_size": run.training.micro_batch_size,
        "train_iters": run.training.train_iters,
        "seed": run.training.seed,
        "bf16": run.precision.bf16,
        "fp16": False,
    }


def _refuse_foreign(model: ModelConfig, multipliers: Multipliers) -> None:
    """Refuse what no flag of upstream's builds."""
    lacks = {
        f"residual multiplier ({multipliers.residual:g})": multipliers.residual != 1.0,
        "model.activation=relu": model.activation is Activation.RELU,
        "model.norm_gain=scalar": model.norm_gain is NormGain.SCALAR,
        "model.embedding_norm": model.embedding_norm,
        "model.unembedding_bias": model.unembedding_bias,
    }
    missing = [name for name, present in lacks.items() if present]
    if missing:
        raise CheckpointError(
            f"megatron.training's own GPT has no {', no '.join(missing)}, so it would compute "
            "another function from these weights; build the model with megatron_mup.library "
            "(docs/library.md); 'megatron-mup convert to-sp' folds multipliers away"
        )
