"""Checks that the sections share; each raises ConfigError with the option and its value."""

from __future__ import annotations

from megatron_mup.errors import ConfigError


def require(condition: bool, message: str) -> None:
    """Raise ConfigError with ``message`` unless the condition holds."""
    if not condition:
        raise ConfigError(message)


def require_positive(section: str, config: object, *names: str) -> None:
    """Require the named options to be unset or at least 1."""
    for name in names:
        value = getattr(config, name)
        require(value is None or value >= 1, f"{section}.{name} is {value}; it must be at least 1")


def require_probability(section: str, config: object, *names: str) -> None:
    """Require the named options to be in [0, 1)."""
    for name in names:
        value = getattr(config, name)
        require(0 <= value < 1, f"{section}.{name} is {value}; it must be in [0, 1)")
