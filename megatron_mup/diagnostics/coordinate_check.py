"""``megatron-mup coord-check``: measure, judge, print, write; returns whether it passed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_mup.data.publication import check_writable, publish_text
from megatron_mup.diagnostics.coordinate_fit import failures, fit_coordinates
from megatron_mup.diagnostics.coordinate_picture import draw
from megatron_mup.diagnostics.coordinate_report import coordinates_csv, render, slopes_csv
from megatron_mup.diagnostics.coordinates import CheckPlan, measure
from megatron_mup.diagnostics.widths import HEAD_DIM, Grow, runs_at_widths
from megatron_mup.errors import ConfigError
from megatron_mup.revision import revision
from megatron_mup.run_source import RunSource
from megatron_mup.training.processes import Launch, detect_launch

Print = Callable[[str], None]

DEFAULT_PRESET = "baseline"
_FILES = ("coordinates.csv", "slopes.csv", "coordinates.png")


@dataclass(frozen=True, kw_only=True)
class CheckRequest:
    """What the command line says.

    Attributes:
        config: YAML file.
        preset: named experiment; without file and preset, the baseline.
        head_dim: D of the preset; unset means a CPU's size.
        base_width: P of the preset; unset means the smallest width.
        widths: hidden sizes, increasing.
        steps: optimizer steps.
        seeds: seeds of the initial weights.
        out: folder of CSV files and picture.
        grow: what follows the width.
        with_data: read the configured shards.
        overrides: ``key=value``.
    """

    widths: Sequence[int]
    config: Path | None = None
    preset: str | None = None
    head_dim: int | None = None
    base_width: int | None = None
    steps: int = 4
    seeds: int = 3
    out: Path = Path("coordinate_check")
    grow: Grow = Grow.HEADS
    with_data: bool = False
    overrides: Sequence[str] = ()

    @property
    def source(self) -> RunSource:
        """Where the configuration comes from, a preset at its smallest width."""
        preset = self.preset
        if preset is None and self.config is None:
            preset = DEFAULT_PRESET
        if preset is None:
            return RunSource(config=self.config, head_dim=self.head_dim, base_width=self.base_width)
        first = min(self.widths)
        return RunSource(
            config=self.config,
            preset=preset,
            width=first,
            head_dim=HEAD_DIM if self.head_dim is None else self.head_dim,
            base_width=first if self.base_width is None else self.base_width,
        )

    @property
    def name(self) -> str:
        """The configuration in words, for the picture."""
        source = self.source
        parts = [] if source.preset is None else [f"preset {source.preset}"]
        parts += [] if source.config is None else [source.config.name]
        return " ".join([*parts, *self.overrides])


def grow_from_text(text: str) -> Grow:
    """What follows the width, from the command line.

    Raises:
        ConfigError: it is neither.
    """
    if text not in tuple(Grow):
        raise ConfigError(f"--grow is '{text}'; use one of {', '.join(Grow)}")
    return Grow(text)


def run_check(request: CheckRequest, *, echo: Print, launch: Launch | None = None) -> bool:
    """Run a coordinate check; the first rank prints and writes.

    Args:
        request: what to check.
        echo: receives progress and table.
        launch: unset means what the launcher's variables say.

    Returns:
        Whether every module is as expected; the same on every rank.

    Raises:
        MupError: the request cannot be run, before any work.
    """
    runs = runs_at_widths(request.source, request.overrides, request.widths, grow=request.grow)
    plan = CheckPlan(
        runs=runs, steps=request.steps, seeds=request.seeds, with_data=request.with_data
    )
    launch = launch or detect_launch()
    files = [request.out / name for name in _FILES]

    def prepare() -> None:
        check_writable(files, overwrite=True, option="--out")
        data = "configured shards" if request.with_data else "random tokens"
        echo(f"{request.name}: {plan.steps} steps at constant peak LR, {data}")

    coordinates = measure(plan, launch, echo=echo, prepare=prepare)
    fits = fit_coordinates(coordinates, plan.runs[max(plan.runs)], grow=request.grow)
    if launch.rank == 0:
        publish_text(files[0], coordinates_csv(coordinates))
        publish_text(files[1], slopes_csv(fits))
        caption = f"{request.name}; {plan.steps} steps, {plan.seeds} seed(s); {revision()}"
        draw(coordinates, fits, files[2], caption=caption)
        echo(render(fits))
        echo(f"numbers and picture: {', '.join(str(file) for file in files)}")
    return not failures(fits)
