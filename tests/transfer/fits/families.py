"""Synthetic sweeps with known optimum, loss and curvature: what the intervals are measured on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from megatron_mup.transfer.fits import Curve

SIZES = (32.0, 64.0, 128.0, 256.0)
# Curvature at the smallest size, nats per octave^2, and its exponent; loss of the sizes.
CURVATURE, GAMMA = 0.04, 0.1
LIMIT, AMPLITUDE, ALPHA = 2.5, 4.0, 0.4


def parabola(d: np.ndarray) -> np.ndarray:
    return d**2 / 2.0


def skewed(k: float) -> Callable[[np.ndarray], np.ndarray]:
    """(e^(k d) - k d - 1) / k^2: curvature 1 at its minimum, steeper on the right."""
    return lambda d: (np.exp(k * d) - k * d - 1.0) / k**2


def cubic(d: np.ndarray) -> np.ndarray:
    return d**2 / 2.0 + 0.06 * d**3


def softened(d: np.ndarray) -> np.ndarray:
    """Steeper right of the minimum by a factor that levels off: none of the fitted curves."""
    return d**2 / 2.0 * (1.0 + 0.25 * np.tanh(d))


@dataclass(frozen=True)
class Family:
    """One kind of sweep.

    Attributes:
        shape: loss above the minimum at curvature 1.
        log2_lrs: the grid.
        noise: sd of one run, nats.
        seed_effect: sd of a seed's level, nats.
        seeds: per learning rate.
        shift: octaves per doubling.
        scatter: sd of the optimum between sizes, octaves.
        sparse: seeds beyond the first only within 1 octave of the middle of the grid.
    """

    shape: Callable[[np.ndarray], np.ndarray]
    log2_lrs: tuple[float, ...]
    noise: float
    seed_effect: float
    seeds: int = 3
    shift: float = -0.1
    scatter: float = 0.0
    sparse: bool = False


@dataclass(frozen=True)
class Truth:
    """What a sweep was made from; one entry a size."""

    optima: tuple[float, ...]
    losses: tuple[float, ...]
    curvatures: tuple[float, ...]
    next_optimum: float


def draw(family: Family, rng: np.random.Generator) -> tuple[list[Curve], Truth]:
    """Make one sweep; the optimum's place between grid points is random."""
    middle = float(np.median(family.log2_lrs))
    start = middle + rng.uniform(-0.4, 0.4) - 1.5 * family.shift
    doublings = np.arange(len(SIZES) + 1)
    optima = start + family.shift * doublings + family.scatter * rng.standard_normal(len(doublings))
    losses = LIMIT + AMPLITUDE * np.array(SIZES) ** -ALPHA
    curvatures = CURVATURE * (np.array(SIZES) / SIZES[0]) ** GAMMA
    curves = [
        _curve(family, rng, size=size, optimum=v, loss=loss, curvature=h)
        for size, v, loss, h in zip(SIZES, optima[:-1], losses, curvatures, strict=True)
    ]
    truth = Truth(tuple(optima[:-1]), tuple(losses), tuple(curvatures), float(optima[-1]))
    return curves, truth


def _curve(
    family: Family,
    rng: np.random.Generator,
    *,
    size: float,
    optimum: float,
    loss: float,
    curvature: float,
) -> Curve:
    grid = np.array(family.log2_lrs)
    runs: list[tuple[float, float, int]] = []
    for seed in range(family.seeds):
        level = loss + family.seed_effect * rng.standard_normal()
        values = level + curvature * family.shape(grid - optimum)
        values = values + family.noise * rng.standard_normal(len(grid))
        near = np.abs(grid - np.median(grid)) <= 1.0
        kept = near if family.sparse and seed > 0 else np.ones(len(grid), dtype=bool)
        runs += [(float(x), float(y), seed) for x, y in zip(grid[kept], values[kept], strict=True)]
    return Curve(
        size=size,
        log2_lrs=tuple(run[0] for run in runs),
        losses=tuple(run[1] for run in runs),
        seeds=tuple(run[2] for run in runs),
    )
