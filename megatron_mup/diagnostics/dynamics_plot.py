"""Picture and table of measured update dynamics, from their file; nothing here measures.

Every quantity has a panel. A curve is the mean over the tensors of one role; thin ones behind it
are these tensors.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_mup.data.publication import check_writable, published
from megatron_mup.diagnostics.dynamics_records import (
    Measured,
    Quantity,
    read_dynamics,
    role_means,
)
from megatron_mup.errors import ConfigError

FORMATS = ("png", "pdf", "svg")

_PANELS = (
    (Quantity.RELATIVE_UPDATE, "relative update |dW| / |W|\ndashed: sqrt(LR x decay)"),
    (Quantity.UPDATE_ALIGNMENT, "update alignment\n|dW X| / (|dW| |X|)"),
    (Quantity.WEIGHT_ALIGNMENT, "weight alignment\n|W X| / (|W| |X|)"),
    (Quantity.ALIGNMENT_RATIO, "alignment ratio\nof the update to that of the weight"),
    (Quantity.RELATIVE_CHANGE, "relative representation change\n|dW X| / |W X|"),
    (Quantity.WEIGHT_NORM, "weight norm |W|"),
    (Quantity.EFFECTIVE_DECAY, "effective decay\nLR x weight decay, per step"),
)

Points = list[tuple[int, float]]
"""(iteration, value), in order."""

Series = dict[str, Points]
"""``<quantity>/<role>`` -> mean over the role's tensors."""


@dataclass(frozen=True)
class Curves:
    """What is drawn of a run.

    Attributes:
        means: of each quantity and role.
        tensors: ``<quantity>/<role>`` -> a curve for each logical tensor of the role.
        roles: in the order of the forward pass, which is that of the legend.
    """

    means: Series
    tensors: dict[str, list[Points]]
    roles: Sequence[str]


def curves_of(measured: Mapping[int, Sequence[Measured]]) -> Curves:
    """Arrange a run's measurements by quantity and role.

    Args:
        measured: iteration -> measured tensors, in the order of the forward pass.
    """
    means: Series = {}
    tensors: dict[str, dict[str, Points]] = {}
    for iteration, row in measured.items():
        for name, value in role_means(row).items():
            means.setdefault(name, []).append((iteration, value))
        for item in row:
            for quantity, value in item.values.items():
                role = tensors.setdefault(f"{quantity}/{item.role}", {})
                role.setdefault(item.tensor, []).append((iteration, value))
    roles = list(dict.fromkeys(item.role for row in measured.values() for item in row))
    return Curves(means, {name: list(found.values()) for name, found in tensors.items()}, roles)


def plot(source: Path, out: Path | None = None) -> str:
    """Draw a run's update dynamics and tabulate the last ones.

    Args:
        source: a folder with ``dynamics.jsonl``, or such a file.
        out: picture to write; unset means ``dynamics.png`` in the folder, or the file's name with
            ``.png``. The suffix chooses the format.

    Returns:
        The table, and where the picture is.

    Raises:
        DataError: there are no dynamics, or the picture cannot be written.
        ConfigError: the picture's format is unknown.
    """
    measured = read_dynamics(source)
    if out is None:
        out = source / "dynamics.png" if source.is_dir() else source.with_suffix(".png")
    if out.suffix.removeprefix(".") not in FORMATS:
        raise ConfigError(f"--out '{out}' must end in {', '.join(f'.{name}' for name in FORMATS)}")
    check_writable([out], overwrite=True, option="--out")
    curves = curves_of(measured)
    last = max(measured)
    counts = {role: sum(item.role == role for item in measured[last]) for role in curves.roles}
    draw(curves, out)
    table = table_lines(curves.means, counts, last)
    return "\n".join([*table, "", f"picture: {out}"])


def equilibrium(decay: float) -> float:
    """Relative update at which AdamW's updates and decay balance, up to a constant factor.

    Args:
        decay: LR x weight decay, per step.

    Source: arXiv:2510.19093: |dW| / |W| ~ sqrt(eta lambda).
    """
    return math.sqrt(decay)


