"""Statistics of learning-rate transfer: where the optimum lies, how it moves, what may be said.

Owns the fits, the intervals and the verdict's thresholds; docs/transfer_statistics.md states the
formulas and the coverage that was measured. Pure functions of numbers: no files, no printing.
"""

from __future__ import annotations

from megatron_mup.transfer.fits.metrics import compare_arms, measure_transfer, predict_log2_lr
from megatron_mup.transfer.fits.minima import fit_minima
from megatron_mup.transfer.fits.next_steps import narrowing_steps, steps_at_curves
from megatron_mup.transfer.fits.power_laws import fit_power_law
from megatron_mup.transfer.fits.prediction import loss_at
from megatron_mup.transfer.fits.types import (
    Comparison,
    Curve,
    Estimate,
    Minimum,
    PowerLaw,
    Transfer,
    Verdict,
)
from megatron_mup.transfer.fits.verdict import judge

__all__ = [
    "Comparison",
    "Curve",
    "Estimate",
    "Minimum",
    "PowerLaw",
    "Transfer",
    "Verdict",
    "compare_arms",
    "fit_minima",
    "fit_power_law",
    "judge",
    "loss_at",
    "measure_transfer",
    "narrowing_steps",
    "predict_log2_lr",
    "steps_at_curves",
]
