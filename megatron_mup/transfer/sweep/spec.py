"""The sweep's YAML, strictly read into a frozen ``Sweep``; docs/sweeps.md is its reference.

Says what is asked for; what follows from it for each run is ``cells``. Must not import torch.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from megatron_mup.config_io import read_sections
from megatron_mup.transfer.runs import AXES, look_like_rates
from megatron_mup.transfer.sweep.reading import Part, read_yaml

DEFAULT_CORPUS_BYTES = 6_000_000

_LARGEST_LOG2 = 100
"""Beyond it is no learning rate, and soon no number."""

_INTERVAL_OCTAVES, _MAX_ROUNDS, _WIDEST = 0.5, 3, (-14.0, 2.0)
_AFTER, _MARGIN = 0.5, 1.0


class TokenRule(StrEnum):
    """How long a run is."""

    FIXED_TOKENS = "fixed_tokens"
    FIXED_TOKENS_PER_PARAMETER = "fixed_tokens_per_parameter"


class Counted(StrEnum):
    """Which parameters a token rule counts."""

    TOTAL = "total"
    NON_EMBEDDING = "non_embedding"


@dataclass(frozen=True, kw_only=True)
class TokenBudget:
    """Positions that a run trains on.

    Attributes:
        rule: what stays the same over sizes.
        amount: tokens, or tokens per parameter.
        parameters: which of them count.
    """

    rule: TokenRule
    amount: float
    parameters: Counted = Counted.TOTAL


@dataclass(frozen=True, kw_only=True)
class TextOptions:
    """Tokenizer and shards that the sweep makes for itself.

    Attributes:
        vocab_size: ids of the tokenizer.
        valid_tokens: least held-out tokens; None: what the evaluation reads.
        corpus_bytes: how much installed text to take where no file is given.
    """

    vocab_size: int
    valid_tokens: int | None
    corpus_bytes: int


@dataclass(frozen=True, kw_only=True)
class Refine:
    """How far runs are added around each minimum; see ``refinement``.

    Attributes:
        interval_octaves: an optimum whose interval is this narrow needs no more runs.
        max_rounds: times that runs are added.
        max_cells: most runs that are added, shared equally by arms and further axes; None: no
            limit.
        widest: lowest and highest log2 learning rate that may be added.
    """

    interval_octaves: float
    max_rounds: int
    max_cells: int | None
    widest: tuple[float, float]


@dataclass(frozen=True, kw_only=True)
class StopEarly:
    """When a run that is surely not the best ends before its time; see ``stopping``.

    Attributes:
        after: part of the run at which it is looked at first.
        margin: how far its loss must lie above the lowest, in standard deviations of one step.
    """

    after: float
    margin: float


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """What a sweep's YAML asks for.

    Attributes:
        name: of the sweep.
        base: sections of a training configuration.
        base_file: where the base lies; None: in the YAML itself.
        axis: what is scaled, one of ``AXES``.
        sizes: values on that axis, increasing.
        log2_lrs: arm -> log2 of its peak base learning rates, increasing.
        seeds: of weights and data order; the first one runs everywhere.
        seeds_within_octaves: further seeds run only this near to the first seed's lowest loss.
        tokens: length of runs; None: ``training.train_iters`` of the base.
        warmup_fraction: of the run; None: ``schedule.lr_warmup_iters`` of the base.
        arms: name -> options that differ from the base.
        axes: option -> values; every combination runs.
        text: make tokenizer and shards; None: the base names shards.
        eval_tokens: positions of the evaluation; None: ``training.eval_iters`` of the base.
        checkpoint_fraction: part of a run between checkpoints; None: no checkpoints.
        keep_checkpoints: keep each run's last checkpoint.
        refine: add runs around the minima; None: the grid alone.
        stop_early: end runs that are surely not the best; None: all run to their end.
        document: the YAML as plain data, with the base in it.
    """

    name: str
    base: Mapping[str, Mapping[str, Any]]
    base_file: Path | None
    axis: str
    sizes: tuple[float, ...]
    log2_lrs: Mapping[str, tuple[float, ...]]
    seeds: tuple[int, ...]
    seeds_within_octaves: float | None
    tokens: TokenBudget | None
    warmup_fraction: float | None
    arms: Mapping[str, Mapping[str, Any]]
    axes: Mapping[str, tuple[Any, ...]]
    text: TextOptions | None
    eval_tokens: int | None
    checkpoint_fraction: float | None
    keep_checkpoints: bool
    refine: Refine | None
    stop_early: StopEarly | None
    document: Mapping[str, Any]


def load_sweep(path: Path) -> Sweep:
    """Read and check a sweep's YAML.

    Args:
        path: the file; a ``base`` that is a path lies beside it.

    Returns:
        The sweep.

    Raises:
        ConfigError: unreadable file, unknown key (the known ones are listed), wrong value.
    """
    return sweep_from_dict(read_yaml(path), origin=str(path), folder=path.parent)


_GRID_KEYS = ("log2_min", "log2_max", "step", "log2")
_KEYS = (
    "name",
    "base",
    "scale",
    "learning_rate",
    "seeds",
    "seeds_within_octaves",
    "tokens",
    "warmup_fraction",
    "arms",
    "axes",
    "text",
    "run",
    "refine",
    "stop_early",
)


def sweep_from_dict(data: Any, *, origin: str, folder: Path = Path()) -> Sweep:
    """Build a sweep from plain data; see ``load_sweep``.

    Args:
        data: the YAML.
        origin: what messages call it.
        folder: of a base that is given as a path.
    """
    base_file = None
    if isinstance(data, dict) and isinstance(data.get("base"), str):
        base_file = folder / data["base"]
        data = {**data, "base": read_sections(base_file)}
    top = Part(data, origin, "", _KEYS)
    scale = top.part("scale", ("axis", "values"))
    axis = scale.choice("axis", AXES)
    run = top.part("run", ("eval_tokens", "checkpoint_fraction", "keep_checkpoints"), empty=True)
    seeds = top.numbers("seeds", default=[1], whole=True)
    arms = _arms(top)
    return Sweep(
        name=top.name("name"),
        base={str(key): dict(value) for key, value in top.mappings("base").items()},
        base_file=base_file,
        axis=axis,
        sizes=_sizes(scale, axis),
        log2_lrs=_grids(_rates(top), arms),
        seeds=tuple(int(seed) for seed in seeds),
        seeds_within_octaves=top.number("seeds_within_octaves", least=0.0),
        tokens=_budget(top, axis),
        warmup_fraction=top.number("warmup_fraction", least=0.0, most=1.0),
        arms=arms,
        axes={option: tuple(values) for option, values in top.lists("axes").items()},
        text=_text(top),
        eval_tokens=run.count("eval_tokens"),
        checkpoint_fraction=run.number("checkpoint_fraction", above=0.0, most=1.0),
        keep_checkpoints=run.flag("keep_checkpoints"),
        refine=_refine(top),
        stop_early=_stop_early(top),
        document=dict(data),
    )


def _sizes(scale: Part, axis: str) -> tuple[float, ...]:
    sizes = scale.numbers("values", whole=True, increasing=True)
    if sizes[0] <= 0:
        raise scale.error("values", f"holds {sizes[0]:g}; sizes on the axis {axis} are positive")
    return tuple(sizes)


def _rates(top: Part) -> Part:
    """The mapping of learning rates; numbers alone might be rates or their log2."""
    value = top.value("learning_rate")
    if isinstance(value, list | int | float):
        raise top.error(
            "learning_rate",
            f"is {value!r}; give log2 of the learning rates, such as {{log2: [-9, -7.5]}}: 0.001 "
            f"is {math.log2(0.001):.2f}",
        )
    return top.part("learning_rate", (*_GRID_KEYS, "arms"))


def _grids(rates: Part, arms: Iterable[str]) -> dict[str, tuple[float, ...]]:
    """The grid of each arm: its own where there is one."""
    own = rates.part("arms", list(arms), empty=True)
    parts = {arm: own.part(arm, _GRID_KEYS) if own.has(arm) else rates for arm in arms}
    return {arm: _checked_grid(part) for arm, part in parts.items()}


def _checked_grid(rates: Part) -> tuple[float, ...]:
    """The grid, unless one of it can be no learning rate."""
    # Before the steps between the ends: those of learning rates seldom lead from one to the other.
    if rates.has("log2_min") and rates.has("log2_max") and not rates.has("log2"):
        ends = rates.required_number("log2_min"), rates.required_number("log2_max")
        _refuse_rates(rates, "log2_min", ends)
    grid = _grid(rates)
    _refuse_rates(rates, "log2" if rates.has("log2") else "log2_min", grid)
    far = [log2_lr for log2_lr in grid if abs(log2_lr) > _LARGEST_LOG2]
    if far:
        key = "log2" if rates.has("log2") else "log2_min" if far[0] < 0 else "log2_max"
        raise rates.error(
            key,
            f"gives the learning rate 2^{far[0]:g}; give log2 of learning rates, from "
            f"{-_LARGEST_LOG2} to {_LARGEST_LOG2}",
        )
    return grid


def _refuse_rates(rates: Part, key: str, given: Sequence[float]) -> None:
    if look_like_rates(given):
        meant = ", ".join(f"{math.log2(rate):.4g}" for rate in given)
        raise rates.error(
            key,
            f"gives {', '.join(f'{rate:g}' for rate in given)}, which look like learning rates and "
            f"not like their log2; for these learning rates give log2: [{meant}]",
        )


def _grid(rates: Part) -> tuple[float, ...]:
    """The learning rates as listed, or from ``log2_min`` to ``log2_max`` both included."""
    ends = ("log2_min", "log2_max", "step")
    if rates.has("log2"):
        if any(rates.has(key) for key in ends):
            raise rates.error("log2", "is given together with log2_min, log2_max or step; choose")
        return tuple(rates.numbers("log2", increasing=True))
    low, high = rates.required_number("log2_min"), rates.required_number("log2_max")
    step = rates.required_number("step", above=0.0)
    count = round((high - low) / step)
    if count < 0 or not math.isclose(low + count * step, high, abs_tol=1e-9):
        raise rates.error(
            "step", f"{step:g} does not lead from log2_min {low:g} to log2_max {high:g}"
        )
    return tuple(low + index * step for index in range(count + 1))


def _budget(top: Part, axis: str) -> TokenBudget | None:
    if not top.has("tokens"):
        return None
    if axis == "tokens":
        raise top.error("tokens", "is given, but scale.axis tokens takes them from scale.values")
    tokens = top.part("tokens", ("rule", "tokens", "tokens_per_parameter", "parameters"))
    rule = TokenRule(tokens.choice("rule", list(TokenRule)))
    fixed = rule is TokenRule.FIXED_TOKENS
    own, other = ("tokens", "tokens_per_parameter") if fixed else ("tokens_per_parameter", "tokens")
    if tokens.has(other) or (fixed and tokens.has("parameters")):
        wrong = other if tokens.has(other) else "parameters"
        raise tokens.error(wrong, f"does not belong to rule {rule}, which takes {own}")
    counted = Counted(tokens.choice("parameters", list(Counted), default=Counted.TOTAL))
    amount = tokens.required_number(own, above=0.0)
    return TokenBudget(rule=rule, amount=amount, parameters=counted)


def _arms(top: Part) -> dict[str, Mapping[str, Any]]:
    arms = top.mappings("arms", default={"base": {}})
    if not arms:
        raise top.error("arms", "is empty; name a variant or leave it out")
    return {top.checked_name("arms", name): dict(options) for name, options in arms.items()}


def _refine(top: Part) -> Refine | None:
    if not top.has("refine"):
        return None
    refine = top.part("refine", ("interval_octaves", "max_rounds", "max_cells", "widest"))
    widest = refine.numbers("widest", default=list(_WIDEST), increasing=True)
    if len(widest) != 2:
        raise refine.error("widest", f"is {widest}; give the lowest and the highest log2 rate")
    return Refine(
        interval_octaves=refine.number("interval_octaves", above=0.0) or _INTERVAL_OCTAVES,
        max_rounds=refine.count("max_rounds") or _MAX_ROUNDS,
        max_cells=refine.count("max_cells"),
        widest=(widest[0], widest[1]),
    )


def _stop_early(top: Part) -> StopEarly | None:
    if not top.has("stop_early"):
        return None
    stop = top.part("stop_early", ("after", "margin"))
    after = stop.number("after", above=0.0, most=0.95)
    margin = stop.number("margin", above=0.0)
    return StopEarly(after=after or _AFTER, margin=margin or _MARGIN)


def _text(top: Part) -> TextOptions | None:
    if not top.has("text"):
        return None
    text = top.part("text", ("vocab_size", "valid_tokens", "corpus_bytes"))
    vocabulary = text.count("vocab_size")
    if vocabulary is None:
        raise text.error("vocab_size", "is missing; give the number of ids, such as 1024")
    return TextOptions(
        vocab_size=vocabulary,
        valid_tokens=text.count("valid_tokens"),
        corpus_bytes=text.count("corpus_bytes") or DEFAULT_CORPUS_BYTES,
    )
