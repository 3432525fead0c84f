"""Literal translations of real command lines; Megatron's own parser confirms names and defaults."""

from __future__ import annotations

import argparse

import pytest
import yaml

from megatron_mup import platform
from megatron_mup.config_io import config_from_dict
from megatron_mup.errors import ConfigError
from megatron_mup.megatron_args import Translation, translate
from megatron_mup.megatron_args.flags import (
    ALWAYS_SO,
    CHOICES,
    DEFAULTS,
    DIRECT,
    REQUIRED,
)

GPT3_175B = """
torchrun --nproc_per_node 8 --nnodes 1 pretrain_gpt.py \\
    --num-layers 96 --hidden-size 12288 --num-attention-heads 96 \\
    --seq-length 2048 --max-position-embeddings 2048 \\
    --attention-backend auto  # or flash, fused, unfused, local
    --micro-batch-size 1 --global-batch-size 1536 --rampup-batch-size 16 16 5859375 \\
    --train-iters 500000 --weight-decay 0.1 --adam-beta1 0.9 --adam-beta2 0.95 \\
    --init-method-std 0.006 --clip-grad 1.0 --fp16 --lr 6.0e-5 --lr-decay-style cosine \\
    --min-lr 6.0e-6 --lr-warmup-fraction .001 --lr-decay-iters 430000 \\
    --tensor-model-parallel-size 8 --pipeline-model-parallel-size 16 \\
    --data-path "my data/gpt3_text_document" --vocab-file gpt2-vocab.json \\
    --merge-file gpt2-merges.txt --split 949,50,1 --log-interval 100 --save-interval 10000 \\
    --eval-interval 1000 --save checkpoints --load checkpoints --eval-iters 10 \\
    --tensorboard-dir logs
"""
LLAMA3_8B = """
    --use-mcore-models --num-layers 32 --hidden-size 4096 --ffn-hidden-size 14336
    --num-attention-heads 32 --group-query-attention --num-query-groups 8 --kv-channels 128
    --seq-length 8192 --max-position-embeddings 8192 --position-embedding-type rope
    --rotary-base 1000000 --rotary-percent 1.0 --attention-dropout 0.0 --hidden-dropout 0.0
    --swiglu --init-method-std 0.0134 --attention-backend fused --apply-layernorm-1p
    --untie-embeddings-and-output-weights --disable-bias-linear --normalization RMSNorm
    --micro-batch-size 1 --global-batch-size 128 --train-samples 1953125000
    --lr-decay-samples 1949218748 --lr-warmup-samples 3906252 --lr 0.00015 --min-lr 0.00001
    --decoupled-lr 5.0e-4 --lr-decay-style cosine --clip-grad 1.0 --weight-decay 0.1
    --adam-beta1 0.9 --adam-beta2 0.95 --bf16 --calculate-per-token-loss --manual-gc
    --fp8-format hybrid --tensor-model-parallel-size 1 --context-parallel-size 1
    --sequence-parallel --use-distributed-optimizer --overlap-grad-reduce --mock-data
    --tokenizer-type NullTokenizer --vocab-size 128256 --data-cache-path cache
    --split '99,1,0' --log-interval 1 --eval-iters 32 --eval-interval 100 --save-interval 1000
    --profile --profile-step-start 4 --profile-step-end 6 --ckpt-format torch_dist
    --save ck --load ck --tensorboard-dir tb --made-up-flag 1 2
"""
SMALL = (
    "--num-layers 24 --hidden-size 2048 --num-attention-heads 16 --vocab-size 32000 "
    "--seq-length 1024 --train-iters 1000 --global-batch-size 32 --micro-batch-size 2 --lr 3e-4 "
    "--position-embedding-type rope --normalization RMSNorm --hidden-dropout 0 "
    "--attention-dropout 0.0 --calculate-per-token-loss --transformer-impl local "
)
MUP = SMALL + (
    "--use-mup --mup-base-hidden-size 256 --untie-embeddings-and-output-weights --swiglu "
    "--group-query-attention --num-query-groups 8 --disable-bias-linear "
)


