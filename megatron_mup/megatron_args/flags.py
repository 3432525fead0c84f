"""Megatron-LM's flags as data: what ``megatron_args`` maps one to one, and why the rest is not.

Source of names, types and defaults: megatron-core 0.19.2, ``training/arguments.py``. Flags are
written without their leading dashes.
"""

from __future__ import annotations

DIRECT: dict[str, tuple[str, type]] = {
    "num-layers": ("model.num_layers", int),
    "hidden-size": ("model.hidden_size", int),
    "num-attention-heads": ("model.num_attention_heads", int),
    "vocab-size": ("model.vocab_size", int),
    "seq-length": ("model.seq_length", int),
    "kv-channels": ("model.kv_channels", int),
    "ffn-hidden-size": ("model.ffn_hidden_size", int),
    "norm-epsilon": ("model.norm_epsilon", float),
    "rotary-base": ("model.rotary_base", int),
    "rotary-percent": ("model.rotary_percent", float),
    "lr": ("optimizer.lr", float),
    "adam-beta1": ("optimizer.adam_beta1", float),
    "adam-beta2": ("optimizer.adam_beta2", float),
    "adam-eps": ("optimizer.adam_eps", float),
    "lion-beta1": ("optimizer.lion_beta1", float),
    "lion-beta2": ("optimizer.lion_beta2", float),
    "weight-decay": ("optimizer.weight_decay", float),
    "clip-grad": ("optimizer.clip_grad", float),
    "lr-warmup-iters": ("schedule.lr_warmup_iters", int),
    "lr-decay-iters": ("schedule.lr_decay_iters", int),
    "lr-wsd-decay-iters": ("schedule.lr_wsd_decay_iters", int),
    "train-iters": ("training.train_iters", int),
    "global-batch-size": ("training.global_batch_size", int),
    "micro-batch-size": ("training.micro_batch_size", int),
    "eval-interval": ("training.eval_interval", int),
    "eval-iters": ("training.eval_iters", int),
    "seed": ("training.seed", int),
    "bf16": ("precision.bf16", bool),
    "profile-step-start": ("training.profile_step_start", int),
    "profile-step-end": ("training.profile_step_end", int),
    "init-method-std": ("parameterization.init_method_std", float),
    "embedding-init-method-std": ("parameterization.embedding_init_method_std", float),
    "train-data-path": ("data.train_data_path", list),
    "valid-data-path": ("data.valid_data_path", list),
    "per-split-data-args-path": ("data.per_split_data_args_path", str),
    "data-cache-path": ("data.data_cache_path", str),
    "eod-mask-loss": ("data.eod_mask_loss", bool),
    "tensor-model-parallel-size": ("parallel.tensor_model_parallel_size", int),
    "pipeline-model-parallel-size": ("parallel.pipeline_model_parallel_size", int),
    "num-virtual-stages-per-pipeline-rank": (
        "parallel.virtual_pipeline_model_parallel_size",
        int,
    ),
    "context-parallel-size": ("parallel.context_parallel_size", int),
    "sequence-parallel": ("parallel.sequence_parallel", bool),
    "use-distributed-optimizer": ("parallel.use_distributed_optimizer", bool),
    "overlap-grad-reduce": ("parallel.overlap_grad_reduce", bool),
    "overlap-param-gather": ("parallel.overlap_param_gather", bool),
    "distributed-timeout-minutes": ("parallel.distributed_timeout_minutes", int),
    "fp8-param-gather": ("precision.fp8_param_gather", bool),
    "fp8-margin": ("precision.fp8_margin", int),
    "fp8-amax-history-len": ("precision.fp8_amax_history_len", int),
    "first-last-layers-bf16": ("precision.first_last_layers_bf16", bool),
    "num-layers-at-start-in-bf16": ("precision.num_layers_at_start_in_bf16", int),
    "num-layers-at-end-in-bf16": ("precision.num_layers_at_end_in_bf16", int),
    "deterministic-mode": ("precision.deterministic_mode", bool),
    "recompute-num-layers": ("recompute.recompute_num_layers", int),
    "muon-momentum": ("optimizer.muon_momentum", float),
    "muon-num-ns-steps": ("optimizer.muon_num_ns_steps", int),
    "save": ("checkpoint.save", str),
    "save-interval": ("checkpoint.save_interval", int),
    "save-retain-interval": ("checkpoint.save_retain_interval", int),
    "async-save": ("checkpoint.async_save", bool),
    "load": ("checkpoint.load", str),
    "ckpt-step": ("checkpoint.ckpt_step", int),
    "finetune": ("checkpoint.finetune", bool),
    "exit-duration-in-mins": ("faults.exit_duration_in_mins", int),
    "log-interval": ("logging.log_interval", int),
    "tensorboard-dir": ("logging.tensorboard_dir", str),
    "wandb-project": ("logging.wandb_project", str),
    "wandb-exp-name": ("logging.wandb_exp_name", str),
    "wandb-save-dir": ("logging.wandb_save_dir", str),
}
"""Flag -> our option and its type; ``bool`` is a switch, ``list`` one or more values."""

