"""One configuration at several widths: everything else stays what it is.

Width M takes the heads (or the head dim), the query groups and F along in proportion; the base
shape and every option stay, so the rule table alone says what else changes.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum
from typing import Any

from megatron_mup.config import RunConfig
from megatron_mup.config_io import config_from_dict, config_to_dict, qualified
from megatron_mup.errors import ConfigError
from megatron_mup.run_source import RunSource

HEAD_DIM = 16
"""Head dim of a preset in a coordinate check; a CPU's size, with the preset's rules."""

SMALL_BODY = (
    "model.num_layers=2",
    "model.vocab_size=128",
    "model.seq_length=32",
    "training.global_batch_size=4",
    "training.micro_batch_size=2",
    "optimizer.lr=0.0009765625",
)
"""What a preset is cut down to, unless overridden (ours). A check of widths needs neither its depth
nor its batch: fewer tokens than the width let an update act on each of them coherently. At a small
LR the changes stay far from where they saturate; it is no advice for training."""

_PROPORTIONAL = ("hidden_size", "num_attention_heads", "ffn_hidden_size")
_SET_BY_WIDTH = ("hidden_size", "num_attention_heads", "kv_channels", "ffn_hidden_size")


class Grow(StrEnum):
    """What grows with the width: the number of heads (the papers' way), or the head dim."""

    HEADS = "heads"
    HEAD_DIM = "head-dim"


def runs_at_widths(
    source: RunSource,
    overrides: Sequence[str],
    widths: Sequence[int],
    *,
    grow: Grow = Grow.HEADS,
) -> dict[int, RunConfig]:
    """The configurations of a coordinate check.

    Args:
        source: configuration file or preset; a preset's width is the first one.
        overrides: ``key=value``; those of the width are refused.
        widths: hidden sizes, increasing.
        grow: whether heads or head dim follow the width.

    Returns:
        Width -> configuration, at constant peak learning rate.

    Raises:
        ConfigError: widths that show no slope or do not fit the heads, or a wrong option.
        ParameterizationError: the parameterization has no rule for this model.
    """
    if len(widths) < 2 or list(widths) != sorted(set(widths)) or min(widths) < 1:
        raise ConfigError(
            f"--widths is {','.join(map(str, widths))}; give at least 2 positive hidden sizes, "
            "each once, the smallest first"
        )
    for override in overrides:
        key = qualified(override).partition("=")[0]
        if key in {f"model.{name}" for name in _SET_BY_WIDTH}:
            raise ConfigError(
                f"'{override}' is set by --widths; leave it out, or change the configuration file"
            )
    body = SMALL_BODY if source.config is None else ()
    start = source.load([*body, *overrides])
    return {width: at_width(start, width, grow=grow) for width in widths}


def at_width(run: RunConfig, width: int, *, grow: Grow = Grow.HEADS) -> RunConfig:
    """A configuration at another width and at constant peak learning rate.

    Warmup and decay go: the first steps of a warmup change too little to be measured. The extra
    warmup stays, because it belongs to how learning rates follow the width. ``train_iters`` stays,
    because a horizon rule reads it.

    Args:
        run: the configuration, of any width.
        width: hidden size.
        grow: whether heads or head dim follow the width.

    Raises:
        ConfigError: a size would not be a whole number.
    """
    sections = config_to_dict(run)
    model, sizes = run.model, sections["model"]
    sizes["kv_channels"] = model.head_dim
    names = list(_PROPORTIONAL)
    if grow is Grow.HEAD_DIM:
        names[1] = "kv_channels"
    elif model.query_groups not in (1, model.num_attention_heads):
        names.append("num_query_groups")
    elif model.query_groups == model.num_attention_heads > 1:
        sizes["num_query_groups"] = None
    for name in names:
        if sizes[name] is not None:
            sizes[name] = _proportional(name, sizes[name], width, model.hidden_size)
    schedule: dict[str, Any] = sections["schedule"]
    schedule |= {"lr_warmup_iters": 0, "lr_decay_style": "constant"}
    schedule |= {"lr_decay_iters": None, "lr_wsd_decay_iters": None}
    sections["training"] |= {"rampup_batch_size": None, "profile": False, "eval_iters": 0}
    return config_from_dict(sections, origin=f"the configuration at width {width}")


def _proportional(name: str, size: int, width: int, start: int) -> int:
    scaled, rest = divmod(size * width, start)
    if rest or scaled < 1:
        raise ConfigError(
            f"--widths: model.{name} {size} of width {start} has no whole number at width {width}; "
            "give widths that keep the head dim and the ratios of the configuration"
        )
    return scaled
