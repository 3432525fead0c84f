"""Every layout over gloo: one rank's initial weights exactly, its losses to 1e-5.

Each model and layout is trained for ten steps with warmup, clipping and decay; the differences are
printed as a table at the end of the session.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from tests.distributed.cells import LAYOUTS, MUTATIONS, PAIRS
from tests.distributed.conftest import Cell, Matrix, Reference
from tests.distributed.summary import PROPERTY

# The first test waits for all cells, which take long while other jobs use the machine.
pytestmark = [
    pytest.mark.dist,
    pytest.mark.timeout(900),
]

LOSS_TOLERANCE, NORM_TOLERANCE = 1e-5, 1e-5
CLIP_GRAD = 0.1


def shard_of(whole: np.ndarray, local: np.ndarray, place: dict[str, int]) -> np.ndarray:
    """The part of a whole tensor that a rank should hold, by comparing shapes axis by axis."""
    for axis, (full, part) in enumerate(zip(whole.shape, local.shape, strict=True)):
        if full != part:
            assert part * place["tensor_size"] == full
            return np.split(whole, place["tensor_size"], axis=axis)[place["tensor_rank"]]
    return whole


def loss_difference(found: Cell, expected: Cell) -> float:
    """Largest difference over the training losses and the evaluation between them."""
    losses = [
        np.array(cell.report["losses"] + cell.report["evaluation"]) for cell in (found, expected)
    ]
    return float(np.abs(losses[0] - losses[1]).max())


def norm_difference(found: Cell, expected: Cell) -> float:
    """Largest relative difference of the gradient norms over the steps."""
    norms = [np.array(cell.report["norms"]) for cell in (found, expected)]
    return float(np.abs(norms[0] / norms[1] - 1).max())


@pytest.mark.parametrize(("model", "layout"), PAIRS)
def test_layout_starts_from_the_weights_of_one_rank(
    model: str, layout: str, matrix: Matrix, reference: Reference
) -> None:
    whole = reference(model, LAYOUTS[layout].layers).weights
    seen = set()
    for cell in matrix.ranks(model, layout):
        for name, local in cell.weights.items():
            expected = shard_of(whole[name], local, cell.report)
            np.testing.assert_array_equal(local, expected, err_msg=name)
        seen.update(cell.weights)
    assert seen == set(whole)


@pytest.mark.parametrize(("model", "layout"), PAIRS)
def test_layout_gives_the_losses_and_gradient_norms_of_one_rank(
    model: str,
    layout: str,
    matrix: Matrix,
    reference: Reference,
    record_property: Callable[[str, object], None],
) -> None:
    expected = reference(model, LAYOUTS[layout].layers)
    cells = matrix.ranks(model, layout)
    # np.max, unlike max, keeps a NaN.
    losses = float(np.max([loss_difference(cell, expected) for cell in cells]))
    norms = float(np.max([norm_difference(cell, expected) for cell in cells]))
    record_property(PROPERTY, [model, layout, losses, norms])
    assert losses <= LOSS_TOLERANCE
    assert norms <= NORM_TOLERANCE


@pytest.mark.parametrize("model", sorted({model for model, _ in PAIRS}))
def test_compared_run_learns_while_clipping_and_schedule_act(
    model: str, reference: Reference
) -> None:
    report = reference(model, 4).report

    assert report["losses"][-1] < report["losses"][0]
    assert sum(norm > CLIP_GRAD for norm in report["norms"]) >= 3
    # Three steps of warmup from 0, then a linear decay that ends after the last step.
    assert report["factors"][:4] == pytest.approx([0, 1 / 3, 2 / 3, 1])
    assert report["factors"][4:] == sorted(report["factors"][4:], reverse=True)
    assert report["factors"][-1] < 0.5


@pytest.mark.parametrize("mutation", list(MUTATIONS))
def test_matrix_sees_a_defect_of_each_layout(
    mutation: str, matrix: Matrix, reference: Reference
) -> None:
    model, layout = MUTATIONS[mutation]
    expected = reference(model, LAYOUTS[layout].layers)
    differences = [
        loss_difference(cell, expected) for cell in matrix.ranks(model, layout, mutation)
    ]

    assert max(differences) > 20 * LOSS_TOLERANCE


@pytest.mark.parametrize("model", ["mup folded", "lion"])
def test_distributed_optimizer_holds_half_of_the_moments(model: str, matrix: Matrix) -> None:
    whole = [cell.report["optimizer_elements"] for cell in matrix.ranks(model, "DP2")]
    halves = [cell.report["optimizer_elements"] for cell in matrix.ranks(model, "DP2 sharded")]

    assert whole[0] == whole[1] > 0
    # Megatron pads the halves to equal length, and the padding has no moments.
    assert sum(halves) == whole[0]
    assert halves == pytest.approx([whole[0] / 2, whole[0] / 2], rel=0.01)
