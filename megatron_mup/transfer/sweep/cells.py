"""A sweep's runs: each with its whole configuration, and a name that is made of it.

A cell is the configuration, not its place in a YAML: an edited sweep keeps the rows of all runs
that it still holds. Everything is built, and so checked, before anything runs.
Must not import torch.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from megatron_mup.config import RunConfig
from megatron_mup.config_io import config_from_dict, config_to_dict
from megatron_mup.errors import ConfigError, MupError
from megatron_mup.flops import model_flops_per_sequence
from megatron_mup.transfer.sweep.base import (
    Sections,
    base_sections,
    check_variants,
    full_name,
    with_options,
)
from megatron_mup.transfer.sweep.scaling import length_options, planned_iters, scaled_sections
from megatron_mup.transfer.sweep.spec import Sweep, TokenBudget, TokenRule

_ANY_LENGTH = 10**9
"""Stands in for a length that the parameter count decides."""

PLACES = {
    "data": ("train_data_path", "valid_data_path", "per_split_data_args_path", "data_cache_path"),
    "training": ("profile_dir",),
}
"""Options that name places of a machine; not a part of a run's identity."""


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One run of a sweep.

    Attributes:
        arm: name of the variant.
        axis: what is scaled.
        size: value on that axis.
        log2_lr: log2 of the peak base learning rate.
        seed: of weights and data order.
        settings: values on further axes as text, option -> value.
        run: the whole configuration, without checkpoints and logs.
        canonical: JSON of the configuration without places.
        flops: model FLOPs of training and evaluation.
    """

    arm: str
    axis: str
    size: float
    log2_lr: float
    seed: int
    settings: Mapping[str, str]
    run: RunConfig
    canonical: str
    flops: float

    @property
    def config_sha256(self) -> str:
        """Identity of the run."""
        return hashlib.sha256(self.canonical.encode()).hexdigest()

    @property
    def id(self) -> str:
        """First 12 hex digits of the identity; names the run's folder and row."""
        return self.config_sha256[:12]

    @property
    def curve(self) -> tuple[str, float, tuple[tuple[str, str], ...]]:
        """What cells share that differ in learning rate and seed alone."""
        return self.arm, self.size, tuple(sorted(self.settings.items()))

    @property
    def words(self) -> str:
        """The cell for a progress line."""
        further = "".join(f" {key.split('.')[-1]}={text}" for key, text in self.settings.items())
        return (
            f"{self.arm} {self.axis} {self.size:g} lr 2^{self.log2_lr:g} seed {self.seed}{further}"
        )


def canonical_json(data: Mapping[str, Mapping[str, Any]]) -> str:
    """What identifies a run: its configuration without places, checkpoints and logs.

    Args:
        data: every section of a configuration, as ``config_to_dict`` gives them.
    """
    kept = {
        section: {key: value for key, value in values.items() if key not in PLACES.get(section, ())}
        for section, values in data.items()
        if section not in ("checkpoint", "logging")
    }
    return json.dumps(kept, sort_keys=True, separators=(",", ":"))


def make_cells(sweep: Sweep, data_folder: Path) -> list[Cell]:
    """All runs that the sweep can come to, in the order of the YAML.

    Args:
        sweep: the sweep.
        data_folder: where shards lie that are made from ``text``.

    Raises:
        ConfigError: a configuration is refused, or two cells are the same run.
        ParameterizationError: a parameterization has no rule for a model.
    """
    check_variants(sweep)
    base = base_sections(sweep)
    if sweep.text is not None:
        base["data"]["train_data_path"] = [str(data_folder.absolute() / "text_train")]
        base["data"]["valid_data_path"] = [str(data_folder.absolute() / "text_valid")]
    cells = []
    for arm, settings, size in itertools.product(sweep.arms, _combinations(sweep), sweep.sizes):
        where = f"arm {arm}, {sweep.axis} {size:g}{_in_words(settings)}"
        try:
            options = {**sweep.arms[arm], **settings}
            first = {"optimizer.lr": 2.0 ** sweep.log2_lrs[arm][0], "training.seed": sweep.seeds[0]}
            run = _group_config(sweep, with_options(base, {**options, **first}), size)
        except MupError as error:
            raise type(error)(f"{where}: {error}") from error
        cells += list(_cells_of(sweep, arm, size, settings=settings, run=run))
    _check_different(cells)
    return cells


