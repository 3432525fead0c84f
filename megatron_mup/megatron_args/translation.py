"""From Megatron's flags to our sections, with Megatron's defaults where ours differ.

Nothing is dropped silently: what has no counterpart, or only an approximate one, is listed with its
reason. Source of defaults and derived sizes: megatron-core 0.19.2, ``training/arguments.py`` and
``core/transformer/transformer_config.py``. Must not import torch or megatron.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import yaml

from megatron_mup.config_io import option_names
from megatron_mup.errors import ConfigError
from megatron_mup.megatron_args.draft import Draft
from megatron_mup.megatron_args.flags import (
    ALWAYS_SO,
    CHOICES,
    DEFAULTS,
    DIRECT,
    NO_COUNTERPART,
    REASONS,
    REQUIRED,
    WHEN_ABSENT,
)
from megatron_mup.megatron_args.reader import Flags
from megatron_mup.megatron_args.scale import translate_scale


@dataclass(frozen=True, kw_only=True)
class Translation:
    """A translated command line.

    Attributes:
        yaml: text of a configuration file; options that keep our default are left out.
        unmapped: one line per flag or fact without an exact counterpart, with the reason.
        config: the same as ``yaml``, as plain data by section.
    """

    yaml: str
    unmapped: tuple[str, ...]
    config: dict[str, Any]


def translate(flags: str) -> Translation:
    """Translate a Megatron-LM command line.

    Args:
        flags: shell text without variables: the flags of ``pretrain_gpt.py``, optionally with
            launcher and script in front. Line continuations and comments are understood.

    Returns:
        YAML that loads once the options named in ``unmapped`` as missing are added.

    Raises:
        ConfigError: not shell text, an unexpanded variable, a malformed or contradictory value.
    """
    translator = _Translator(Flags(flags))
    translator.translate_all()
    config = _ordered(translator.config)
    text = yaml.safe_dump(config, sort_keys=False)
    return Translation(yaml=text, unmapped=tuple(translator.notes), config=config)


def _ordered(config: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Sections and options in the order of the reference; empty sections are left out."""
    return {
        section: {name: config[section][name] for name in names if name in config[section]}
        for section, names in option_names().items()
        if config.get(section)
    }


def _tidy(value: float) -> float:
    """Drop the last digits, which are division's: 3e-5 / 3e-4 means 0.1."""
    return float(f"{value:.12g}")