CHOICES: dict[str, tuple[str, dict[str, str | None]]] = {
    "optimizer": (
        "optimizer.optimizer",
        {
            "adam": "adam",
            "lion": "lion",
            "sgd": None,
            "muon": "muon",
            "dist_muon": None,
            "adaptive_muon": None,
            "soap": None,
        },
    ),
    "muon-tp-mode": (
        "optimizer.muon_tp_mode",
        {"blockwise": None, "duplicated": "duplicated", "distributed": "distributed"},
    ),
    "fp8-format": ("precision.fp8_format", {"e4m3": "e4m3", "hybrid": "hybrid"}),
    "fp8-recipe": (
        "precision.fp8_recipe",
        {
            "delayed": "delayed",
            "tensorwise": "tensorwise",
            "blockwise": "blockwise",
            "mxfp8": None,
            "custom": None,
        },
    ),
    "fp8-amax-compute-algo": (
        "precision.fp8_amax_compute_algo",
        {"max": "max", "most_recent": "most_recent"},
    ),
    "recompute-granularity": (
        "recompute.recompute_granularity",
        {"full": "full", "selective": "selective"},
    ),
    "recompute-method": (
        "recompute.recompute_method",
        {"uniform": "uniform", "block": "block"},
    ),
    "lr-decay-style": (
        "schedule.lr_decay_style",
        {
            "constant": "constant",
            "linear": "linear",
            "cosine": "cosine",
            "WSD": "WSD",
            "inverse-square-root": None,
        },
    ),
    "lr-wsd-decay-style": (
        "schedule.lr_wsd_decay_style",
        {
            "exponential": "exponential",
            "linear": "linear",
            "cosine": "cosine",
            "minus_sqrt": "minus_sqrt",
        },
    ),
    "transformer-impl": (
        "model.transformer_impl",
        {"local": "local", "transformer_engine": "transformer_engine", "inference_optimized": None},
    ),
    "attention-backend": (
        "model.attention_backend",
        # PyTorch's attention chooses its kernel itself, as auto does.
        {"auto": "sdpa", "flash": "sdpa", "fused": "sdpa", "unfused": "local", "local": "local"},
    ),
}
"""Flag -> our option, and Megatron's values -> ours; None has no counterpart."""

# Written into every translation, because leaving them out would silently mean our own defaults.
DEFAULTS: dict[str, object] = {
    "model.norm_gain": "vector",
    "optimizer.adam_beta2": 0.999,
    "optimizer.weight_decay": 0.01,
    "optimizer.weight_decay_mode": "coupled",
    "training.eval_iters": 100,
    "logging.log_interval": 100,
}
"""What a Megatron run has without any flag, where our default is another."""

WHEN_ABSENT = {
    "calculate-per-token-loss": (
        "Megatron averages the loss over each microbatch's tokens and then over microbatches, this "
        "package divides by the batch's unmasked tokens; the same when no token is masked"
    ),
    "transformer-impl": (
        "Megatron's default is transformer_engine, here it is local; set "
        "model.transformer_impl=transformer_engine on a GPU that has it"
    ),
}
"""Flag -> how a Megatron run without it differs from ours."""

REQUIRED = {
    "model.num_layers": "--num-layers is not given",
    "model.hidden_size": "--hidden-size is not given",
    "model.num_attention_heads": "--num-attention-heads is not given",
    "model.vocab_size": "Megatron asks the tokenizer; set it to the tokenizer's size",
    "model.seq_length": "--seq-length is not given",
    "optimizer.lr": "--lr is not given",
    "training.train_iters": "neither --train-iters nor --train-samples is usable",
    "training.global_batch_size": "Megatron takes micro batch size x data-parallel size",
    "training.micro_batch_size": "--micro-batch-size is not given",
}
"""Options without which no configuration loads."""

