"""``launch decide``: after an attempt, whether the run is started again, and on which nodes.

One rule for all: what another start can mend is started again, up to N starts in a row that leave
no newer checkpoint. The job's one exit code is that of some rank; the notes that ranks leave
(``rank_outcomes``) say which failed first, and on which node. Must not import torch or megatron.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from megatron_mup import exit_codes
from megatron_mup.launching.attempts import (
    DECIDE,
    JUDGE,
    Event,
    append_event,
    beginnings,
    read_events,
)
from megatron_mup.launching.preflight_report import read_reports
from megatron_mup.launching.run_folder import RunFolder
from megatron_mup.rank_outcomes import RankOutcome, read_outcomes

FINISHED, STOP, REQUEUE, RESUBMIT = "finished", "stop", "requeue", "resubmit"

_FINAL = {
    exit_codes.USER_ERROR: "a mistake that has to be mended first; the log says which",
    exit_codes.BAD_STEPS: "the loss or the gradient went bad",
    exit_codes.LEASE_LOST: "another job has taken the run over",
    1: "an error that the log shows",
    126: "the command cannot be executed",
    127: "the command is not there",
}
"""Codes that another start would only meet again."""

_AGAIN = {
    exit_codes.SAVE_FAILED: "a checkpoint could not be written",
    exit_codes.STOPPED_SAVED: "stopped in time, and saved",
    exit_codes.LOST_PEERS: "a rank died or hung",
    exit_codes.STOPPED_UNSAVED: "stopped in time, without saving",
    exit_codes.BAD_NODES: "a node failed before training",
}

_MACHINE_FAULT = re.compile(
    r"uncorrectable|ECC error|unspecified launch failure|device-side hardware|hardware stack error"
    r"|device unavailable|no CUDA-capable device|CUDA driver error|GPU has fallen off the bus"
    r"|unhandled (system|cuda) error|Input/output error|Stale file handle|Bus error",
    re.IGNORECASE,
)
"""Phrases of CUDA, NCCL and the kernel that tell of a machine and not of the program (assumption:
the list is ours)."""


@dataclass(frozen=True, kw_only=True)
class Decision:
    """What comes after an attempt.

    Attributes:
        action: ``FINISHED``, ``STOP``, ``REQUEUE`` or ``RESUBMIT``.
        reason: in words, one line.
        excluded: nodes that a resubmitted job must avoid, all of the run so far.
        charged: nodes that this attempt's failure counts against.
    """

    action: str
    reason: str = ""
    excluded: tuple[str, ...] = ()
    charged: tuple[str, ...] = ()

    @property
    def line(self) -> str:
        """What the launch script reads: the action, nodes of a resubmission, the reason."""
        parts = [self.action, *([",".join(self.excluded)] if self.action == RESUBMIT else [])]
        return " ".join([*parts, self.reason]).strip()


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What the user allows.

    Attributes:
        max_restarts: restarts in a row that leave no newer checkpoint.
        exclude_after: failures after which a node is avoided; None: never.
    """

    max_restarts: int
    exclude_after: int | None = None


@dataclass(frozen=True, kw_only=True)
class Ended:
    """How an attempt ended.

    Attributes:
        attempt: its number.
        exit_code: of the job step.
        signalled: whether the batch script was told to end.
        outcomes: notes of ranks, earliest first.
        iteration: of the newest whole checkpoint now.
        nodes: node of each rank, as far as the preflight saw them.
    """

    attempt: int
    exit_code: int
    signalled: bool = False
    outcomes: Sequence[RankOutcome] = field(default=())
    iteration: int | None = None
    nodes: Mapping[int, str] = field(default_factory=dict)

    @property
    def silent_nodes(self) -> set[str]:
        """Nodes of ranks that left no note though others did, because they were killed."""
        if not self.outcomes:
            return set()
        noted = {outcome.rank for outcome in self.outcomes}
        return {node for rank, node in self.nodes.items() if rank not in noted}

    @property
    def first_failure(self) -> RankOutcome | None:
        """The first note of a rank that failed by itself, and not because another one did."""
        follows = (exit_codes.LOST_PEERS, exit_codes.STOPPED_SAVED, exit_codes.STOPPED_UNSAVED)
        own = [outcome for outcome in self.outcomes if outcome.exit_code not in follows]
        return own[0] if own else None

    @property
    def code(self) -> int:
        """The code that says most: srun gives the highest one, torchrun always 1."""
        if self.exit_code in (0, exit_codes.BAD_NODES):
            return self.exit_code
        first = self.first_failure
        if first is not None:
            return first.exit_code
        codes = {outcome.exit_code for outcome in self.outcomes}
        for code in (exit_codes.LOST_PEERS, exit_codes.STOPPED_SAVED, exit_codes.STOPPED_UNSAVED):
            if code in codes:
                return code
        return self.exit_code

    @property
    def machine_fault(self) -> bool:
        """Whether the first failure reads like one of a machine, whatever its code."""
        first = self.first_failure
        return first is not None and _MACHINE_FAULT.search(first.reason) is not None


