"""An ``Inspection`` as text for people."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from megatron_mup.convert.huggingface_folder import CONFIG_FILE
from megatron_mup.convert.inspection import Inspection, TensorGroup

_UNITS = ("B", "KiB", "MiB", "GiB", "TiB")
_HEAD = ("tensor", "role", "count", "shape", "dtype", "bytes")


def inspection_text(found: Inspection) -> str:
    """Render what a checkpoint says of itself.

    Args:
        found: from ``inspect_checkpoint``.

    Returns:
        Lines without a final line break; the last one tells whether the checkpoint is whole.
    """
    lines = [f"{found.folder}", f"  kind              {found.kind}"]
    if found.iteration is not None:
        lines.append(f"  iteration         {found.iteration}")
    lines.append(f"  parameters        {found.parameters:,}")
    lines.append(f"  weights           {', '.join(found.dtypes) or 'none'}")
    for title, values in (
        ("model", found.model),
        ("parameterization", found.parameterization),
        ("multipliers", found.multipliers),
        ("layout", found.layout),
        ("optimizer", found.optimizer),
        ("provenance", found.provenance),
    ):
        lines += _section(title, values)
    lines += ["", *_table(found.groups), f"{readable_bytes(found.nbytes)} in all", ""]
    return "\n".join([*lines, *_verdict(found)])


def readable_bytes(count: int) -> str:
    """A number of bytes with a unit and at most three digits after it changes."""
    value, unit = float(count), 0
    while value >= 1024 and unit < len(_UNITS) - 1:
        value, unit = value / 1024, unit + 1
    return f"{count} B" if unit == 0 else f"{value:.1f} {_UNITS[unit]}"


def _section(title: str, values: Mapping[str, Any]) -> list[str]:
    told = [f"{key}={_value(value)}" for key, value in values.items() if value is not None]
    return [f"  {title:<17} {'  '.join(told)}"] if told else []


def _value(value: Any) -> str:
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key}={_value(inner)}" for key, inner in value.items()) + "}"
    return ",".join(map(str, value)) if isinstance(value, list | tuple) else f"{value}"


def _table(groups: Iterable[TensorGroup]) -> list[str]:
    rows = [
        (
            group.name,
            group.role,
            str(group.count),
            "x".join(map(str, group.shape)),
            group.dtype,
            readable_bytes(group.nbytes),
        )
        for group in groups
    ]
    widths = [max(map(len, column)) for column in zip(_HEAD, *rows, strict=True)]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in (_HEAD, *rows)
    ]


def _verdict(found: Inspection) -> list[str]:
    if found.problems:
        return [f"damaged: {problem}" for problem in found.problems]
    if found.checked == "sha256":
        return ["whole: every file has its SHA-256"]
    if found.checked == "sha256 and values":
        return ["whole: every weight file has its SHA-256, and every tensor is finite"]
    if found.checked == "values":
        return [
            f"readable: every tensor of {CONFIG_FILE} is there and finite; the folder lists no "
            "checksums to compare"
        ]
    what = "file has its size"
    if found.checked == "headers":
        what = f"tensor of {CONFIG_FILE} is there"
    return [f"complete: every {what}; contents were not compared (pass --check to compare them)"]
