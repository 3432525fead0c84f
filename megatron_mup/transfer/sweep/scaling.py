"""How a configuration grows along a sweep's axis, and how long its run is.

Width n scales hidden size, heads, query groups and FFN at fixed head dim and ratios; depth scales
layers; batch scales sequences a step; tokens scale the length alone. Must not import torch.
"""

from __future__ import annotations

import math
from typing import Any

from megatron_mup.config import RunConfig
from megatron_mup.errors import ConfigError
from megatron_mup.parameterization.roles import Role
from megatron_mup.transfer.sweep.base import Sections, with_options
from megatron_mup.transfer.sweep.spec import Counted, Sweep, TokenBudget, TokenRule

_EMBEDDINGS = (Role.EMBEDDING, Role.UNEMBEDDING)


def parameter_counts(run: RunConfig) -> tuple[int, int]:
    """All parameters, and those outside the embedding and unembedding matrices.

    The vocabulary counts as padded.
    """
    sizes = [(row.tensor.role, math.prod(row.tensor.shape)) for row in run.table.rows]
    rest = sum(size for role, size in sizes if role not in _EMBEDDINGS)
    return sum(size for _, size in sizes), rest


def scaled_sections(sections: Sections, axis: str, size: float) -> Sections:
    """The configuration at one value of the axis.

    Args:
        sections: the base with an arm's options.
        axis: one of ``AXES``.
        size: value on it.

    Raises:
        ConfigError: the size does not fit the base's ratios, or the base lacks what is scaled.
    """
    if axis == "width":
        return with_options(sections, _width(sections, round(size)))
    if axis == "depth":
        return with_options(sections, {"model.num_layers": round(size)})
    if axis == "batch":
        batch = _needed(sections, "training", "global_batch_size")
        options = {"training.global_batch_size": round(size)}
        if sections["training"].get("micro_batch_size", batch) == batch:
            options["training.micro_batch_size"] = round(size)
        return with_options(sections, options)
    return sections


def _needed(sections: Sections, section: str, name: str) -> int:
    value = sections.get(section, {}).get(name)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ConfigError(
            f"base.{section}.{name} is {value}; the sweep scales it: give a positive whole number"
        )
    return value


def _width(sections: Sections, width: int) -> dict[str, Any]:
    hidden = _needed(sections, "model", "hidden_size")
    heads = _needed(sections, "model", "num_attention_heads")
    model = sections["model"]
    head_dim = model.get("kv_channels") or hidden // heads
    options: dict[str, Any] = {"model.hidden_size": width}
    # Heads keep their dim, so their number grows as the width does.
    scaled = {"num_attention_heads": heads}
    for name in ("num_query_groups", "ffn_hidden_size"):
        if model.get(name) is not None:
            scaled[name] = _needed(sections, "model", name)
    for name, value in scaled.items():
        if value * width % hidden:
            raise ConfigError(
                f"scale.values: width {width} is {width / hidden:g} times base.model.hidden_size "
                f"{hidden} and would make {value * width / hidden:g} of model.{name} {value} (head "
                f"dim {head_dim} and ratios stay); change the width or the base"
            )
        options[f"model.{name}"] = value * width // hidden
    return options


def planned_iters(budget: TokenBudget, run: RunConfig) -> int:
    """Steps that a token budget makes, rounded up.

    Args:
        budget: the rule.
        run: the model and batch; its own length does not matter.
    """
    positions = budget.amount
    if budget.rule is TokenRule.FIXED_TOKENS_PER_PARAMETER:
        total, rest = parameter_counts(run)
        positions *= total if budget.parameters is Counted.TOTAL else rest
    return math.ceil(positions / (run.training.global_batch_size * run.model.seq_length))


def length_options(sweep: Sweep, iters: int, run: RunConfig) -> dict[str, Any]:
    """Options that follow from the length: steps, warmup, evaluation.

    Args:
        sweep: the sweep.
        iters: steps of the run.
        run: the model and batch.
    """
    options: dict[str, Any] = {"training.train_iters": iters}
    if sweep.warmup_fraction is not None:
        warmup = round(sweep.warmup_fraction * iters)
        options["schedule.lr_warmup_iters"] = max(warmup, int(sweep.warmup_fraction > 0))
    if sweep.eval_tokens is not None:
        batch_tokens = run.training.global_batch_size * run.model.seq_length
        options["training.eval_iters"] = math.ceil(sweep.eval_tokens / batch_tokens)
    return options