def decide(ended: Ended, events: Sequence[Event], limits: Limits) -> Decision:
    """Judge an attempt's end.

    Args:
        ended: the attempt's end.
        events: of the run, this attempt's included.
        limits: of the user.

    Returns:
        What to do.
    """
    code = ended.code
    if code == exit_codes.FINISHED:
        return Decision(action=FINISHED)
    cause = _cause(ended)
    charged = _charged_nodes(ended, events)
    if code in _FINAL and not ended.machine_fault:
        return Decision(action=STOP, reason=cause, charged=charged)
    idle = _starts_without_progress(events, ended.iteration)
    if idle > limits.max_restarts:
        reached = "no checkpoint" if ended.iteration is None else f"iteration {ended.iteration}"
        reason = f"{cause}; {idle} starts in a row left no checkpoint after {reached}"
        return Decision(action=STOP, reason=reason, charged=charged)
    excluded = _nodes_to_avoid(events, charged, limits.exclude_after)
    new = [node for node in excluded if node not in _excluded_before(events)]
    if new:
        reason = f"{cause}; {', '.join(new)} failed {limits.exclude_after} times"
        return Decision(action=RESUBMIT, reason=reason, excluded=excluded, charged=charged)
    return Decision(action=REQUEUE, reason=cause, charged=charged)


def decide_and_record(
    folder: RunFolder,
    attempt: int,
    exit_code: int,
    *,
    signalled: bool,
    limits: Limits,
) -> Decision:
    """Judge an attempt's end by the run folder, and remember the decision there.

    Args:
        folder: of the run.
        attempt: its number.
        exit_code: of the job step; 128 + signal for one that was killed.
        signalled: whether the batch script was told to end.
        limits: of the user.
    """
    ended = Ended(
        attempt=attempt,
        exit_code=exit_code,
        signalled=signalled,
        outcomes=read_outcomes(folder.outcomes(attempt)),
        iteration=folder.newest_checkpoint(),
        nodes={report.rank: report.node for report in read_reports(folder.preflight(attempt))},
    )
    events = read_events(folder)
    decision = decide(ended, events, limits)
    append_event(
        folder,
        DECIDE,
        attempt,
        exit_code=exit_code,
        signalled=signalled,
        iteration=ended.iteration,
        decision=decision.action,
        reason=decision.reason,
        charged=list(decision.charged),
        excluded=list(decision.excluded),
    )
    return decision


def _cause(ended: Ended) -> str:
    """Why the attempt ended, in one line."""
    code, first = ended.code, ended.first_failure
    words = {**_FINAL, **_AGAIN}.get(code)
    if words is None:
        words = f"killed by signal {code - 128}" if code > 128 else "no known code"
    if ended.machine_fault:
        words = "a machine failed"
    cause = f"exit {code}: {words}"
    if ended.exit_code != code:
        cause += f" (the job step said {ended.exit_code})"
    if ended.signalled:
        cause += ", after a signal"
    if first is not None:
        lines = first.reason.strip().splitlines() or [""]
        cause += f"; first rank {first.rank} on {first.node}: {lines[0][:200]}"
    return " ".join(cause.split())


def _starts_without_progress(events: Sequence[Event], iteration: int | None) -> int:
    """Starts in a row, up to now, that began at the checkpoint that is still the newest."""
    idle = 0
    for event in reversed(beginnings(events)):
        if (iteration if iteration is not None else -1) > _begun_at(event):
            break
        idle += 1
    return idle


def _begun_at(event: Event) -> int:
    iteration = event.get("iteration")
    return iteration if isinstance(iteration, int) else -1


def _charged_nodes(ended: Ended, events: Sequence[Event]) -> tuple[str, ...]:
    """Nodes that the failure of this attempt counts against; none if nobody can tell."""
    if ended.exit_code == exit_codes.BAD_NODES:
        return tuple(sorted(_judged_bad(events, ended.attempt)))
    first, silent = ended.first_failure, ended.silent_nodes
    if first is None:
        # All who could say something lost another rank, so it is on the one node that is silent.
        lost = ended.code == exit_codes.LOST_PEERS
        return tuple(silent) if lost and len(silent) == 1 else ()
    # Any other failure of a rank's own is the program's, on whatever node it shows first.
    return (first.node,) if ended.machine_fault else ()


def _judged_bad(events: Sequence[Event], attempt: int) -> dict[str, Any]:
    for event in reversed(events):
        if event["event"] == JUDGE and event["attempt"] == attempt:
            bad = event.get("bad_nodes")
            return bad if isinstance(bad, dict) else {}
    return {}


def _listed(event: Event, key: str) -> list[str]:
    nodes = event.get(key)
    return [str(node) for node in nodes] if isinstance(nodes, list) else []


def _excluded_before(events: Sequence[Event]) -> set[str]:
    return {
        node for event in events if event["event"] == DECIDE for node in _listed(event, "excluded")
    }


def _nodes_to_avoid(
    events: Sequence[Event], charged: Sequence[str], exclude_after: int | None
) -> tuple[str, ...]:
    """Every node that failed often enough, in this run as a whole."""
    if exclude_after is None:
        return ()
    failures = Counter(charged)
    for event in events:
        if event["event"] == DECIDE:
            failures.update(_listed(event, "charged"))
    often = {node for node, count in failures.items() if count >= exclude_after}
    return tuple(sorted(often | _excluded_before(events)))
