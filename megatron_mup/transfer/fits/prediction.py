"""The fitted curve of a minimum, for figures and for reading off a loss."""

from __future__ import annotations

from megatron_mup.transfer.fits.shape import curve_above_minimum
from megatron_mup.transfer.fits.types import Minimum


def loss_at(minimum: Minimum, log2_lr: float) -> float | None:
    """Loss of the fitted curve at a learning rate; None where no curve was fitted.

    Args:
        minimum: of ``fit_minima``.
        log2_lr: trust it inside ``minimum.window`` only.
    """
    optimum, loss, curvature = minimum.log2_lr, minimum.loss, minimum.curvature
    if optimum.value is None or loss.value is None or curvature.value is None:
        return None
    above = curve_above_minimum(log2_lr - optimum.value, minimum.asymmetry or 0.0)
    return loss.value + curvature.value * float(above)
