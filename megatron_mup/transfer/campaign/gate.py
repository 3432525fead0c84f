"""The gate: whether the proxies carry the prediction, and if not, why and what to do next.

Pure: no files, no printing. Thresholds are ``GateRules``; the verdict's are those of the fits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_mup.config import RunConfig
from megatron_mup.transfer.campaign.fit import Fit, Neighbour
from megatron_mup.transfer.campaign.likeness import differences, extrapolations
from megatron_mup.transfer.campaign.spec import GateRules
from megatron_mup.transfer.fits import Minimum, narrowing_steps, steps_at_curves
from megatron_mup.transfer.sweep.spec import TokenBudget

_FEW_SIZES = 3
"""Widths up to which one more narrows the interval more than seeds: of three points a line leaves
one degree of freedom, at which a 90% interval is 6.3 standard errors to each side, of four 2.9."""


@dataclass(frozen=True, kw_only=True)
class Stop:
    """A reason to stop.

    Attributes:
        why: with the numbers.
        next_step: what would mend it.
    """

    why: str
    next_step: str


def stops_before_runs(
    proxy: RunConfig,
    target: RunConfig,
    *,
    widths: Sequence[float],
    rules: GateRules,
    budget: TokenBudget | None,
) -> list[Stop]:
    """What is known to stop a campaign before anything has run.

    Args:
        proxy: a run of the arm at its largest width.
        target: the run that takes the learning rate.
        widths: of the proxies, increasing.
        rules: of the gate.
        budget: the sweep's rule of tokens; None: all runs have the proxy's length.
    """
    stops = [
        *_too_few(len(widths), "widths", rules, widths[-1]),
        *_too_far(target.model.hidden_size, widths, rules),
    ]
    changed = differences(proxy, target)
    if changed:
        stops.append(
            Stop(
                why="the target differs from the proxies in more than sizes, layout, precision and "
                f"length: {'; '.join(changed)}",
                next_step="set these options in the target as in the arm, or in the sweep as in "
                "the target, and run the proxies again",
            )
        )
    for one in extrapolations(proxy, target, budget=budget):
        if one.stops and one.kind not in rules.accept:
            mind = f"put {one.kind} into gate.accept, and mind that nothing here has tested it"
            stops.append(Stop(why=one.why, next_step=f"{one.cure}; or {mind}"))
    return stops


def _too_far(width: int, widths: Sequence[float], rules: GateRules) -> list[Stop]:
    """A target outside the widths for which a line through the proxies says anything."""
    if width < widths[0]:
        return [
            Stop(
                why=f"the target's width {width} is below that of the smallest proxy, "
                f"{widths[0]:g}: proxies are to be smaller than the target",
                next_step="tune the learning rate at the target's own size, which costs less, or "
                f"add a width of at most {width} to scale.values",
            )
        ]
    ratio = width / widths[-1]
    if ratio <= rules.largest_ratio:
        return []
    return [
        Stop(
            why=f"the target's width {width} is {ratio:g} times that of the largest proxy, "
            f"{widths[-1]:g}; the gate allows {rules.largest_ratio:g} times",
            next_step=f"add a width of at least {width / rules.largest_ratio:g} to scale.values, "
            "or raise gate.largest_ratio",
        )
    ]


def stops_after_fit(fit: Fit, rules: GateRules) -> list[Stop]:
    """What the runs say against using the prediction.

    Args:
        fit: of the proxies.
        rules: of the gate.
    """
    largest = fit.minima[-1].size
    edges, blind = _at_edges(fit), [*_unknown(fit), *_misfits(fit.minima)]
    if edges:
        # What else is unknown may be so because of an edge: learning rates first.
        return [*edges, *blind, *_too_few(len(fit.minima), "widths", rules, largest)]
    known = sum(one.log2_lr.value is not None for one in fit.minima)
    return [
        *blind,
        *_too_few(known, "widths with a known optimum", rules, largest),
        *_too_wide(fit, rules),
        *_not_shown(fit, rules),
    ]


def _unknown(fit: Fit) -> list[Stop]:
    """Widths of the sweep that say nothing; one with an edge is told with it."""
    stops = [
        Stop(
            why=f"width {width:g}: no run finished or diverged, so that it has no part in the fit",
            next_step="run its learning rates to their end, or take the width from scale.values",
        )
        for width in fit.without_curve
    ]
    for one in fit.minima:
        if one.log2_lr.value is not None or one.edge is not None:
            continue
        more = "learning rates half an octave apart around its lowest loss, then more seeds"
        stops.append(
            Stop(
                why=f"width {one.size:g}: the best learning rate is unknown: {one.log2_lr.reason}",
                next_step=more if one.lowest is not None else "lower learning rates for it",
            )
        )
    return stops


def _misfits(minima: Sequence[Minimum]) -> list[Stop]:
    """Curves whose intervals do not hold; a narrower window that fits is no reason to stop."""
    return [
        Stop(
            why=f"width {one.size:g}: {one.misfit}",
            next_step="add learning rates half an octave apart around "
            + ("its lowest loss" if one.lowest is None else f"2^{one.lowest[0]:g}"),
        )
        for one in minima
        if one.misfit is not None and not one.narrowed
    ]


def _not_shown(fit: Fit, rules: GateRules) -> list[Stop]:
    """The verdict, where it does not let the prediction through."""
    outcome = fit.verdict.outcome
    refused = outcome == "does not transfer"
    if not refused and (outcome == "transfers" or rules.accept_cannot_tell):
        return []
    steps = "; ".join(fit.verdict.next_steps)
    otherwise = "" if refused else "; or set gate.accept_cannot_tell: true and mind the interval"
    cure = "tune the learning rate at the target's own size, or mend the parameterization"
    return [
        Stop(
            why=f"verdict: {outcome}: {fit.verdict.because}",
            next_step=f"{steps or cure}{otherwise}",
        )
    ]


def _too_few(count: int, what: str, rules: GateRules, largest: float) -> list[Stop]:
    if count >= rules.fewest_sizes:
        return []
    return [
        Stop(
            why=f"{count} {what}, {rules.fewest_sizes} needed"
            + (": a line through fewer points than three cannot be contradicted" * (count < 3)),
            next_step=f"add widths to scale.values, such as {2 * largest:g}",
        )
    ]


def _at_edges(fit: Fit) -> list[Stop]:
    """Widths with their best at an end of the learning rates, or next to one without a loss.

    One stop tells all widths at the same end; one with a neighbour has its own.
    """
    stops = []
    for edge, side in (("high", "above"), ("low", "below")):
        there = [one for one in fit.minima if one.edge == edge]
        stops += [_beside(one, found) for one in there if (found := fit.neighbours.get(one.size))]
        there = [one for one in there if one.size not in fit.neighbours]
        if not there:
            continue
        named = ", ".join(f"{one.size:g}" for one in there)
        rates = {one.lowest[0] for one in there if one.lowest is not None}
        where = f", at {', '.join(f'2^{rate:g}' for rate in sorted(rates))}" if rates else ""
        stops.append(
            Stop(
                why=f"width{'s' if len(there) > 1 else ''} {named}: the lowest loss lies at the "
                f"{edge} end of the learning rates{where}, so that the optimum may lie outside",
                next_step=f"add learning rates {side} it to learning_rate of the sweep",
            )
        )
    return stops


def _beside(one: Minimum, neighbour: Neighbour) -> Stop:
    """A lowest loss next to runs without one: learning rates beyond them would not help."""
    assert one.lowest is not None
    ends = sorted((one.lowest[0], neighbour.log2_lr))
    between = f"add learning rates between 2^{ends[0]:g} and 2^{ends[1]:g} to learning_rate"
    ended, step = "diverged", f"{between} of the sweep"
    if neighbour.stopped:
        ended = "was stopped early"
        step += ", or delete the lines of the stopped runs in sweep/runs.csv and remove stop_early"
    return Stop(
        why=f"width {one.size:g}: the lowest loss, at 2^{one.lowest[0]:g}, lies next to the "
        f"learning rate 2^{neighbour.log2_lr:g} at which a run {ended}, so that the optimum may "
        "lie between",
        next_step=step,
    )


def _too_wide(fit: Fit, rules: GateRules) -> list[Stop]:
    prediction = fit.prediction
    if prediction.value is None:
        return [
            Stop(
                why=f"the learning rate at the target's width cannot be predicted: "
                f"{prediction.reason}",
                next_step="see the other reasons",
            )
        ]
    octaves = prediction.width
    if octaves is not None and octaves <= rules.widest_interval:
        return []
    if octaves is None:
        why = f"the predicted learning rate 2^{prediction.value:.2f} has no interval"
        why += f": {prediction.reason}" if prediction.reason else ""
    else:
        why = (
            f"the interval of the predicted learning rate, 2^{prediction.low:.2f} to "
            f"2^{prediction.high:.2f}, is {octaves:.2f} octaves wide; the gate allows "
            f"{rules.widest_interval:g}"
        )
    return [Stop(why=why, next_step=_narrower(fit))]


def _narrower(fit: Fit) -> str:
    """What narrows the prediction's interval most, for the least."""
    known = [one.size for one in fit.minima if one.log2_lr.value is not None]
    if len(known) > _FEW_SIZES:
        return "; ".join(narrowing_steps(fit.minima, scatter=fit.scatter, axis="width"))
    further = (
        f"a further width, such as {2 * known[-1]:g} or one between: a line through {len(known)} "
        "points has little to tell its scatter from"
    )
    return "; then ".join([further, *steps_at_curves(fit.minima, "width")])
