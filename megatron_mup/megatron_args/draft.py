"""A translation in the making: flags not yet accounted for, the configuration so far, notes."""

from __future__ import annotations

from typing import Any

from megatron_mup.megatron_args.reader import Flags


class Draft:
    """What the parts of a translation read and write.

    Args:
        flags: the command line.

    Attributes:
        flags: flags that are not yet accounted for.
        notes: lines on what has no exact counterpart.
        config: section -> option -> value.
    """

    def __init__(self, flags: Flags) -> None:
        self.flags = flags
        self.notes = flags.notes
        self.config: dict[str, dict[str, Any]] = {}

    def set(self, key: str, value: Any) -> None:
        """Write one option, named ``section.option``."""
        section, name = key.split(".")
        self.config.setdefault(section, {})[name] = value

    def get(self, key: str) -> Any:
        """The value of an option so far; None when it has none."""
        section, name = key.split(".")
        return self.config.get(section, {}).get(name)

    def drop(self, key: str) -> None:
        """Leave an option at this package's default."""
        section, name = key.split(".")
        self.config.get(section, {}).pop(name, None)

    def default(self, key: str, value: Any) -> None:
        """Write Megatron's default of an option that no flag has set."""
        if self.get(key) is None:
            self.set(key, value)
