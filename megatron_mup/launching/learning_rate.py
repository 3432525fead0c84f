"""The peak learning rate of a launch: given, or taken from what tuned it.

A file of ``--lr-from`` is a campaign's result (``lr``, ``parameterization``, ``provenance``), a
run's own configuration (``optimizer.lr``, ``parameterization``), or the record of a checkpoint.
A base rate means one thing under one rule only: where the file's rule is another than the run's,
the rule table tells by which factor each role's rate would differ. Nothing is converted silently.
Must not import torch or megatron.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from megatron_mup.config import RunConfig
from megatron_mup.config_io import config_from_dict, config_to_dict, qualified
from megatron_mup.errors import ConfigError, MupError
from megatron_mup.parameterization.roles import Role

LR = "optimizer.lr"
_SAME = 1e-9
"""Relative difference below which two factors are one (rounding of powers)."""


@dataclass(frozen=True, kw_only=True)
class LearningRate:
    """A peak learning rate and where it comes from.

    Attributes:
        lr: base peak learning rate.
        source: in words, for the record.
        parameterization: options under which it was tuned, as far as the source says; None if it
            was given by hand or by the run's own configuration.
        optimizer: under which it was tuned, if the source says.
        provenance: the source's own words.
    """

    lr: float
    source: str
    parameterization: Mapping[str, Any] | None = None
    optimizer: str | None = None
    provenance: Any = None


def choose_learning_rate(
    sections: Mapping[str, Mapping[str, Any]],
    overrides: Sequence[str],
    *,
    lr: float | None,
    lr_from: Path | None,
) -> LearningRate | None:
    """The rate that the command line gives; None where the configuration has its own.

    Args:
        sections: of the configuration file.
        overrides: ``key=value`` arguments.
        lr: of ``--lr``.
        lr_from: of ``--lr-from``.

    Raises:
        ConfigError: none, two, an impossible one, or a file that holds none.
    """
    written = [item for item in overrides if qualified(item).startswith(f"{LR}=")]
    given = {"--lr": lr, "--lr-from": lr_from, "an override": written[0] if written else None}
    named = [f"{option} {value}" for option, value in given.items() if value is not None]
    if len(named) > 1:
        raise ConfigError(f"the learning rate is given twice: {' and '.join(named)}; give one")
    if lr is not None:
        return LearningRate(lr=_checked(lr, "--lr"), source=f"--lr {lr:g}")
    if lr_from is not None:
        return read_learning_rate(lr_from)
    if not written and (sections.get("optimizer") or {}).get("lr") is None:
        raise ConfigError(
            "no peak learning rate: optimizer.lr is not in the configuration, because no published "
            "value fits it. Tune one on a proxy and give it with --lr (LR=... of a launch script), "
            "or name the file that holds the result with --lr-from (LR_FROM=FILE)"
        )
    return None


def read_learning_rate(path: Path) -> LearningRate:
    """Read a file of ``--lr-from``.

    Raises:
        ConfigError: unreadable, or without a learning rate.
    """
    data = _load(path)
    source = f"--lr-from {path}"
    record = data.get("config")
    if isinstance(record, dict):
        data, source = record, f"{source} (the record of a checkpoint)"
    optimizer = data.get("optimizer")
    if "lr" in data:
        value = data["lr"]
        name = optimizer if isinstance(optimizer, str) else None
    elif isinstance(optimizer, dict) and "lr" in optimizer:
        value, name = optimizer["lr"], optimizer.get("optimizer", "adam")
    else:
        raise ConfigError(
            f"--lr-from '{path}' holds neither 'lr' nor 'optimizer.lr'; give a campaign's result, "
            "a run's configuration or the parameterization.json of a checkpoint"
        )
    rules = data.get("parameterization")
    if rules is not None and not isinstance(rules, dict):
        raise ConfigError(f"--lr-from '{path}': parameterization must be a mapping, not {rules!r}")
    return LearningRate(
        lr=_checked(value, f"--lr-from '{path}'"),
        source=source,
        parameterization=rules,
        optimizer=name,
        provenance=data.get("provenance"),
    )


def _load(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
        data = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except OSError as error:
        raise ConfigError(f"cannot read --lr-from '{path}': {error.strerror}") from error
    except (ValueError, yaml.YAMLError, RecursionError) as error:
        raise ConfigError(f"--lr-from '{path}' is neither YAML nor JSON of plain data") from error
    if not isinstance(data, dict):
        raise ConfigError(f"--lr-from '{path}' does not hold a mapping; it needs 'lr'")
    return data


def _checked(value: Any, origin: str) -> float:
    """A positive finite number; YAML's 3e-4 without a point comes as text."""
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not 0 < number < math.inf:
        raise ConfigError(f"{origin}: the learning rate is {value!r}; give a positive number")
    return number


