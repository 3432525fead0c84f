"""Records of the fits."""

from __future__ import annotations

from megatron_mup.transfer.fits import Estimate


def test_an_interval_has_a_width_only_with_both_ends() -> None:
    assert Estimate(value=1.0, low=0.5, high=2.0).width == 1.5
    assert Estimate(value=1.0, low=0.5).width is None
    assert Estimate(value=1.0, high=0.5).width is None