def notes_on(translation: Translation, flag: str) -> list[str]:
    return [line for line in translation.unmapped if flag in line.split(":")[0]]


@pytest.fixture(scope="module")
def megatron_actions() -> dict[str, argparse.Action]:
    """Megatron's own flags, without their dashes."""
    platform.prepare()
    from megatron.training.arguments import add_megatron_arguments

    parser = argparse.ArgumentParser(allow_abbrev=False)
    add_megatron_arguments(parser)
    return {
        name.removeprefix("--"): action
        for action in parser._actions
        for name in action.option_strings
    }


def test_gpt3_175b_becomes_exactly_this_configuration():
    assert translate(GPT3_175B).config == {
        "model": {
            "num_layers": 96,
            "hidden_size": 12288,
            "num_attention_heads": 96,
            "seq_length": 2048,
            "make_vocab_size_divisible_by": 1024,
            "norm_gain": "vector",
            "add_bias_linear": True,
            "untie_embeddings_and_output_weights": False,
            "attention_backend": "sdpa",
        },
        "optimizer": {
            "lr": 6e-05,
            "adam_beta1": 0.9,
            "adam_beta2": 0.95,
            "weight_decay": 0.1,
            "weight_decay_mode": "coupled",
            "clip_grad": 1.0,
        },
        "training": {
            "train_iters": 500000,
            "global_batch_size": 1536,
            "micro_batch_size": 1,
            "rampup_batch_size": [16, 16, 5859375],
            "eval_interval": 1000,
            "eval_iters": 10,
        },
        "parameterization": {"name": "sp", "init": "sigma", "init_method_std": 0.006},
        "schedule": {
            "lr_warmup_iters": 430,
            "lr_decay_style": "cosine",
            "lr_decay_iters": 430000,
            "min_lr_ratio": 0.1,
        },
        "data": {"train_data_path": ["my data/gpt3_text_document"]},
        "parallel": {"tensor_model_parallel_size": 8, "pipeline_model_parallel_size": 16},
        "checkpoint": {"save": "checkpoints", "save_interval": 10000, "load": "checkpoints"},
        "logging": {"log_interval": 100, "tensorboard_dir": "logs"},
    }


def test_gpt3_175b_lists_each_flag_and_default_without_counterpart():
    subjects = [line.split(":")[0] for line in translate(GPT3_175B).unmapped]

    assert subjects == [
        "'torchrun --nproc_per_node 8 --nnodes 1 pretrain_gpt.py'",
        "--calculate-per-token-loss is not given",
        "--transformer-impl is not given",
        "--position-embedding-type learned_absolute (Megatron's default is learned_absolute)",
        "--normalization LayerNorm (Megatron's default is LayerNorm)",
        "--hidden-dropout 0.1 (Megatron's default is 0.1)",
        "--attention-dropout 0.1 (Megatron's default is 0.1)",
        "--rampup-batch-size 16 16 5859375",
        "--split 949,50,1",
        "--max-position-embeddings 2048",
        "--fp16",
        "--vocab-file gpt2-vocab.json",
        "--merge-file gpt2-merges.txt",
        "missing",
    ]


def test_gpt3_175b_loads_once_the_missing_vocabulary_is_given():
    translation = translate(GPT3_175B)

    assert translation.unmapped[-1].startswith("missing: model.vocab_size;")
    run = config_from_dict(yaml.safe_load(translation.yaml), ["vocab_size=50257"])
    # 50257 rows padded to a multiple of 128 x TP 8, as Megatron pads them.
    assert run.model.padded_vocab_size == 51200


def test_llama3_8b_loads_without_additions():
    run = config_from_dict(yaml.safe_load(translate(LLAMA3_8B).yaml))

    assert run.model.ffn_width == 14336
    assert run.model.query_groups == 8
    assert run.model.activation == "swiglu"
    assert run.model.rotary_base == 1000000
    assert run.training.train_iters == 15258789
    assert run.schedule.lr_decay_iters == 15228271
    assert run.schedule.lr_warmup_iters == 30518
    assert run.schedule.min_lr_ratio == pytest.approx(1 / 15, rel=1e-11)
    assert run.training.profile_dir == "tb"
    assert run.model.padded_vocab_size == 128256


