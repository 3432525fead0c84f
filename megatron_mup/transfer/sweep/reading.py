"""Strict reading of YAML: plain data, no duplicate and no unknown keys, errors that name the key.

Knows nothing of sweeps.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import yaml

from megatron_mup.errors import ConfigError

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]*")


class _Loader(yaml.SafeLoader):
    """Plain data only; a key that is there twice is an error."""


def _mapping(loader: _Loader, node: yaml.MappingNode) -> dict[Any, Any]:
    keys = [loader.construct_object(key, deep=True) for key, _ in node.value]
    twice = [key for number, key in enumerate(keys) if key in keys[:number]]
    if twice:
        raise yaml.constructor.ConstructorError(
            None, None, f"the key '{twice[0]}' is there twice", node.start_mark
        )
    return loader.construct_mapping(node, deep=True)


_Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)


def read_yaml(path: Path) -> Any:
    """Plain data of a YAML file.

    Raises:
        ConfigError: it cannot be read, is no YAML, or has a key twice.
    """
    try:
        return yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except OSError as error:
        raise ConfigError(
            f"cannot read the sweep '{path}': {error.strerror}; give a YAML file"
        ) from error
    except (yaml.YAMLError, UnicodeDecodeError, TypeError) as error:
        raise ConfigError(
            f"{path} is not valid YAML: {' '.join(str(error).split())}; mend it"
        ) from error


class Part:
    """A mapping of the YAML whose keys are known.

    Args:
        data: the mapping.
        origin: the file, for messages.
        where: the mapping's own key; empty for the top.
        known: its keys.
    """

    def __init__(self, data: Any, origin: str, where: str, known: Sequence[str]) -> None:
        self._origin, self._where, self._known = origin, where, known
        if not isinstance(data, dict):
            raise ConfigError(
                f"{origin}: {where or 'the top level'} must be a mapping of {', '.join(known)}; "
                f"it is {data!r}"
            )
        unknown = [key for key in data if key not in known]
        if unknown:
            raise ConfigError(
                f"{origin}: unknown key '{self._full(unknown[0])}'; known are {', '.join(known)}"
            )
        # A key without a value is one that was left out.
        self._data = {key: value for key, value in data.items() if value is not None}

    def _full(self, key: object) -> str:
        return f"{self._where}.{key}" if self._where else str(key)

    def error(self, key: str, what: str) -> ConfigError:
        """An error about one key, in the form that all of them have."""
        return ConfigError(f"{self._origin}: {self._full(key)} {what}")

    def has(self, key: str) -> bool:
        """Whether the key has a value."""
        return key in self._data

    def _required(self, key: str) -> Any:
        if key not in self._data:
            raise self.error(key, f"is missing; known here are {', '.join(self._known)}")
        return self._data[key]

    def part(self, key: str, known: Sequence[str], *, empty: bool = False) -> Part:
        """A mapping below this one; missing only if ``empty`` says so."""
        data = self._data.get(key, {}) if empty else self._required(key)
        return Part(data, self._origin, self._full(key), known)

    def value(self, key: str) -> Any:
        """Whatever is there; missing is an error."""
        return self._required(key)

    def text(self, key: str) -> str:
        """A text that is not empty."""
        value = self._required(key)
        if not isinstance(value, str) or not value:
            raise self.error(key, f"is {value!r}; give a text")
        return value

    def options(self, key: str) -> dict[str, Any]:
        """A mapping of names to plain values; empty if it is not given."""
        values = self._data.get(key, {})
        if not isinstance(values, dict):
            raise self.error(key, f"is {values!r}; give a mapping of options")
        return {str(name): value for name, value in values.items()}

    def name(self, key: str) -> str:
        """A name that can be a part of a file's."""
        return self.checked_name(key, self._required(key))

    def checked_name(self, key: str, name: object) -> str:
        """The name, if it can be a part of a file's."""
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            raise self.error(key, f"holds the name {name!r}; use letters, digits and . _ + -")
        return name

    def choice(self, key: str, values: Iterable[str], default: str | None = None) -> str:
        """One of some words."""
        value = self._required(key) if default is None else self._data.get(key, default)
        if value not in list(values):
            raise self.error(key, f"is {value!r}; use one of {', '.join(values)}")
        return str(value)

    def number(
        self,
        key: str,
        *,
        least: float = -math.inf,
        above: float = -math.inf,
        most: float = math.inf,
    ) -> float | None:
        """A finite number inside bounds; None if it is not given."""
        if key not in self._data:
            return None
        value = self._number(key, self._data[key])
        if value < least or value <= above or value > most:
            bounds = [
                text
                for bound, text in (
                    (least, f"at least {least:g}"),
                    (above, f"above {above:g}"),
                    (most, f"at most {most:g}"),
                )
                if math.isfinite(bound)
            ]
            raise self.error(key, f"is {value:g}; it must be {' and '.join(bounds)}")
        return value

    def required_number(self, key: str, *, above: float = -math.inf) -> float:
        """A finite number."""
        self._required(key)
        value = self.number(key, above=above)
        return math.nan if value is None else value

    def _number(self, key: str, value: object) -> float:
        # YAML 1.1 reads 3e-4 as text.
        try:
            number = math.nan if isinstance(value, bool) else float(value)  # type: ignore[arg-type]
        except (TypeError, ValueError, OverflowError):
            number = math.nan
        if not math.isfinite(number):
            raise self.error(key, f"is {value!r}; give a finite number")
        return number

    def count(self, key: str) -> int | None:
        """A positive whole number; None if it is not given."""
        value = self.number(key)
        if value is None:
            return None
        if value < 1 or value != int(value):
            raise self.error(key, f"is {value:g}; give a positive whole number")
        return int(value)

    def flag(self, key: str) -> bool:
        """True or false; false if it is not given."""
        value = self._data.get(key, False)
        if not isinstance(value, bool):
            raise self.error(key, f"is {value!r}; use true or false")
        return value

    def numbers(
        self,
        key: str,
        *,
        default: list[float] | None = None,
        whole: bool = False,
        increasing: bool = False,
    ) -> list[float]:
        """A list of different numbers, at least one."""
        values = self._required(key) if default is None else self._data.get(key, default)
        if not isinstance(values, list) or not values:
            raise self.error(key, f"is {values!r}; give a list of numbers")
        numbers = [self._number(key, value) for value in values]
        if whole and any(number < 0 or number != int(number) for number in numbers):
            raise self.error(key, f"is {values}; give whole numbers, not negative")
        if len(set(numbers)) != len(numbers) or (increasing and numbers != sorted(numbers)):
            order = ", the smallest first" if increasing else ""
            raise self.error(key, f"is {values}; give each number once{order}")
        return numbers

    def mappings(self, key: str, default: Any = None) -> dict[str, dict[str, Any]]:
        """A mapping of mappings."""
        values = self._required(key) if default is None else self._data.get(key, default)
        if not isinstance(values, dict):
            raise self.error(key, f"is {values!r}; give a mapping of names")
        for name, value in values.items():
            # An empty mapping may be written as nothing.
            if not isinstance(value, dict | None):
                raise self.error(f"{key}.{name}", f"is {value!r}; give a mapping of options")
        return {name: value or {} for name, value in values.items()}

    def lists(self, key: str) -> dict[str, list[Any]]:
        """A mapping of lists, none of them empty; empty if it is not given."""
        values = self._data.get(key, {})
        if not isinstance(values, dict):
            raise self.error(key, f"is {values!r}; give a mapping of option to values")
        for name, value in values.items():
            if not isinstance(value, list) or not value:
                raise self.error(f"{key}.{name}", f"is {value!r}; give a list of values")
        return values
