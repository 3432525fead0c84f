"""What a target may differ in from its proxies, and what it may not. Must not import torch.

A learning rate is carried over from runs that are the target at another width. Layout and places
are free; what else differs and was not scaled by the sweep is an extrapolation: those that are
known to move the best learning rate stop a campaign that does not accept them, the others are
warned of.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from megatron_mup.config import RunConfig
from megatron_mup.config_io import config_to_dict
from megatron_mup.data.blend import parse_blend
from megatron_mup.parameterization.options import HorizonRule
from megatron_mup.transfer.sweep.scaling import planned_iters
from megatron_mup.transfer.sweep.spec import TokenBudget

COMPARED = {
    "parameterization": (),
    "optimizer": ("lr", "muon_tp_mode"),
    "schedule": (),
    "model": (
        *("hidden_size", "num_attention_heads", "num_query_groups", "ffn_hidden_size"),
        *("ffn_multiplier", "kv_channels", "num_layers", "seq_length", "vocab_size"),
        *("make_vocab_size_divisible_by", "transformer_impl", "attention_backend"),
    ),
    "training": (
        *("train_iters", "global_batch_size", "micro_batch_size", "rampup_batch_size"),
        *("eval_interval", "eval_iters", "seed"),
        *("profile", "profile_step_start", "profile_step_end", "profile_dir"),
    ),
    "data": (
        *("train_data_path", "valid_data_path", "per_split_data_args_path", "data_cache_path"),
        *("bos_token", "eod_token", "max_epochs"),
    ),
}
"""Section -> options that may differ in it; sections that are not here may differ in everything."""

_FRACTIONS = ("lr_warmup_iters", "lr_decay_iters", "lr_wsd_decay_iters", "extra_warmup_iters")
"""Iterations of the schedule that are compared as a part of the run."""


def differences(proxy: RunConfig, target: RunConfig) -> list[str]:
    """Options that are not the same and must be.

    Args:
        proxy: a run of the sweep.
        target: the run that takes its learning rate.

    Returns:
        ``section.option PROXY -> TARGET`` of each.
    """
    before, now = config_to_dict(proxy), config_to_dict(target)
    found = []
    for section, free in COMPARED.items():
        for option, was in before[section].items():
            value = now[section][option]
            if option in free:
                continue
            if option in _FRACTIONS:
                found += _difference_of_parts(option, proxy, target)
            elif was != value:
                found.append(f"{section}.{option} {was} -> {value}")
    return found


def _difference_of_parts(option: str, proxy: RunConfig, target: RunConfig) -> list[str]:
    """A number of iterations against the length of the run, equal up to one iteration of each."""
    was, value = getattr(proxy.schedule, option), getattr(target.schedule, option)
    lengths = proxy.training.train_iters, target.training.train_iters
    if option == "lr_decay_iters":
        was, value = was or lengths[0], value or lengths[1]
    if was is None or value is None:
        return [] if was == value else [f"schedule.{option} {was} -> {value}"]
    parts = was / lengths[0], value / lengths[1]
    if abs(parts[0] - parts[1]) <= 1 / lengths[0] + 1 / lengths[1]:
        return []
    return [
        f"schedule.{option} {was} of {lengths[0]} iterations ({parts[0]:.1%}) -> {value} of "
        f"{lengths[1]} ({parts[1]:.1%})"
    ]


class Kind(StrEnum):
    """Extrapolations that ``gate.accept`` may name."""

    TOKENS = "tokens"
    DEPTH = "depth"
    BATCH = "batch"
    SEQUENCE = "sequence"
    RAMPUP = "rampup"


@dataclass(frozen=True, kw_only=True)
class Extrapolation:
    """Something in which the target lies outside what the proxies have tried.

    Attributes:
        why: with the numbers.
        kind: its name for ``gate.accept``; None: it is warned of and needs no leave.
        cure: what would do away with it.
        stops: whether it is large enough to need leave.
    """

    why: str
    kind: Kind | None = None
    cure: str = ""
    stops: bool = False


TOKENS_FACTOR = 2.0
"""Times more or less tokens that need no leave. At LR ~ D^-0.32 (arXiv:2409.19913) it is a third of
an octave, a third of what the interval may be wide (the threshold is ours)."""


def extrapolations(
    proxy: RunConfig, target: RunConfig, *, budget: TokenBudget | None
) -> list[Extrapolation]:
    """What may differ, but was not scaled by the sweep, so that nothing is known of it.

    Args:
        proxy: a run of the arm at its largest width.
        target: the run that takes the learning rate.
        budget: the sweep's rule of tokens; None: all runs have the proxy's length.
    """
    return [
        *_tokens_beyond(proxy, target, budget),
        *_sizes_beyond(proxy, target),
        *_rampup_beyond(proxy, target),
        *_warned(proxy, target),
    ]


def warnings(proxy: RunConfig, target: RunConfig, *, budget: TokenBudget | None) -> list[str]:
    """``extrapolations`` in words, as they stand in the target's files."""
    return [one.why for one in extrapolations(proxy, target, budget=budget)]


