"""The gate: whether the proxies carry the prediction, and if not, why and what to do next.

Pure: no files, no printing. Thresholds are ``GateRules``; the verdict's are those of the fits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_mup.config import RunConfig
from megatron_mup.transfer.campaign.fit import Fit
from megatron_mup.transfer.campaign.likeness import differences
from megatron_mup.transfer.campaign.spec import GateRules
from megatron_mup.transfer.fits import Estimate, Minimum

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
    proxy: RunConfig, target: RunConfig, *, widths: Sequence[float], rules: GateRules
) -> list[Stop]:
    """What is known to stop a campaign before anything has run.

    Args:
        proxy: a run of the arm at its largest width.
        target: the run that takes the learning rate.
        widths: of the proxies, increasing.
        rules: of the gate.
    """
    stops = _too_few(len(widths), "widths", rules, widths[-1])
    ratio = target.model.hidden_size / widths[-1]
    if ratio > rules.largest_ratio:
        needed = target.model.hidden_size / rules.largest_ratio
        stops.append(
            Stop(
                why=f"the target's width {target.model.hidden_size} is {ratio:g} times that of the "
                f"largest proxy, {widths[-1]:g}; the gate allows {rules.largest_ratio:g} times",
                next_step=f"add a width of at least {needed:g} to scale.values",
            )
        )
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
    return stops


def stops_after_fit(fit: Fit, rules: GateRules) -> list[Stop]:
    """What the runs say against using the prediction.

    Args:
        fit: of the proxies.
        rules: of the gate.
    """
    largest = fit.minima[-1].size
    edges = _at_edges(fit.minima)
    if edges:
        # What else is unknown may be so because of an edge: learning rates first.
        return [*edges, *_too_few(len(fit.minima), "widths", rules, largest)]
    known = sum(one.log2_lr.value is not None for one in fit.minima)
    return [
        *_too_few(known, "widths with a known optimum", rules, largest),
        *_too_wide(fit, rules),
        *_not_shown(fit, rules),
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
            why=f"{count} {what}, {rules.fewest_sizes} needed: a line through fewer points than "
            "three cannot be contradicted",
            next_step=f"add widths to scale.values, such as {2 * largest:g}",
        )
    ]


def _at_edges(minima: Sequence[Minimum]) -> list[Stop]:
    """One stop for each end of the learning rates, with all widths that have their best there."""
    stops = []
    for edge, side in (("high", "above"), ("low", "below")):
        there = [one for one in minima if one.edge == edge]
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
    octaves = width_of(prediction)
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
        return "more seeds around the minima, or a further, larger width"
    return (
        f"a further width, such as {2 * known[-1]:g} or one between: a line through {len(known)} "
        "points has little to tell its scatter from; then more seeds around the minima"
    )


def width_of(estimate: Estimate) -> float | None:
    """Octaves between the ends of an interval; None where one is missing."""
    if estimate.low is None or estimate.high is None:
        return None
    return estimate.high - estimate.low