def rule_warnings(run: RunConfig, tuned: LearningRate) -> list[str]:
    """What to say where a rate was tuned under another rule or optimizer.

    Args:
        run: the configuration that takes the rate.
        tuned: the rate.

    Returns:
        Lines; none where nothing is known to differ.
    """
    lines = []
    optimizer = run.optimizer.optimizer.value
    if tuned.optimizer is not None and tuned.optimizer != optimizer:
        lines.append(
            f"{LR}={tuned.lr:g} was tuned with optimizer {tuned.optimizer}, this run uses "
            f"{optimizer}: the rates of two optimizers have nothing in common"
        )
    if tuned.parameterization is None:
        if tuned.source.startswith("--lr-from"):
            lines.append(
                f"{tuned.source} does not say under which parameterization its rate was tuned; it "
                f"is taken as one under {run.parameterization.name}"
            )
        return lines
    return lines + _difference_of_rules(run, tuned, tuned.parameterization)


def _difference_of_rules(
    run: RunConfig, tuned: LearningRate, rules: Mapping[str, Any]
) -> list[str]:
    head = f"{LR}={tuned.lr:g} was tuned under another parameterization"
    sections = config_to_dict(run)
    try:
        other = config_from_dict({**sections, "parameterization": dict(rules)}, origin=tuned.source)
    except MupError as error:
        return [f"{head}, which has no rule for this model, so nobody can compare: {error}"]
    was = config_to_dict(other)["parameterization"]
    now = sections["parameterization"]
    changed = [f"{key} {was[key]} -> {now[key]}" for key in now if was[key] != now[key]]
    factors = learning_rate_factors(other, run)
    if not changed:
        return []
    lines = [f"{head} ({', '.join(changed)})"]
    if all(math.isclose(factor, 1.0, rel_tol=_SAME) for factor in factors.values()):
        return [f"{lines[0]}; every role's learning rate is the same under both"]
    lines.append("a role had this factor on the learning rate that it gets now, at this width:")
    lines += [f"  {role:<14} {factor:.6g}" for role, factor in factors.items()]
    return [*lines, _advice(tuned.lr, factors)]


def learning_rate_factors(tuned: RunConfig, run: RunConfig) -> dict[str, float]:
    """Learning rate of each role under one rule over that under another, at one base rate.

    Args:
        tuned: the run's model under the rule of the tuning.
        run: the run.

    Returns:
        By role; 128 for hidden weights where the rule was relative to a base width of 128 and the
        run's is absolute. A role whose layers differ counts by its first one.
    """
    before: dict[Role, float] = {}
    for row in tuned.table.rows:
        before.setdefault(row.tensor.role, row.lr)
    factors: dict[str, float] = {}
    for row in run.table.rows:
        role = row.tensor.role
        factors.setdefault(role.value, before[role] / row.lr if row.lr else math.nan)
    return factors


def _advice(lr: float, factors: Mapping[str, float]) -> str:
    hidden = factors[Role.FFN_IN.value]
    rate = f"{LR}={lr * hidden:g} gives the hidden weights the tuned rate"
    if all(math.isclose(factor, hidden, rel_tol=_SAME) for factor in factors.values()):
        return f"{rate}, and all others too; the given one is used as it is"
    return f"{rate}, but no base rate suits all roles; the given one is used as it is"