def test_llama3_8b_lists_what_it_could_not_map_with_a_reason():
    lines = "\n".join(translate(LLAMA3_8B).unmapped)

    assert "--decoupled-lr 5.0e-4: one base LR" in lines
    assert "--mock-data: training reads shards" in lines
    assert "--made-up-flag 1 2: no counterpart" in lines
    assert "--sequence-parallel: has no effect without tensor parallelism" in lines
    assert "--train-samples 1953125000: is 1.52588e+07 global batches" in lines
    for same_here in ("--use-mcore-models", "--context-parallel-size", "--ckpt-format"):
        assert same_here not in lines


def test_every_flag_of_a_command_line_is_mapped_or_listed_or_the_same_here():
    mapped_by_hand = {
        "group-query-attention",
        "num-query-groups",
        "position-embedding-type",
        "attention-dropout",
        "hidden-dropout",
        "swiglu",
        "untie-embeddings-and-output-weights",
        "disable-bias-linear",
        "normalization",
        "lr-decay-samples",
        "min-lr",
        "profile",
    }
    listed = {line.split()[0].rstrip(":") for line in translate(LLAMA3_8B).unmapped}
    words = [word for word in LLAMA3_8B.split() if word.startswith("--")]

    for word in words:
        flag = word.removeprefix("--")
        known = flag in DIRECT or flag in CHOICES or flag in ALWAYS_SO or flag in mapped_by_hand
        assert known or word in listed, word


def test_mup_becomes_megatrons_rules_in_our_terms():
    assert translate(MUP).config["parameterization"] == {
        "name": "mup",
        "base_hidden_size": 256,
        "base_ffn_hidden_size": 680,
        "base_kv_channels": 128,
        "base_num_layers": 24,
        "init": "sigma",
        "output_form": "multiplier",
        "attention_scale": "inverse",
        "eps_scaling": True,
        "ffn_out_lr_ratio": "width",
    }


def test_mup_numbers_of_the_table_are_those_of_megatron():
    run = config_from_dict(translate(MUP + "--adam-eps 8e-8").config)
    rows = {row.tensor.name.removeprefix("decoder.layers.0."): row for row in run.table.rows}

    # m = 8: hidden LR and eps an eighth, init sigma/sqrt(8), projections also over sqrt(48).
    fc1, fc2 = rows["mlp.linear_fc1.weight.gate"], rows["mlp.linear_fc2.weight"]
    assert (fc1.lr, fc2.lr) == pytest.approx((3.75e-5, 3.75e-5))
    assert (fc1.eps, fc2.eps) == pytest.approx((1e-8, 1e-8))
    assert fc1.init_std == pytest.approx(0.0070710678)
    assert fc2.init_std == pytest.approx(0.0010206207)
    output, embedding = rows["output_layer.weight"], rows["embedding.word_embeddings.weight"]
    assert (output.lr, embedding.lr) == pytest.approx((3e-4, 3e-4))
    assert (output.init_std, embedding.init_std) == pytest.approx((0.02, 0.02))
    assert run.table.multipliers.logit == pytest.approx(0.125)
    assert run.table.multipliers.attention == pytest.approx(1 / 128)


def test_mup_says_which_base_sizes_it_assumes_and_where_the_output_layer_differs():
    lines = notes_on(translate(MUP), "--use-mup")

    assert "base_ffn_hidden_size 680 (width multiplier 8)" in lines[0]
    assert "are assumed; correct them if the base model differs" in lines[0]
    assert "weight decay and eps of the output layer" in lines[1]
    assert "divided by 8 and 64" in lines[1]
    run = config_from_dict(translate(MUP + "--weight-decay 0.8 --adam-eps 6.4e-7").config)
    output = next(row for row in run.table.rows if row.tensor.name == "output_layer.weight")
    assert (output.weight_decay, output.eps) == pytest.approx((0.1, 1e-8))


