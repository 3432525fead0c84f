"""What a target may differ in from its proxies, and what it may not. Must not import torch.

A learning rate is carried over from runs that are the target at another size. So sizes, layout,
precision and length may differ; the last and the sizes that no proxy has varied are warned of.
"""

from __future__ import annotations

from megatron_mup.config import RunConfig
from megatron_mup.config_io import config_to_dict

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


def warnings(proxy: RunConfig, target: RunConfig) -> list[str]:
    """What may differ, but was not scaled by the sweep, so that nothing is known of it."""
    lines = []
    tokens = _tokens(proxy), _tokens(target)
    if tokens[0] != tokens[1]:
        lines.append(
            f"the target trains on {tokens[1]:,} tokens, the largest proxy on {tokens[0]:,}: the "
            "best learning rate falls with the length of a run (arXiv:2409.19913), and the "
            "prediction does not correct for it"
        )
    for name, was, value in _further_sizes(proxy, target):
        if was != value:
            lines.append(
                f"{name} is {value:g} in the target and {was:g} in the largest proxy, and the "
                "sweep has not varied it"
            )
    return lines


def _tokens(run: RunConfig) -> int:
    return run.training.train_iters * run.training.global_batch_size * run.model.seq_length


def _further_sizes(proxy: RunConfig, target: RunConfig) -> list[tuple[str, float, float]]:
    """Name, of the proxy, of the target."""
    was, now = proxy.model, target.model
    batches = [run.training.global_batch_size * run.model.seq_length for run in (proxy, target)]
    return [
        ("model.num_layers", was.num_layers, now.num_layers),
        ("the head dim", was.head_dim, now.head_dim),
        (
            "the ratio of FFN to hidden size",
            was.ffn_width / was.hidden_size,
            now.ffn_width / now.hidden_size,
        ),
        ("the number of heads a query group", _group(proxy), _group(target)),
        ("model.seq_length", was.seq_length, now.seq_length),
        ("the batch in tokens", batches[0], batches[1]),
    ]


def _group(run: RunConfig) -> float:
    return run.model.num_attention_heads / run.model.query_groups
