"""Which runs would tell more: learning rates beyond an edge, half steps, further sizes, seeds.

Must not judge: it reads the minima and names runs. The order (ours): learning rates first where the
optimum lies outside, then what no seed can mend - too few sizes, scatter between them, a curve of
too few points - and seeds last, because they narrow noise alone.
"""

from __future__ import annotations

from collections.abc import Sequence

from megatron_mup.transfer.fits.edge import power
from megatron_mup.transfer.fits.types import Estimate, Minimum, Transfer

# A line through two sizes cannot be contradicted by them.
FEWEST_FOR_TREND = 3
# A curve has a level, an optimum, a curvature and an asymmetry: four points leave none to test it.
_FEWEST_FOR_SHAPE = 5
# Octaves between learning rates above which there is room for half steps.
_COARSE = 0.75
# Octaves: an optimum whose interval is wider is among the first to be measured again.
_VAGUE = 0.75
_ORDINALS = {1: "second", 2: "third", 3: "fourth"}


def steps_to_decide(transfer: Transfer, axis: str) -> tuple[str, ...]:
    """Runs that would settle a verdict, most useful first.

    Args:
        transfer: of which nothing can be told yet.
        axis: what is scaled, for the sentences.
    """
    minima = transfer.minima
    steps = edge_steps(minima, axis)
    steps += narrowing_steps(minima, scatter=transfer.scatter, axis=axis)
    return tuple(steps or [_further_size(minima, axis)])


def steps_without_transfer(transfer: Transfer, axis: str) -> tuple[str, ...]:
    """What a learning rate can still be taken from.

    Args:
        transfer: whose optimum moves.
        axis: what is scaled, for the sentences.
    """
    tune = f"tune the learning rate at each {axis}"
    if transfer.minima[-1].log2_lr.value is not None:
        tune += ", or follow the fitted trend of the optimum and check it at a further "
        tune += f"{axis}, such as {2 * transfer.sizes[-1]:g}"
    return (*edge_steps(transfer.minima, axis), tune)


def edge_steps(minima: Sequence[Minimum], axis: str) -> list[str]:
    """Learning rates for sizes whose optimum may lie outside those that were run.

    Args:
        minima: of one arm.
        axis: what is scaled, for the sentences.
    """
    return [step for one in minima for step in _edge_steps(one, axis)]


def narrowing_steps(minima: Sequence[Minimum], *, scatter: float | None, axis: str) -> list[str]:
    """Runs that narrow what rests on the optima of all sizes, most useful first.

    Args:
        minima: of one arm; those at an edge are left out.
        scatter: of ``Transfer``.
        axis: what is scaled, for the sentences.
    """
    if len(minima) < FEWEST_FOR_TREND:
        return [_further_size(minima, axis), *half_steps(minima, axis)]
    known = sum(one.log2_lr.value is not None for one in minima)
    if scatter and known >= FEWEST_FOR_TREND:
        why = f"the optima scatter by {scatter:.2f} octaves about their line beyond their errors"
        further = f"{_further_size(minima, axis)} ({why}, which seeds do not narrow)"
        # What is vague by its own noise wants seeds all the same.
        seeds = _repeat_steps(_fine(minima), axis, beside=True)
        return [*half_steps(minima, axis), further, *seeds]
    steps = steps_at_curves(minima, axis)
    return steps if len(minima) > FEWEST_FOR_TREND else [*steps, _further_size(minima, axis)]


def steps_at_curves(minima: Sequence[Minimum], axis: str) -> list[str]:
    """Runs that narrow the optima of the sizes that were run: half steps, then seeds.

    Args:
        minima: of one arm; those at an edge are left out.
        axis: what is scaled, for the sentences.
    """
    halves = half_steps(minima, axis)
    beside = bool(halves or edge_steps(minima, axis))
    return [*halves, *_repeat_steps(_fine(minima), axis, beside=beside)]


def _inner(minima: Sequence[Minimum]) -> list[Minimum]:
    return [one for one in minima if one.edge is None and one.lowest is not None]


def _fine(minima: Sequence[Minimum]) -> list[Minimum]:
    """Those to which half steps would add little."""
    return [one for one in _inner(minima) if not _is_coarse(one)]


def half_steps(minima: Sequence[Minimum], axis: str) -> list[str]:
    """Learning rates that would test the shape of curves that miss their points or have few.

    Args:
        minima: of one arm; those at an edge are left out.
        axis: what is scaled, for the sentences.
    """
    return [
        f"learning rates half an octave to either side of {_centre(one)} at {axis} {one.size:g}"
        + ("" if one.misfit is not None else f" ({one.points} points do not fix the curve's shape)")
        for one in _inner(minima)
        if _is_coarse(one)
    ]


def _edge_steps(one: Minimum, axis: str) -> list[str]:
    if one.lowest is None:
        return [f"lower learning rates at {axis} {one.size:g}: no run ended well"]
    if one.edge is None:
        return []
    at, low, high = one.lowest[0], one.log2_lr.low, one.log2_lr.high
    if low is None or high is None:
        low, high = (None, None) if one.beside is None else sorted((at, one.beside))
    if low is not None and high is not None:
        between = f"between {power(low)} and {power(high)}"
        return [f"add learning rates {between} at {axis} {one.size:g}"]
    side = "above" if one.edge == "high" else "below"
    return [f"add learning rates {side} {power(at)} at {axis} {one.size:g}"]


def _is_coarse(one: Minimum) -> bool:
    """Whether half steps tell more than seeds: the curve is missed, or has too few points."""
    if one.misfit is not None:
        return True
    spacing = (one.window[1] - one.window[0]) / max(one.points - 1, 1)
    return one.points < _FEWEST_FOR_SHAPE and spacing > _COARSE


def _further_size(minima: Sequence[Minimum], axis: str) -> str:
    article = f"a {_ORDINALS.get(len(minima), 'further')} {axis}"
    return f"{article}, such as {2 * minima[-1].size:g}"


def _repeat_steps(inner: Sequence[Minimum], axis: str, *, beside: bool) -> list[str]:
    """More seeds: everywhere if there are no repeats, otherwise where the optimum is vague.

    With no vague one and nothing ``beside`` them, at the vaguest.
    """
    bare = [one for one in inner if one.log2_lr.error is None or one.loss.error is None]
    if bare:
        shown = ", ".join(f"{one.size:g}" for one in bare)
        return [f"more seeds (3 a learning rate) around the lowest loss at {axis} {shown}"]
    by_width = sorted(inner, key=lambda one: -_octaves(one.log2_lr))
    vague = [one for one in by_width if _octaves(one.log2_lr) > _VAGUE]
    if not vague and not beside:
        vague = by_width[:1]
    return [
        f"more seeds around {_centre(one)} at {axis} {one.size:g} ({_interval(one.log2_lr)})"
        for one in sorted(vague, key=lambda one: one.size)
    ]


def _octaves(optimum: Estimate) -> float:
    """Length of the interval; without one it is longer than any."""
    return float("inf") if optimum.width is None else optimum.width


def _interval(optimum: Estimate) -> str:
    if optimum.low is None or optimum.high is None:
        return "its optimum has no interval"
    return f"its optimum lies between 2^{optimum.low:.2f} and 2^{optimum.high:.2f}"


def _centre(one: Minimum) -> str:
    assert one.lowest is not None
    return power(one.lowest[0])
