"""The vertex through the minimum, and when the grid cannot tell."""

from __future__ import annotations

import math

import pytest

from megatron_mup.transfer.optimum import find_optimum

GRID = [-8.0, -7.0, -6.0, -5.0, -4.0]


def test_vertex_of_an_exact_parabola_is_found() -> None:
    best = find_optimum(GRID, [2.0 + 0.3 * (x + 5.7) ** 2 for x in GRID])
    assert best is not None
    assert best.log2_lr == pytest.approx(-5.7)
    assert best.loss == pytest.approx(2.0 + 0.3 * 0.3**2)
    assert not best.at_edge


def test_vertex_on_a_grid_with_uneven_spacing() -> None:
    grid = [-8.0, -6.0, -5.5, -3.0]
    best = find_optimum(grid, [0.1 * (x + 5.0) ** 2 for x in grid])
    assert best is not None
    assert best.log2_lr == pytest.approx(-5.0)


@pytest.mark.parametrize("losses", [[1, 2, 3, 4, 5], [5, 4, 3, 2, 1]])
def test_a_minimum_at_the_end_of_the_grid_is_an_edge(losses: list[float]) -> None:
    best = find_optimum(GRID, losses)
    assert best is not None
    assert best.at_edge
    assert best.loss == 1


def test_a_minimum_beside_a_diverged_run_is_an_edge() -> None:
    best = find_optimum(GRID, [5.0, 4.0, 3.0, math.nan, math.inf])
    assert best is not None
    assert best.log2_lr == -6.0
    assert best.at_edge


def test_a_diverged_run_elsewhere_does_not_matter() -> None:
    best = find_optimum(GRID, [3.0, 2.0, 3.0, 4.0, math.nan])
    assert best is not None
    assert best.log2_lr == -7.0
    assert not best.at_edge


def test_no_finite_run_has_no_optimum() -> None:
    assert find_optimum(GRID, [math.nan] * 5) is None


def test_a_flat_curve_has_its_first_point() -> None:
    best = find_optimum(GRID, [2.0, 1.0, 1.0, 1.0, 2.0])
    assert best is not None
    assert best.log2_lr == pytest.approx(-6.5)