def _combinations(sweep: Sweep) -> Iterator[dict[str, Any]]:
    names = [full_name(option) for option in sweep.axes]
    for values in itertools.product(*sweep.axes.values()):
        yield dict(zip(names, values, strict=True))


def _in_words(settings: Mapping[str, Any]) -> str:
    return "".join(f", {option}={_text(value)}" for option, value in settings.items())


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _group_config(sweep: Sweep, sections: Sections, size: float) -> RunConfig:
    """The configuration of all runs of one arm and size, at the first learning rate and seed."""
    scaled = scaled_sections(sections, sweep.axis, size)
    budget = sweep.tokens
    if sweep.axis == "tokens":
        budget = TokenBudget(rule=TokenRule.FIXED_TOKENS, amount=size)
    any_length = {} if budget is None else {"training.train_iters": _ANY_LENGTH}
    run = config_from_dict(with_options(scaled, any_length), origin="base")
    iters = run.training.train_iters if budget is None else planned_iters(budget, run)
    run = config_from_dict(with_options(scaled, length_options(sweep, iters, run)), origin="base")
    if run.parallel.model_parallel_size > 1:
        raise ConfigError(
            f"the model is split over {run.parallel.model_parallel_size} processes; a run of a "
            "sweep has one: leave the parallel section's sizes at 1"
        )
    if run.training.eval_iters == 0:
        raise ConfigError(
            "base.training.eval_iters is 0, and a sweep compares held-out losses; set it or "
            "run.eval_tokens"
        )
    return run


def _cells_of(
    sweep: Sweep, arm: str, size: float, *, settings: Mapping[str, Any], run: RunConfig
) -> Iterator[Cell]:
    """All learning rates and seeds of one arm and size."""
    data = config_to_dict(run)
    flops = _flops(run)
    for seed, log2_lr in itertools.product(sweep.seeds, sweep.log2_lrs[arm]):
        # These two change no other option, so that the rest need not be read again.
        optimizer = replace(run.optimizer, lr=2.0**log2_lr)
        training = replace(run.training, seed=seed)
        data["optimizer"]["lr"], data["training"]["seed"] = 2.0**log2_lr, seed
        yield Cell(
            arm=arm,
            axis=sweep.axis,
            size=size,
            log2_lr=log2_lr,
            seed=seed,
            settings={option: _text(value) for option, value in settings.items()},
            run=replace(run, optimizer=optimizer, training=training),
            canonical=canonical_json(data),
            flops=flops,
        )


def with_rate_and_seed(cell: Cell, *, log2_lr: float, seed: int) -> Cell:
    """The run of the same curve at another learning rate or seed.

    Args:
        cell: any run of the curve.
        log2_lr: log2 of the peak base learning rate.
        seed: of weights and data order.
    """
    data = json.loads(cell.canonical)
    data["optimizer"]["lr"], data["training"]["seed"] = 2.0**log2_lr, seed
    run = replace(
        cell.run,
        optimizer=replace(cell.run.optimizer, lr=2.0**log2_lr),
        training=replace(cell.run.training, seed=seed),
    )
    return replace(cell, log2_lr=log2_lr, seed=seed, run=run, canonical=canonical_json(data))


def _flops(run: RunConfig) -> float:
    """Of all training steps, and of one evaluation at a third of a step's cost."""
    training = run.training
    sequences = training.global_batch_size * (training.train_iters + training.eval_iters / 3)
    return sequences * model_flops_per_sequence(run.model).total


def _check_different(cells: list[Cell]) -> None:
    seen: dict[str, Cell] = {}
    for cell in cells:
        other = seen.setdefault(cell.id, cell)
        if other is not cell:
            raise ConfigError(
                f"'{other.words}' and '{cell.words}' are the same run; remove an arm, or give them "
                "options that differ"
            )
