"""Where a command's configuration comes from: a YAML file, a preset, or a file over a preset.

The preset comes first, the file's options replace its options, ``key=value`` replaces both. Must
not import torch or megatron.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_mup.config import RunConfig
from megatron_mup.config_io import config_from_dict, qualified, read_sections
from megatron_mup.errors import ConfigError
from megatron_mup.parameterization.presets import preset_settings


@dataclass(frozen=True, kw_only=True)
class RunSource:
    """What the command line says of a configuration.

    Attributes:
        config: YAML file.
        preset: name of a preset.
        width: M of the preset.
        head_dim: D of the preset; unset means the paper's 128.
        base_width: P of the preset; unset means one head.
    """

    config: Path | None = None
    preset: str | None = None
    width: int | None = None
    head_dim: int | None = None
    base_width: int | None = None

    def load(self, overrides: Sequence[str] = ()) -> RunConfig:
        """Read, merge and check.

        Args:
            overrides: ``key=value`` or ``section.key=value``.

        Returns:
            The checked configuration.

        Raises:
            ConfigError: neither file nor preset, a preset without width, an unknown or wrong
                option, or a missing learning rate.
            ParameterizationError: the parameterization has no rule for this model.
        """
        sections = self.sections()
        self._check_learning_rate(sections, overrides)
        return config_from_dict(sections, overrides, origin=self.origin)

    def sections(self) -> dict[str, dict[str, Any]]:
        """The options that preset and file give, merged but unchecked.

        Raises:
            ConfigError: neither file nor preset, a preset without width, or an unknown option.
        """
        sections = self._preset_sections()
        if self.config is not None:
            for section, options in read_sections(self.config).items():
                sections.setdefault(section, {}).update(options)
        return sections

    @property
    def origin(self) -> str:
        """What the options come from, for messages."""
        parts = [] if self.preset is None else [f"preset {self.preset}"]
        return " and ".join([*parts, *([] if self.config is None else [str(self.config)])])

    def _preset_sections(self) -> dict[str, dict[str, Any]]:
        if self.preset is not None:
            if self.width is None:
                raise ConfigError(
                    f"--preset {self.preset} needs --width M, the hidden size; the paper's are 128 "
                    "to 8192"
                )
            return preset_settings(
                self.preset,
                width=self.width,
                head_dim=self.head_dim,
                base_width=self.base_width,
            )
        given = {"width": self.width, "head-dim": self.head_dim, "base-width": self.base_width}
        for option, value in given.items():
            if value is not None:
                raise ConfigError(
                    f"--{option} {value} belongs to --preset; with --config alone the sizes are "
                    "options of the model and parameterization sections"
                )
        if self.config is None:
            raise ConfigError(
                "--config FILE or --preset NAME --width M is missing; examples/ holds "
                "configurations to start from, 'megatron-mup presets' lists presets"
            )
        return {}

    def _check_learning_rate(
        self, sections: dict[str, dict[str, Any]], overrides: Sequence[str]
    ) -> None:
        keys = {qualified(override).partition("=")[0] for override in overrides}
        missing = "optimizer.lr" not in keys and "lr" not in sections.get("optimizer", {})
        if self.preset is not None and missing:
            raise ConfigError(
                f"no peak learning rate of preset {self.preset} is published; tune one and give "
                "optimizer.lr=..."
            )