class _Translator(Draft):
    """The parts of a translation, in an order that lets later ones read earlier results."""

    def translate_all(self) -> None:
        """Account for every flag; the order lets later steps read earlier results."""
        for flag, difference in WHEN_ABSENT.items():
            if flag not in self.flags.given:
                self.notes.append(f"--{flag} is not given: {difference}")
        # Taking a flag removes it, so that what is left at the end is exactly what nobody mapped.
        for flag, (key, kind) in DIRECT.items():
            value = self.flags.take(flag, kind)
            if value is not None:
                self.set(key, value)
        for flag in CHOICES:
            self._choice(flag)
        for key, default in DEFAULTS.items():
            section, name = key.split(".")
            self.config.setdefault(section, {}).setdefault(name, default)
        self._model()
        translate_scale(self)
        self._position_and_norm()
        self._length()
        self._schedule()
        self._data()
        self._profile()
        self._parameterization()
        self._list_the_rest()
        self._list_missing()

    def _choice(self, flag: str) -> None:
        key, values = CHOICES[flag]
        value = self.flags.take(flag, str)
        if value is None:
            return
        if value not in values:
            raise ConfigError(f"--{flag} is '{value}'; Megatron knows {', '.join(values)}")
        ours = values[value]
        if ours is None:
            self.notes.append(f"--{flag} {value}: not available; set {key} to what comes closest")
        else:
            self.set(key, ours)

    def _model(self) -> None:
        """Activation, biases, tying, query groups, FFN width, padding of the vocabulary."""
        swiglu = self.flags.take("swiglu", bool)
        squared_relu = self.flags.take("squared-relu", bool)
        if swiglu and squared_relu:
            raise ConfigError("--swiglu and --squared-relu exclude each other; give one of them")
        if squared_relu:
            self.set("model.activation", "squared_relu")
        hidden = self.get("model.hidden_size")
        if swiglu:
            self.set("model.activation", "swiglu")
            if self.get("model.ffn_hidden_size") is None and hidden is not None:
                # arguments.py:1287: two thirds of 4 M, cut to a multiple of 64.
                self.set("model.ffn_hidden_size", int((4 * hidden * 2 / 3) / 64) * 64)
        # Both are written out even when not asked for: Megatron's defaults are opposite to ours.
        self.set("model.add_bias_linear", not self.flags.take("disable-bias-linear", bool))
        untied = self.flags.take("untie-embeddings-and-output-weights", bool)
        self.set("model.untie_embeddings_and_output_weights", bool(untied))
        grouped = self.flags.take("group-query-attention", bool)
        groups = self.flags.take("num-query-groups", int)
        if grouped:
            # Megatron's default is one group (MQA), ours one per head.
            self.set("model.num_query_groups", 1 if groups is None else groups)
        elif groups is not None:
            self.notes.append(
                f"--num-query-groups {groups}: has no effect without --group-query-attention"
            )
        tensor = self.get("parallel.tensor_model_parallel_size") or 1
        multiple = self.flags.take("make-vocab-size-divisible-by", int)
        if multiple is not None or tensor > 1:
            # Megatron pads to this times TP; here padding does not depend on the layout.
            self.set("model.make_vocab_size_divisible_by", (multiple or 128) * tensor)

    def _position_and_norm(self) -> None:
        """What Megatron does by default and this package does not: learned positions and so on."""
        kind = self.flags.take("position-embedding-type", str) or "learned_absolute"
        if self.flags.take("use-rotary-position-embeddings", bool):
            kind = "rope"
        if kind != "rope":
            self.notes.append(
                f"--position-embedding-type {kind} (Megatron's default is learned_absolute): only "
                "rope is available and is used instead"
            )
        norm = self.flags.take("normalization", str) or "LayerNorm"
        if norm != "RMSNorm":
            self.notes.append(
                f"--normalization {norm} (Megatron's default is LayerNorm): only RMSNorm is "
                "available and is used instead"
            )
        for flag in ("hidden-dropout", "attention-dropout"):
            rate = self.flags.take(flag, float)
            # An absent flag still means dropout in Megatron.
            rate = 0.1 if rate is None else rate
            if rate != 0.0:
                self.notes.append(
                    f"--{flag} {rate:g} (Megatron's default is 0.1): dropout is not available; "
                    "the model has none"
                )

    def _length(self) -> None:
        """Iterations; from samples where Megatron counts those."""
        samples = self.flags.take("train-samples", int)
        if samples is not None:
            if self.get("training.train_iters") is not None:
                raise ConfigError("--train-iters and --train-samples are both given; give one")
            self._iterations("train-samples", samples, "training.train_iters", round_down=True)
        self._take_iterations("lr-decay-samples", "schedule.lr_decay_iters")
        self._take_iterations("lr-wsd-decay-samples", "schedule.lr_wsd_decay_iters")
        self._take_iterations("lr-warmup-samples", "schedule.lr_warmup_iters")
        rampup = self.flags.take("rampup-batch-size", list)
        if rampup is not None:
            numbers = [self.flags.convert("rampup-batch-size", text, int) for text in rampup]
            self.set("training.rampup_batch_size", numbers)
            self.notes.append(
                f"--rampup-batch-size {' '.join(rampup)}: Megatron's LR schedule counts samples, "
                "here it counts iterations, so it runs ahead while the batch is still growing"
            )

    def _take_iterations(self, flag: str, key: str) -> None:
        samples = self.flags.take(flag, int)
        if samples is None:
            return
        # 0 counts as not given, as in Megatron's own check.
        if self.get(key):
            raise ConfigError(f"--{flag} and {key.split('.')[1]} are both given; give one of them")
        self._iterations(flag, samples, key, round_down=False)

    def _iterations(self, flag: str, samples: int, key: str, *, round_down: bool) -> None:
        batch = self.get("training.global_batch_size")
        if not batch:
            self.notes.append(f"--{flag} {samples}: needs --global-batch-size; set {key} yourself")
            return
        # Megatron cuts the length (training.py:1547); the other spans lose least when rounded.
        iterations = samples // batch if round_down else round(samples / batch)
        self.set(key, iterations)
        if samples % batch:
            self.notes.append(
                f"--{flag} {samples}: is {samples / batch:.6g} global batches; {key} is "
                f"{iterations}"
            )

    def _schedule(self) -> None:
        """Ratios to the peak instead of absolute rates; iterations instead of a fraction."""
        lr = self.get("optimizer.lr")
        for flag, key in (
            ("min-lr", "schedule.min_lr_ratio"),
            ("lr-warmup-init", "schedule.lr_warmup_init_ratio"),
        ):
            value = self.flags.take(flag, float)
            if value is None or value == 0.0:
                continue
            if not lr:
                self.notes.append(f"--{flag} {value:g}: is a ratio to --lr here; set {key}")
                continue
            if not 0 < value <= lr:
                raise ConfigError(f"--{flag} {value:g} is not between 0 and --lr {lr:g}")
            # One ratio for all groups keeps their rates in proportion; one rate would not.
            self.set(key, _tidy(value / lr))
        self._warmup_fraction()
        style, length = self.get("schedule.lr_decay_style"), "schedule.lr_wsd_decay_style"
        if style == "WSD" and self.get(length) is None:
            self.set(length, "exponential")  # Megatron's default; ours is linear

    def _warmup_fraction(self) -> None:
        fraction = self.flags.take("lr-warmup-fraction", float)
        if fraction is None:
            return
        if self.get("schedule.lr_warmup_iters"):
            raise ConfigError(
                "--lr-warmup-fraction excludes --lr-warmup-iters and --lr-warmup-samples; give one"
            )
        total = self.get("schedule.lr_decay_iters") or self.get("training.train_iters")
        if total is None or not math.isfinite(fraction):
            self.notes.append(
                f"--lr-warmup-fraction {fraction:g}: is a share of the iterations, which are not "
                "known; set schedule.lr_warmup_iters"
            )
            return
        self.set("schedule.lr_warmup_iters", round(fraction * total))

    def _data(self) -> None:
        """One list of shards for training; Megatron's split happens at preprocessing here."""
        split = self.flags.take("split", str)
        paths = self.flags.take("data-path", list)
        if paths is not None:
            if self.get("data.train_data_path") is not None:
                raise ConfigError("--data-path and --train-data-path are both given; give one")
            self.set("data.train_data_path", paths)
        given = self.get("data.train_data_path") or self.get("data.valid_data_path")
        if self.get("data.per_split_data_args_path") is not None and given is not None:
            raise ConfigError(
                "--per-split-data-args-path excludes --data-path, --train-data-path and "
                "--valid-data-path; give one of them"
            )
        if split is not None or (paths is not None and self.get("data.valid_data_path") is None):
            asked = "--data-path" if split is None else f"--split {split}"
            self.notes.append(
                f"{asked}: shards are not split while training; data.train_data_path is used "
                "whole, so give held-out shards in data.valid_data_path or eval_iters=0"
            )

    def _profile(self) -> None:
        if not self.flags.take("profile", bool):
            return
        folder = self.get("logging.tensorboard_dir")
        if folder is None:
            self.notes.append("--profile: set training.profile=true and training.profile_dir")
            return
        self.set("training.profile", True)
        self.set("training.profile_dir", folder)

    def _parameterization(self) -> None:
        """Megatron's sigma initialization, and its muP where ``--use-mup`` is given."""
        # With and without muP Megatron starts from init_method_std, which fan-in rules ignore.
        self.set("parameterization.init", "sigma")
        embedding_std = self.get("parameterization.embedding_init_method_std")
        if not self.flags.take("use-mup", bool):
            self.set("parameterization.name", "sp")
            return
        if embedding_std is not None:
            self.notes.append(
                f"--embedding-init-method-std {embedding_std:g}: with --use-mup Megatron also "
                "initialises the output layer with it; here that keeps init_method_std"
            )
        self.set("parameterization.name", "mup")
        self.set("parameterization.output_form", "multiplier")
        # Megatron's optimizer overrides scale eps with the hidden learning rate.
        self.set("parameterization.eps_scaling", True)
        # Megatron divides every hidden LR by the one multiplier M / P.
        self.set("parameterization.ffn_out_lr_ratio", "width")
        hidden, heads = self.get("model.hidden_size"), self.get("model.num_attention_heads")
        base = self.flags.take("mup-base-hidden-size", int)
        base = hidden if base is None else base
        if not hidden or not heads or base < 1:
            raise ConfigError(
                "--use-mup needs --hidden-size, --num-attention-heads and a positive "
                "--mup-base-hidden-size"
            )
        self.set("parameterization.base_hidden_size", base)
        head_dim = self.get("model.kv_channels") or hidden // heads
        self._mup_attention(head_dim)
        self._mup_base_shape(hidden / base, attention_width=heads * head_dim)
        self._mup_multipliers(hidden / base)

    def _mup_attention(self, head_dim: int) -> None:
        """softmax_scale = sqrt(base head dim or 1) / D ** power (transformer_config.py:2207)."""
        base = self.flags.take("mup-base-head-dim", float)
        power = self.flags.take("mup-attn-scale-power", float)
        if base is not None and not (base >= 1 and base.is_integer()):
            raise ConfigError(f"--mup-base-head-dim {base:g} is not a whole number above 0")
        self.set("parameterization.base_kv_channels", head_dim if base is None else int(base))
        # Its default is 1, muP's own exponent.
        if power in (None, 1.0):
            scale = "inverse" if base is None else "base_head_dim"
            self.set("parameterization.attention_scale", scale)
        elif power == 0.5 and base is None:
            self.set("parameterization.attention_scale", "inverse_sqrt")
        else:
            self.notes.append(
                f"--mup-attn-scale-power {power:g}: only 1, or 0.5 without --mup-base-head-dim, "
                "is available; attention scores are scaled by 1/D"
            )

    def _mup_base_shape(self, multiplier: float, *, attention_width: int) -> None:
        """Base sizes that Megatron does not ask for: those with its one multiplier m = M / P."""
        section = self.config["parameterization"]
        layers = self.get("model.num_layers")
        ffn = self.get("model.ffn_hidden_size") or 4 * self.get("model.hidden_size")
        section["base_num_layers"] = layers
        section["base_ffn_hidden_size"] = max(1, round(ffn / multiplier))
        note = (
            f"--use-mup: Megatron knows only the base hidden size; base_ffn_hidden_size "
            f"{section['base_ffn_hidden_size']} (width multiplier {multiplier:g}), "
            f"base_kv_channels {section['base_kv_channels']} and base_num_layers {layers}"
        )
        # Otherwise the base attention width is the base hidden size, and heads need not be asked.
        if attention_width != self.get("model.hidden_size"):
            heads = max(1, round(attention_width / multiplier / section["base_kv_channels"]))
            section["base_num_attention_heads"] = heads
            note += f" and base_num_attention_heads {heads}"
        self.notes.append(note + " are assumed; correct them if the base model differs")

    def _mup_multipliers(self, multiplier: float) -> None:
        embedding = self.flags.take("mup-embedding-mult", float)
        if embedding is not None:
            self.set("parameterization.embedding_multiplier", embedding)
        output = self.flags.take("mup-output-mult", float)
        # transformer_config.py:2214 replaces 1 by 1/m, which is our rule's own factor.
        if output not in (None, 1.0):
            self.set("parameterization.logit_multiplier", _tidy(output * multiplier))
        if multiplier != 1.0 and self.get("model.untie_embeddings_and_output_weights"):
            self.notes.append(
                "--use-mup: Megatron leaves weight decay and eps of the output layer as they are; "
                f"here they are divided by {multiplier:g} and {multiplier**2:g}"
            )

    def _list_the_rest(self) -> None:
        for flag, values in self.flags.given.items():
            if tuple(values) in ALWAYS_SO.get(flag, ()):
                continue
            reason = next((why for what, why in REASONS if re.fullmatch(what, flag)), None)
            self.notes.append(f"{' '.join(['--' + flag, *values])}: {reason or NO_COUNTERPART}")

    def _list_missing(self) -> None:
        for key, why in REQUIRED.items():
            if self.get(key) is None:
                self.notes.append(f"missing: {key}; {why}")
