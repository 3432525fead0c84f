"""A veto between the gradient norm and the update.

Megatron's ``step`` computes the norm, clips and updates in one call. A bad step must not reach the
weights or the moments, so the last part asks first. The gradient norm is the same on every rank,
and so is the answer.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

Veto = Callable[[float], bool]


class UpdateGuard:
    """Stands between a ``ChainedOptimizer`` and its update.

    Args:
        optimizer: from ``build_optimizer``; two of its public methods are wrapped.
    """

    def __init__(self, optimizer: Any) -> None:
        self._optimizer = optimizer
        self._norm = 0.0
        self._veto: Veto | None = None
        self._get_grad_norm = optimizer.get_grad_norm
        self._update = optimizer.step_with_ready_grads
        # ChainedOptimizer.step (0.19.2) calls both on itself, in this order.
        optimizer.get_grad_norm = self._remember_norm
        optimizer.step_with_ready_grads = self._update_unless_vetoed

    def step(self, veto: Veto | None = None) -> tuple[bool, float]:
        """Clip and update, unless ``veto`` says no.

        Args:
            veto: is given the gradient norm before clipping; True leaves the update out.

        Returns:
            Whether the weights were updated, and the gradient norm before clipping.
        """
        self._veto = veto
        updated, norm, _ = self._optimizer.step()
        return bool(updated), float(norm)

    def _remember_norm(self) -> Any:
        norm = self._get_grad_norm()
        self._norm = float(norm)
        return norm

    def _update_unless_vetoed(self) -> bool:
        if self._veto is not None and self._veto(self._norm):
            return False
        return bool(self._update())
