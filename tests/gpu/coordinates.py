"""A coordinate check without its picture, at a learning rate that bf16 can show."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_mup.diagnostics.coordinate_fit import failures, fit_coordinates
from megatron_mup.diagnostics.coordinates import CheckPlan, measure
from megatron_mup.diagnostics.widths import runs_at_widths
from megatron_mup.run_source import RunSource
from megatron_mup.training.processes import Launch

# bf16 rounds an activation to 2^-9 of itself: at the check's usual rate, 2^-10, its changes would
# be of that size. At 2^-7 they are eight times as large, and still far from saturating.
RATE = "optimizer.lr=0.0078125"


def failing(
    preset: str,
    widths: Sequence[int],
    options: Sequence[str],
    *,
    head_dim: int = 64,
    seeds: int = 2,
) -> dict[str, str]:
    """Modules that are not as expected at some step, with verdict and slope.

    Args:
        preset: named experiment.
        widths: hidden sizes, increasing; the first is muP's base.
        options: ``key=value``.
        head_dim: D.
        seeds: of the initial weights.
    """
    first = min(widths)
    source = RunSource(preset=preset, width=first, head_dim=head_dim, base_width=first)
    runs = runs_at_widths(source, (RATE, *options), widths)
    plan = CheckPlan(runs=runs, steps=3, seeds=seeds)
    found = measure(plan, Launch(), echo=lambda _line: None)
    fits = fit_coordinates(found, runs[max(widths)])
    return {
        module: f"{fit.verdict.value} at step {fit.step}, slope {fit.slope:.2f}"
        for module, fit in failures(fits).items()
    }
