"""Options that may differ from the checkpoint's because ``checkpoint.override`` names them.

Owns what a change is, which options can be named, and how a change is told and remembered. Must
not import torch or megatron.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from megatron_mup.config import RunConfig
from megatron_mup.config_io import option_names
from megatron_mup.errors import ConfigError

_FIXED = {
    "optimizer.optimizer": "the saved moments belong to the other optimizer",
    "precision.bf16": "the saved optimizer state has the other precision",
}
_FIXED_SECTION = "model."


@dataclass(frozen=True)
class Change:
    """One difference between a checkpoint and the run that continues it.

    Attributes:
        options: naming any of these allows it.
        was: the checkpoint's value, plain data.
        now: this run's value, plain data.
        text: the difference in words.
    """

    options: tuple[str, ...]
    was: Any
    now: Any
    text: str

    def touches(self, prefixes: Iterable[str]) -> bool:
        """Whether an option of it begins with one of the prefixes."""
        return any(option.startswith(tuple(prefixes)) for option in self.options)

    @property
    def can_be_named(self) -> bool:
        """Whether ``checkpoint.override`` can allow it."""
        return all(_reason_against(option) is None for option in self.options)


def _reason_against(option: str) -> str | None:
    if option.startswith(_FIXED_SECTION):
        return "the weights are of that model"
    return _FIXED.get(option)


def named_options(run: RunConfig) -> frozenset[str]:
    """Full names of the options in ``checkpoint.override``.

    Raises:
        ConfigError: a name is no option, or is one that no resumed run can change.
    """
    known = [f"{section}.{name}" for section, names in option_names().items() for name in names]
    found = set()
    for name in run.checkpoint.override:
        matches = [full for full in known if name in (full, full.split(".", 1)[1])]
        if not matches:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean '{near[0]}'?" if near else "; see docs/configuration.md"
            raise ConfigError(f"checkpoint.override names '{name}', which is no option{hint}")
        against = _reason_against(matches[0])
        if against is not None:
            raise ConfigError(
                f"checkpoint.override names {matches[0]}, which a resumed run cannot change: "
                f"{against}; take it out of the list"
            )
        found.add(matches[0])
    return frozenset(found)


def unneeded_names(run: RunConfig, changes: Iterable[Change]) -> list[str]:
    """Options named in ``checkpoint.override`` that allow nothing: equal, or free anyway."""
    used = {option for change in changes for option in change.options}
    return sorted(named_options(run) - used)


def history_entries(changes: Iterable[Change], iteration: int) -> list[dict[str, Any]]:
    """What later checkpoints remember of changed options, as plain data.

    Args:
        changes: allowed changes of this start.
        iteration: of the checkpoint that was resumed from.
    """
    return [
        {
            "iteration": iteration,
            "options": list(change.options),
            "was": change.was,
            "now": change.now,
        }
        for change in changes
    ]