def table_lines(series: Series, counts: dict[str, int], iteration: int) -> list[str]:
    """A Markdown table of each role's means at one iteration.

    Args:
        series: of a run.
        counts: tensors of each role.
        iteration: which rows to show.
    """
    head = ["role", "tensors", "relative update", "sqrt(LR x decay)", "update alignment"]
    head += ["weight alignment", "ratio", "relative change", "weight norm", "decay per step"]
    lines = [f"Means over the tensors of each role at iteration {iteration}:", ""]
    lines += [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for role, count in counts.items():
        now = {quantity: _at(series, quantity, role, iteration) for quantity in Quantity}
        decay = now[Quantity.EFFECTIVE_DECAY]
        cells = [
            now[Quantity.RELATIVE_UPDATE],
            equilibrium(decay) if decay > 0 else math.nan,
            now[Quantity.UPDATE_ALIGNMENT],
            now[Quantity.WEIGHT_ALIGNMENT],
            now[Quantity.ALIGNMENT_RATIO],
            now[Quantity.RELATIVE_CHANGE],
            now[Quantity.WEIGHT_NORM],
            decay,
        ]
        shown = ["-" if math.isnan(value) else f"{value:.3g}" for value in cells]
        lines.append(f"| {role} | {count} | {' | '.join(shown)} |")
    return lines


def _at(series: Series, quantity: Quantity, role: str, iteration: int) -> float:
    return dict(series.get(f"{quantity}/{role}", [])).get(iteration, math.nan)


def draw(curves: Curves, path: Path) -> None:
    """A panel for each quantity against the iteration, one color a role, logarithmic upwards.

    Args:
        curves: of a run.
        path: picture to write.
    """
    # Imported late, because it takes a second; Agg draws without a display.
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    # Two rows, with the legend in the place of an eighth panel.
    space = {"wspace": 0.04}
    figure, axes = plt.subplots(
        2, 4, figsize=(15.5, 7.5), sharex=True, layout="constrained", gridspec_kw=space
    )
    colors = {role: mpl.colormaps["tab10"](index) for index, role in enumerate(curves.roles)}
    for axis, (quantity, title) in zip(axes.flat, _PANELS, strict=False):
        _panel(axis, quantity, curves, colors)
        axis.set_title(title, fontsize=10)
    for axis in axes.flat[:-1]:
        axis.tick_params(axis="x", labelbottom=True)
        axis.set_xlabel("iteration")
    axes.flat[-1].axis("off")
    # The first panel alone has every role: gains and biases have no alignment.
    handles, labels = axes.flat[0].get_legend_handles_labels()
    note = "thick: mean over the role's tensors\nthin: each of them"
    axes.flat[-1].legend(handles, labels, loc="center", frameon=False, fontsize=11, title=note)
    with published(path) as stream:
        figure.savefig(stream, dpi=130, format=path.suffix.removeprefix("."))
    # pyplot keeps every figure that is not closed.
    plt.close(figure)


def _panel(axis: Any, quantity: Quantity, curves: Curves, colors: Mapping[str, Any]) -> None:
    """The tensors of each role, then the roles' means above them."""
    for role, color in colors.items():
        _tensor_curves(axis, curves.tensors.get(f"{quantity}/{role}", []), color)
    for index, (role, color) in enumerate(colors.items()):
        points = curves.means.get(f"{quantity}/{role}", [])
        # Roles often share a decay: of curves that coincide, later ones are drawn thinner.
        later = list(colors)[index + 1 :]
        hidden_by = sum(curves.means.get(f"{quantity}/{other}") == points for other in later)
        width = 1.5 + 0.8 * hidden_by
        _curve(axis, points, label=role, color=color, lw=width)
        if quantity is Quantity.RELATIVE_UPDATE:
            decay = curves.means.get(f"{Quantity.EFFECTIVE_DECAY}/{role}", [])
            balance = [(at, equilibrium(value)) for at, value in decay]
            _curve(axis, balance, color=color, ls="--", lw=1, marker="")
    if axis.lines:
        axis.set_yscale("log")
        axis.grid(alpha=0.25)
        return
    measured = any(name.startswith(f"{quantity}/") for name in curves.means)
    text = "zero everywhere" if measured else "not measured"
    axis.text(0.5, 0.5, text, transform=axis.transAxes, ha="center", color="0.4")
    axis.set_yticks([])


def _tensor_curves(axis: Any, tensors: Sequence[Points], color: Any) -> None:
    """Thin lines; a role of one tensor is its own mean."""
    from matplotlib.collections import LineCollection

    shown = [_above_zero(points) for points in tensors]
    if len(tensors) > 1 and any(shown):
        # One collection a role, because a deep model has hundreds of tensors.
        lines = LineCollection([points for points in shown if points], lw=0.5, alpha=0.4)
        lines.set_color(color)
        axis.add_collection(lines)


def _curve(axis: Any, points: Points, **style: Any) -> None:
    shown = _above_zero(points)
    if shown:
        axis.plot(*zip(*shown, strict=True), **({"marker": ".", "ms": 4, "lw": 1.5} | style))


def _above_zero(points: Points) -> Points:
    """A logarithmic axis has no place for zero: roles without decay, steps at LR 0; nor for nan."""
    return [(at, value) for at, value in points if 0 < value < math.inf]
