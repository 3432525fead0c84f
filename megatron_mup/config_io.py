"""YAML and command line to ``RunConfig`` and back; the only file that knows OmegaConf.

Strict: an unknown key is an error that names the nearest right one, and so is a value of the wrong
type. YAML is read with a loader that builds plain data only.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
from collections.abc import Sequence
from enum import Enum
from pathlib import Path
from typing import Any, TypeVar, get_args, get_type_hints

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import ConfigKeyError, MissingMandatoryValue, OmegaConfBaseException

from megatron_mup.config import RunConfig
from megatron_mup.errors import ConfigError

Config = TypeVar("Config")


def option_names(cls: type[Any] = RunConfig) -> dict[str, list[str]]:
    """Section -> its option names, for the sections of a configuration class."""
    sections = get_type_hints(cls)
    return {
        section: [item.name for item in dataclasses.fields(section_cls)]
        for section, section_cls in sections.items()
        if dataclasses.is_dataclass(section_cls)
    }


def _nearest(key: str, candidates: Sequence[str]) -> str:
    """The hint that ends an unknown-key message."""
    # Compared without sections: a right name in a wrong section is the commonest mistake.
    bare = key.rsplit(".", maxsplit=1)[-1]
    by_leaf = {name.rsplit(".", maxsplit=1)[-1]: name for name in candidates}
    match = difflib.get_close_matches(bare, list(by_leaf), n=1, cutoff=0.6)
    return f"did you mean '{by_leaf[match[0]]}'?" if match else "see docs/configuration.md"


def _all_keys() -> list[str]:
    return [f"{section}.{name}" for section, names in option_names().items() for name in names]


def qualified(override: str) -> str:
    """Turn ``lr=0.1`` into ``optimizer.lr=0.1``; option names are unique over the sections.

    Raises:
        ConfigError: no '=' or an unknown key.
    """
    key, separator, value = override.partition("=")
    if not separator:
        raise ConfigError(f"'{override}' is not an override; write key=value")
    # A name without its section is found by search; a test holds option names unique.
    keys = _all_keys()
    matches = [name for name in keys if name == key or name.split(".", 1)[1] == key]
    if len(matches) == 1:
        return f"{matches[0]}={value}"
    if matches:
        raise ConfigError(f"'{key}' stands in several sections: {', '.join(matches)}; name one")
    raise ConfigError(f"unknown option '{key}'; {_nearest(key, keys)}")


def _check_keys(data: Any, origin: str) -> None:
    """Refuse unknown sections and keys before OmegaConf sees them, with the nearest name."""
    sections = option_names()
    if not isinstance(data, dict):
        raise ConfigError(f"{origin}: the top level must be a mapping of sections, not {data!r}")
    for section, values in data.items():
        if section not in sections:
            candidates = [*sections, *_all_keys()]
            raise ConfigError(
                f"{origin}: unknown section '{section}'; {_nearest(str(section), candidates)}"
            )
        if not isinstance(values, dict):
            raise ConfigError(f"{origin}: section '{section}' must be a mapping, not {values!r}")
        for key in values:
            if key not in sections[section]:
                raise ConfigError(
                    f"{origin}: unknown key '{section}.{key}'; {_nearest(str(key), _all_keys())}"
                )


def _load_yaml(path: Path) -> Any:
    try:
        # Unlike PyYAML's safe_load, OmegaConf's loader refuses duplicate keys and reads 3e-4 as a
        # number; plain data is all that either builds.
        return OmegaConf.to_container(OmegaConf.create(path.read_text(encoding="utf-8")))
    except OSError as error:
        raise ConfigError(f"cannot read configuration '{path}': {error.strerror}") from error
    except (yaml.YAMLError, OmegaConfBaseException, UnicodeDecodeError) as error:
        raise ConfigError(
            f"{path} is not valid YAML of plain mappings, lists and values: {_one_line(error)}"
        ) from error


def _one_line(error: Exception) -> str:
    """A parser's message without its line breaks and its name for the text."""
    return " ".join(str(error).replace('in "<unicode string>", ', "at ").split())