@pytest.mark.parametrize(
    ("flags", "attention", "logit", "embedding"),
    [
        ("--mup-base-head-dim 64", 8 / 128, 1 / 8, 1.0),
        ("--mup-attn-scale-power 0.5", 128**-0.5, 1 / 8, 1.0),
        ("--mup-output-mult 0.5 --mup-embedding-mult 12", 1 / 128, 0.5, 12.0),
        ("--mup-output-mult 1.0", 1 / 128, 1 / 8, 1.0),
    ],
)
def test_mup_multipliers_follow_megatron(flags, attention, logit, embedding):
    multipliers = config_from_dict(translate(MUP + flags).config).table.multipliers

    assert multipliers.attention == pytest.approx(attention)
    assert multipliers.logit == pytest.approx(logit)
    assert multipliers.embedding == pytest.approx(embedding)


def test_mup_with_heads_wider_than_the_model_keeps_the_one_width_multiplier():
    run = config_from_dict(translate(MUP + "--kv-channels 256").config)
    row = next(
        row
        for row in run.table.rows
        if row.tensor.name.endswith("self_attention.linear_proj.weight")
    )

    assert row.tensor.fan_in / row.base_fan_in == 8
    assert row.lr == pytest.approx(3.75e-5)


def test_what_is_not_given_gets_megatrons_default_and_not_ours():
    run = config_from_dict(translate(SMALL).config)

    assert run.optimizer.adam_beta2 == 0.999
    assert run.optimizer.weight_decay == 0.01
    assert run.optimizer.weight_decay_mode == "coupled"
    assert run.parameterization.name == "sp"
    assert run.parameterization.init_method_std == 0.02
    assert run.model.norm_gain == "vector"
    assert run.model.add_bias_linear
    assert not run.model.untie_embeddings_and_output_weights
    assert run.model.activation == "gelu"
    assert run.training.eval_iters == 100
    assert run.logging.log_interval == 100
    assert run.optimizer.clip_grad == 1.0
    assert run.optimizer.adam_eps == 1e-8


@pytest.mark.parametrize(
    ("flags", "section", "expected"),
    [
        ("--swiglu", "model", {"activation": "swiglu", "ffn_hidden_size": 5440}),
        ("--squared-relu", "model", {"activation": "squared_relu"}),
        ("--group-query-attention", "model", {"num_query_groups": 1}),
        ("--min-lr 3e-5", "schedule", {"min_lr_ratio": 0.1}),
        ("--min-lr=3e-5", "schedule", {"min_lr_ratio": 0.1}),
        ("--lr-warmup-init 3e-6", "schedule", {"lr_warmup_init_ratio": 0.01}),
        ("--lr-warmup-fraction 0.05", "schedule", {"lr_warmup_iters": 50}),
        ("--lr-warmup-fraction 0.05 --lr-decay-iters 800", "schedule", {"lr_warmup_iters": 40}),
        (
            "--lr-decay-style WSD --lr-wsd-decay-iters 100",
            "schedule",
            {"lr_decay_style": "WSD", "lr_wsd_decay_style": "exponential"},
        ),
        ("--optimizer lion --lion-beta2 0.9", "optimizer", {"optimizer": "lion"}),
        ("--attention-backend unfused", "model", {"attention_backend": "local"}),
        ("--make-vocab-size-divisible-by 64", "model", {"make_vocab_size_divisible_by": 64}),
        (
            "--data-path 0.3 a 0.7 b --valid-data-path c",
            "data",
            {"train_data_path": ["0.3", "a", "0.7", "b"], "valid_data_path": ["c"]},
        ),
        (
            "--per-split-data-args-path blend.json",
            "data",
            {"per_split_data_args_path": "blend.json"},
        ),
        ("--finetune --load ck", "checkpoint", {"finetune": True, "load": "ck"}),
    ],
)
def test_flag_becomes_option(flags, section, expected):
    config = translate(SMALL + flags).config

    assert expected.items() <= config[section].items()
    config_from_dict(config)


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        ("--num-query-groups 8", "has no effect without --group-query-attention"),
        ("--optimizer soap", "--optimizer soap: not available"),
        ("--lr-decay-style inverse-square-root", "inverse-square-root: not available"),
        ("--mup-base-hidden-size 64", "has no effect without --use-mup"),
        ("--profile", "set training.profile=true and training.profile_dir"),
        ("--normalization LayerNorm", "only RMSNorm is available"),
        ("--position-embedding-type none", "only rope is available"),
        ("--hidden-dropout 0.1", "dropout is not available"),
        ("--data-path a", "give held-out shards in data.valid_data_path or eval_iters=0"),
        ("--num-experts 8", "mixture of experts is not available"),
        ("--qk-layernorm", "norms on queries and keys are not available"),
        ("--hybrid-context-parallel", "spread evenly over pipeline stages"),
        ("--start-weight-decay 0.1", "weight decay follows the LR schedule"),
        ("--lr 1e-4", "--lr is given twice"),
        ("--use-mup --mup-attn-scale-power 0.7", "attention scores are scaled by 1/D"),
    ],
)
def test_flag_without_exact_counterpart_is_listed(flags, line):
    translation = translate(SMALL + flags)

    assert line in "\n".join(translation.unmapped)
    config_from_dict(translation.config)


