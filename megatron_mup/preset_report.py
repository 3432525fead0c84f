"""The presets for people: a list with change and verdict, and one as YAML."""

from __future__ import annotations

import shutil

import yaml
from rich import box
from rich.console import Console
from rich.table import Table

from megatron_mup.errors import ConfigError
from megatron_mup.parameterization.presets import PRESETS, preset_settings

_FOOT = (
    "Each is a change to the baseline of arXiv:2404.05728, version 6; lingle_v1/NAME is its first "
    "version. Verdicts are the papers'; '-': not said. No loss of theirs is known to be exact, so "
    "none is shown.",
    "Use: megatron-mup train --preset NAME --width M, or megatron-mup presets NAME --width M for "
    "the YAML.",
)


def render(*, width: int | None = None) -> str:
    """All presets as a table.

    Args:
        width: columns; unset means the terminal's.
    """
    grid = Table(title="presets", title_justify="left", box=box.SIMPLE_HEAD)
    # A name is there to be copied: it stays on one line.
    grid.add_column("name", no_wrap=True)
    for column in ("change", "learning rate", "source", "v1"):
        grid.add_column(column, overflow="fold")
    for name, preset in PRESETS.items():
        v1 = "yes" if preset.in_v1 else "no"
        grid.add_row(name, preset.change, preset.verdict, preset.source, v1)
    console = Console(width=width or max(100, shutil.get_terminal_size((120, 50)).columns))
    with console.capture() as capture:
        console.print(grid)
        for line in _FOOT:
            console.print(line, markup=False, highlight=False)
    return capture.get()


def markdown() -> str:
    """All presets as the table of docs/presets.md, in Markdown."""
    lines = ["| name | change | learning rate | source | v1 |", "|---|---|---|---|---|"]
    for name, preset in PRESETS.items():
        v1 = "yes" if preset.in_v1 else "no"
        lines.append(f"| `{name}` | {preset.change} | {preset.verdict} | {preset.source} | {v1} |")
    return "\n".join(lines)


def as_yaml(name: str, *, width: int | None, head_dim: int | None, base_width: int | None) -> str:
    """A preset as a YAML configuration to save and edit.

    Raises:
        ConfigError: no such preset, or no width.
    """
    if width is None:
        raise ConfigError(f"preset {name} needs --width M, the hidden size")
    sections = preset_settings(name, width=width, head_dim=head_dim, base_width=base_width)
    given = {"width": width, "head-dim": head_dim, "base-width": base_width}
    flags = [f"--{flag} {size}" for flag, size in given.items() if size is not None]
    lines = [f"# megatron-mup presets {name} {' '.join(flags)}"]
    if "lr" not in sections["optimizer"]:
        lines.append("# No peak learning rate is published: set optimizer.lr.")
    return "\n".join([*lines, yaml.safe_dump(sections, sort_keys=False).rstrip()])
