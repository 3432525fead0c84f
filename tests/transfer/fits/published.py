"""Numbers that others published, and how they read them. Facts with their source, no code."""

from __future__ import annotations

import math

from megatron_mup.transfer.fits import Curve, Estimate, Minimum

# Mixture-of-experts models with residual branches scaled by 1/sqrt(layers), nine learning rates per
# size, one seed: Paloma macro loss. Width, depth and tokens grow together, so the size is the
# hidden size only in name.
# https://github.com/marin-community/marin/issues/5178 and the logbook
# .agents/logbooks/moe-depth-mup-lr-sweep.md there (entries "d512 complete", "d768 sweep complete";
# 1024: the comment "d1024 ~12k checkpoint", of about 12,600 steps).
# Their reading: "d1024's near-final central optimum has stabilized at 1x, matching the completed
# d512/d768 optima"; on d768, "1.41x effectively tied and 0.707x close".
MARIN = {
    512.0: {
        0.25: 4.0652,
        0.354: 3.9475,
        0.5: 3.8671,
        0.707: 3.8302,
        1.0: 3.8188,
        1.41: 3.8284,
        2.0: 3.8695,
        2.83: 3.9301,
        4.0: 4.0568,
    },
    768.0: {
        0.25: 3.5921,
        0.354: 3.5244,
        0.5: 3.4701,
        0.707: 3.4387,
        1.0: 3.4279,
        1.41: 3.4295,
        2.0: 3.4724,
        2.83: 3.5249,
        4.0: 3.6372,
    },
    1024.0: {0.5: 3.2136, 0.707: 3.1862, 1.0: 3.1725, 1.41: 3.1810},
}

# Best learning rate of each width on a grid of octaves, as printed under the figure of
# https://github.com/NVIDIA/Megatron-LM/pull/3058 (comment of 2026-01-29). Their reading: SP's
# optimum halves with every doubling; muP's stays, but "the shift in 2048 is worrying".
MEGATRON_WIDTHS = (128.0, 256.0, 512.0, 1024.0, 2048.0)
MEGATRON_SP = (9.77e-04, 4.88e-04, 2.44e-04, 1.22e-04, 6.10e-05)
MEGATRON_MUP = (9.77e-04, 9.77e-04, 9.77e-04, 9.77e-04, 1.95e-03)


def marin_curves() -> list[Curve]:
    """Learning rates as multiples of the authors' rule, so that 0 is their rule's own."""
    return [
        Curve(
            size=size,
            log2_lrs=tuple(math.log2(multiple) for multiple in losses),
            losses=tuple(losses.values()),
            seeds=(0,) * len(losses),
        )
        for size, losses in MARIN.items()
    ]


def grid_minima(widths: tuple[float, ...], rates: tuple[float, ...]) -> list[Minimum]:
    """Minima of which only the best grid point is known."""
    unknown = Estimate(value=None, reason="not published")
    return [
        Minimum(
            size=width,
            log2_lr=Estimate(value=math.log2(rate), reason="grid point"),
            loss=unknown,
            curvature=unknown,
            edge=None,
            window=(-20.0, 0.0),
            points=1,
            runs=1,
            diverged=0,
            noise=None,
            misfit=None,
            lowest=None,
        )
        for width, rate in zip(widths, rates, strict=True)
    ]