# With another value the same flags are listed like any other.
ALWAYS_SO: dict[str, tuple[tuple[str, ...], ...]] = {
    "calculate-per-token-loss": ((),),
    "ckpt-format": (("torch_dist",),),
    "expert-model-parallel-size": (("1",),),
    "muon-coefficient-type": (("quintic",),),
    "muon-nesterov": ((),),
    "muon-scalar-optimizer": (("adam",),),
    "muon-scale-mode": (("unit_rms_norm",),),
    "no-position-embedding": ((),),
    "use-mcore-models": ((),),
    "use-pytorch-profiler": ((),),
    "weight-decay-incr-style": (("constant",),),
}
"""Flags whose value is what this package always does."""

NO_COUNTERPART = "no counterpart; see docs/configuration.md for what can be set"
# Ordered from the special to the general, as the patterns overlap.
REASONS: tuple[tuple[str, str], ...] = (
    ("fp16", "only fp32 and precision.bf16=true are available; fp32 is used"),
    (r"fp4.*", "FP4 is not available; precision.fp8_format is"),
    (r"(no-)?fp8-.*", "there is no such FP8 switch; see the precision section"),
    (
        r"exit-signal.*",
        "SIGTERM, SIGUSR1 and SIGINT always save and end the run; nothing has to be switched on",
    ),
    (
        r"(override|use-checkpoint)-opt[_-]param[_-]scheduler",
        "name options that may differ from the checkpoint's: checkpoint.override=[optimizer.lr]",
    ),
    (r"muon-.*", "there is no such Muon option"),
    (r"recompute-modules", "selective recomputation takes the core attention, nothing else"),
    ("max-position-embeddings", "rotary embeddings have no table of that size"),
    ("apply-layernorm-1p", "gains are stored as they are, not minus 1; the function is the same"),
    ("qk-layernorm", "norms on queries and keys are not available; the model has none"),
    (
        r"rotary-.*|use-rope-scaling|rope-scaling-factor|no-rope-freq",
        "only plain RoPE is available",
    ),
    (
        r"decoupled-(min-)?lr",
        "one base LR is distributed by the rule table; there is no second one",
    ),
    (r"(start|end)-weight-decay|weight-decay-incr-style", "weight decay follows the LR schedule"),
    (r"mup-width-mult", "follows from the hidden sizes"),
    (r"mup-.*", "has no effect without --use-mup"),
    (r"moe-.*|num-experts|expert-.*", "mixture of experts is not available"),
    (
        r"vocab-file|merge-file|tokenizer-.*|tiktoken-.*|null-tokenizer-.*|vocab-extra-ids",
        "shards hold token ids; name the tokenizer to 'megatron-mup data' and its size in "
        "model.vocab_size",
    ),
    (r"mock-data", "training reads shards; make some with 'megatron-mup data'"),
    (r"test-data-path", "there is no test set; evaluate with data.valid_data_path"),
    (
        r"hierarchical-context-.*|hybrid-context-.*|pipeline-model-parallel-layout|"
        r"decoder-(first|last)-pipeline-num-layers|account-for-.*|microbatch-group-.*",
        "layers are spread evenly over pipeline stages and chunks, sequences over context ranks",
    ),
    (
        r"(no-)?overlap-.*|distribute-saved-activations|distributed-.*|manual-gc.*|"
        r"empty-unused-.*|no-.*-fusion|cross-entropy-.*|use-flash-attn|num-workers|"
        r"no-mmap-bin-files|no-create-attention-mask-in-dataloader|no-persist-layer-norm|"
        r"tp-comm-.*|attention-softmax-in-fp32|accumulate-allreduce-grads-in-fp32|dataloader-type",
        "speed, memory or precision of the same computation; there is no such switch",
    ),
    (r"log-.*|timing-.*|tensorboard-.*|wandb-.*", "there is no such logging switch"),
    (r"(no-)?(save|load)-.*|ckpt-.*|use-checkpoint-.*", "there is no such checkpoint switch"),
)
"""Patterns of flags and why they are listed; the first that matches counts."""