def test_complete_command_line_leaves_nothing_to_list():
    assert translate(SMALL).unmapped == ()


def test_an_absent_per_token_loss_is_another_average_of_masked_batches():
    without = SMALL.replace("--calculate-per-token-loss", "")
    (line,) = translate(without).unmapped

    assert line.startswith("--calculate-per-token-loss is not given: Megatron averages the loss")
    assert "this package divides by the batch's unmasked tokens" in line
    assert "the same when no token is masked" in line
    assert config_from_dict(translate(without).config).training.loss_denominator == "tokens"


def test_an_absent_implementation_is_local_here_and_transformer_engine_in_megatron():
    without = SMALL.replace("--transformer-impl local", "")
    (line,) = translate(without).unmapped

    assert line.startswith("--transformer-impl is not given: Megatron's default is transformer_eng")
    assert "here it is local" in line
    assert config_from_dict(translate(without).config).model.transformer_impl == "local"
    assert translate(without + "--transformer-impl transformer_engine").unmapped == ()


def test_empty_command_line_lists_every_required_option():
    missing = [line for line in translate("").unmapped if line.startswith("missing: ")]

    assert len(missing) == 9
    assert missing[3].startswith("missing: model.vocab_size; Megatron asks the tokenizer")


def test_ratio_to_an_unknown_rate_is_listed_instead_of_guessed():
    translation = translate("--min-lr 1e-5 --train-samples 64 --lr-warmup-fraction 0.1")
    lines = "\n".join(translation.unmapped)

    assert "--min-lr 1e-05: is a ratio to --lr here; set schedule.min_lr_ratio" in lines
    assert "--train-samples 64: needs --global-batch-size" in lines
    assert "--lr-warmup-fraction 0.1: is a share of the iterations" in lines
    assert "schedule" not in translation.config


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--num-layers twelve", "--num-layers takes an integer, not 'twelve'"),
        ("--num-layers 1e3", "--num-layers takes an integer, not '1e3'"),
        ("--lr fast", "--lr takes a number, not 'fast'"),
        ("--lr", "--lr takes a number, but nothing follows"),
        ("--lr 1 2", "--lr takes a number, but is followed by ['1', '2']"),
        ("--swiglu true", "--swiglu takes no value, but is followed by ['true']"),
        ("--data-path", "--data-path takes one or more values, but nothing follows"),
        ("--rampup-batch-size 1 x 3", "--rampup-batch-size takes an integer, not 'x'"),
        ("--lr-decay-style steep", "Megatron knows constant, linear, cosine, WSD"),
        ("--lr $LR", "'$LR' holds a shell variable; write its value"),
        ("--save 'unclosed", "not shell text (No closing quotation)"),
        ("num-layers 2", "'num-layers' is not an option"),
        ("--swiglu --squared-relu", "exclude each other"),
        ("--train-iters 1 --train-samples 2", "--train-iters and --train-samples are both given"),
        ("--lr-decay-iters 5 --lr-decay-samples 9", "both given"),
        ("--lr-warmup-iters 5 --lr-warmup-fraction 0.1", "give one"),
        ("--data-path a --train-data-path b", "both given"),
        ("--data-path a --per-split-data-args-path b", "--per-split-data-args-path excludes"),
        ("--valid-data-path a --per-split-data-args-path b", "--per-split-data-args-path excludes"),
        ("--lr 1e-3 --min-lr 1e-2", "--min-lr 0.01 is not between 0 and --lr 0.001"),
        ("--use-mup", "--use-mup needs --hidden-size"),
        (MUP + "--mup-base-hidden-size 0", "a positive --mup-base-hidden-size"),
        (MUP + "--mup-base-head-dim 1.5", "not a whole number"),
    ],
)
def test_malformed_command_line_is_refused(flags, message):
    with pytest.raises(ConfigError) as caught:
        translate(flags)

    assert message in str(caught.value)