def _tokens_beyond(
    proxy: RunConfig, target: RunConfig, budget: TokenBudget | None
) -> list[Extrapolation]:
    """Against what the sweep's own rule gives for the target: the line over widths holds that."""
    meant = _tokens(proxy) if budget is None else _tokens_of(budget, target)
    tokens, step = _tokens(target), _batch_tokens(target)
    # A rule is rounded up to whole steps of either batch.
    if abs(tokens - meant) <= max(step, _batch_tokens(proxy)):
        return []
    ratio = max(tokens / meant, meant / tokens)
    rule = "runs as long as the proxies'" if budget is None else "the sweep's rule of tokens"
    corrected = target.parameterization.horizon_rule is not HorizonRule.NONE
    corrects = (
        f"only parameterization.horizon_rule={target.parameterization.horizon_rule} corrects for it"
        if corrected
        else "the prediction does not correct for it"
    )
    return [
        Extrapolation(
            why=f"the target trains on {tokens:,} tokens, {ratio:.3g} times "
            f"{'more' if tokens > meant else 'fewer'} than the {meant:,} of {rule}: the best "
            f"learning rate falls with the length of a run (arXiv:2409.19913), and {corrects}",
            kind=Kind.TOKENS,
            cure="set tokens of the sweep or training.train_iters of the target so that they agree",
            stops=ratio > TOKENS_FACTOR,
        )
    ]


def _tokens_of(budget: TokenBudget, target: RunConfig) -> int:
    return planned_iters(budget, target) * _batch_tokens(target)


def _tokens(run: RunConfig) -> int:
    training = run.training
    if training.rampup_batch_size is None:
        return training.train_iters * _batch_tokens(run)
    # Its package imports torch, which runs without a ramp-up need not wait for.
    from megatron_mup.training.sample_counts import samples_after

    return samples_after(training, training.train_iters) * run.model.seq_length


def _batch_tokens(run: RunConfig) -> int:
    return run.training.global_batch_size * run.model.seq_length


def _sizes_beyond(proxy: RunConfig, target: RunConfig) -> list[Extrapolation]:
    was, now = proxy.model, target.model
    batch = "base.training.global_batch_size"
    sizes = [
        (Kind.DEPTH, "model.num_layers", was.num_layers, now.num_layers, "base.model.num_layers"),
        (
            Kind.SEQUENCE,
            "model.seq_length",
            was.seq_length,
            now.seq_length,
            "base.model.seq_length",
        ),
        (Kind.BATCH, "the batch in tokens", _batch_tokens(proxy), _batch_tokens(target), batch),
    ]
    return [
        Extrapolation(
            why=_not_varied(name, before, value),
            kind=kind,
            cure=f"set {option} of the sweep to the target's",
            stops=True,
        )
        for kind, name, before, value, option in sizes
        if before != value
    ]


def _not_varied(name: str, was: float, value: float) -> str:
    return (
        f"{name} is {value:.10g} in the target and {was:.10g} in the largest proxy, and the sweep "
        "has not varied it"
    )


def _rampup_beyond(proxy: RunConfig, target: RunConfig) -> list[Extrapolation]:
    was, now = proxy.training.rampup_batch_size, target.training.rampup_batch_size
    if was == now:
        return []
    return [
        Extrapolation(
            why=f"training.rampup_batch_size is {now} in the target and {was} in the largest "
            "proxy: early steps have another batch, and the sweep has not tried that",
            kind=Kind.RAMPUP,
            cure="set base.training.rampup_batch_size of the sweep for the same part of its run",
            stops=True,
        )
    ]


def _warned(proxy: RunConfig, target: RunConfig) -> list[Extrapolation]:
    """Ratios that the sweep keeps, vocabulary, data and precision."""
    was, now = proxy.model, target.model
    ratios = [
        ("the head dim", was.head_dim, now.head_dim),
        (
            "the ratio of FFN to hidden size",
            was.ffn_width / was.hidden_size,
            now.ffn_width / now.hidden_size,
        ),
        ("the number of heads a query group", _group(proxy), _group(target)),
        ("model.vocab_size", was.vocab_size, now.vocab_size),
    ]
    lines = [_not_varied(name, before, value) for name, before, value in ratios if before != value]
    shards = _shards(target)
    if shards is not None and shards != _shards(proxy):
        lines.append("the target reads other training shards than the proxies")
    formats = _formats(proxy), _formats(target)
    if formats[0] != formats[1]:
        lines.append(f"the target computes in {formats[1]}, the proxies in {formats[0]}")
    return [Extrapolation(why=line) for line in lines]


def _group(run: RunConfig) -> float:
    return run.model.num_attention_heads / run.model.query_groups


def _shards(run: RunConfig) -> Any:
    """Where the training data lies, from any folder; None: it is not named."""
    data = run.data
    if data.per_split_data_args_path is not None:
        return str(Path(data.per_split_data_args_path).absolute())
    if not data.train_data_path:
        return None
    prefixes, weights = parse_blend(data.train_data_path)
    return [str(Path(prefix).absolute()) for prefix in prefixes], weights


def _formats(run: RunConfig) -> str:
    """Number formats in words."""
    precision = run.precision
    if precision.fp8_format is None:
        return "bf16" if precision.bf16 else "fp32"
    return f"FP8 ({precision.fp8_format}, {precision.fp8_recipe})"