def _dotlist(overrides: Sequence[str]) -> Any:
    try:
        return OmegaConf.from_dotlist([qualified(override) for override in overrides])
    except yaml.YAMLError as error:
        raise ConfigError(
            f"the value of an override in {list(overrides)} is not valid YAML: {_one_line(error)}"
        ) from error


def _reason(error: OmegaConfBaseException, key: str) -> str:
    """The first line; a wrong choice is answered with the values that YAML takes."""
    # OmegaConf lists an enum's Python names, YAML takes their values.
    first = str(error).splitlines()[0]
    invalid, wrong_choice, _ = first.partition(", expected one of")
    if "is not a ListConfig" in first:
        return f"it takes a list; write {key}=[a,b] (in YAML [a, b])"
    if not wrong_choice:
        return first
    section, name = key.split(".")
    kind = get_type_hints(get_type_hints(RunConfig)[section])[name]
    parts = (kind, *get_args(kind))
    enum = next(part for part in parts if isinstance(part, type) and issubclass(part, Enum))
    return f"{invalid}; use one of {', '.join(str(member.value) for member in enum)}"


def load_config(path: Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a YAML file and apply ``key=value`` overrides.

    Args:
        path: YAML file with one mapping per section.
        overrides: ``section.key=value`` or, as keys are unique, ``key=value``.

    Returns:
        The checked configuration.

    Raises:
        ConfigError: unreadable file, unknown key (the nearest is named), wrong type or value.
        ParameterizationError: the parameterization has no rule for this model.
    """
    return config_from_dict(read_sections(path), overrides, origin=str(path))


def read_sections(path: Path) -> dict[str, Any]:
    """The sections of a YAML file as plain data, their keys checked.

    Raises:
        ConfigError: unreadable file or unknown key.
    """
    data = _load_yaml(path)
    _check_keys(data, str(path))
    return dict(data)


@functools.cache
def _schema() -> Any:
    """Types and defaults of all options; made once, as it takes longer than all the rest."""
    return OmegaConf.structured(RunConfig)


def config_from_dict(
    data: dict[str, Any], overrides: Sequence[str] = (), *, origin: str = "configuration"
) -> RunConfig:
    """Build a configuration from plain data; see ``load_config``."""
    _check_keys(data, origin)
    changes = _dotlist(overrides)
    # The structured schema brings the types; the sections' own checks run in to_object.
    try:
        merged = OmegaConf.merge(_schema(), OmegaConf.create(data), changes)
        result = OmegaConf.to_object(merged)
    except MissingMandatoryValue as error:
        raise ConfigError(
            f"{origin}: required option '{error.full_key}' is not set; add it to the YAML"
        ) from error
    except ConfigKeyError as error:
        raise ConfigError(f"{origin}: {str(error).splitlines()[0]}") from error
    except OmegaConfBaseException as error:
        key = getattr(error, "full_key", None) or "?"
        if key in {qualified(override).partition("=")[0] for override in overrides}:
            origin = "command line"
        raise ConfigError(f"{origin}: {key}: {_reason(error, key)}") from error
    if not isinstance(result, RunConfig):
        raise ConfigError(f"{origin} does not describe a run")
    return result


def config_to_dict(config: RunConfig) -> dict[str, Any]:
    """Plain data (strings, numbers, lists) that ``config_from_dict`` reads back."""
    return {section: _plain(values) for section, values in dataclasses.asdict(config).items()}


def _plain(values: Any) -> Any:
    if isinstance(values, dict):
        return {str(key): _plain(value) for key, value in values.items()}
    if isinstance(values, list | tuple):
        return [_plain(value) for value in values]
    # JSON and YAML need the values of enum members.
    return values.value if isinstance(values, Enum) else values