def test_yaml_text_is_the_configuration():
    translation = translate(MUP)

    assert yaml.safe_load(translation.yaml) == translation.config
    assert list(translation.config)[:3] == ["model", "optimizer", "training"]


def test_all_mapped_flags_are_megatrons_with_its_types(megatron_actions):
    for flag, (_, kind) in DIRECT.items():
        action = megatron_actions[flag]
        if kind is bool:
            assert action.nargs == 0, flag
        elif kind is list:
            assert action.nargs == "*", flag
        else:
            assert (action.type or str) is kind, flag
    for flag in ALWAYS_SO:
        assert flag in megatron_actions, flag


def test_all_choices_are_megatrons(megatron_actions):
    for flag, (_, values) in CHOICES.items():
        choices = megatron_actions[flag].choices
        assert choices is not None
        assert {getattr(choice, "name", choice) for choice in choices} == set(values), flag


@pytest.mark.parametrize(
    ("flag", "default"),
    [
        ("adam-beta2", 0.999),
        ("adam-beta1", 0.9),
        ("adam-eps", 1e-8),
        ("weight-decay", 0.01),
        ("clip-grad", 1.0),
        ("eval-iters", 100),
        ("log-interval", 100),
        ("init-method-std", 0.02),
        ("hidden-dropout", 0.1),
        ("attention-dropout", 0.1),
        ("normalization", "LayerNorm"),
        ("position-embedding-type", "learned_absolute"),
        ("lr-decay-style", "linear"),
        ("lr-wsd-decay-style", "exponential"),
        ("make-vocab-size-divisible-by", 128),
        ("num-query-groups", 1),
        ("min-lr", 0.0),
        ("seed", 1234),
        ("norm-epsilon", 1e-5),
        ("rotary-base", 10000),
        ("profile-step-start", 10),
        ("profile-step-end", 12),
        ("lion-beta1", 0.95),
        ("lion-beta2", 0.98),
        ("calculate-per-token-loss", False),
        ("transformer-impl", "transformer_engine"),
        ("fp8-recipe", "delayed"),
        ("fp8-amax-history-len", 1),
        ("fp8-amax-compute-algo", "most_recent"),
        ("distributed-timeout-minutes", 10),
        ("muon-momentum", 0.9),
        ("muon-num-ns-steps", 5),
        ("muon-tp-mode", "blockwise"),
        ("muon-scale-mode", "spectral"),
        ("muon-nesterov", False),
        ("num-layers-per-virtual-pipeline-stage", None),
        ("recompute-activations", False),
    ],
)
def test_megatrons_defaults_are_those_assumed(megatron_actions, flag, default):
    assert megatron_actions[flag].default == default


def test_defaults_and_required_options_exist():
    names = set(DEFAULTS) | set(REQUIRED)
    every = {key for key, _ in DIRECT.values()} | {
        "model.norm_gain",
        "optimizer.weight_decay_mode",
    }

    assert names <= every
