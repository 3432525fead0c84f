"""``launch decide``: after an attempt, whether the run is started again, and on which nodes.

One rule for all: what another start can mend is started again, up to N starts in a row that leave
no newer checkpoint. The job's one exit code is that of some rank; the notes that ranks leave, or
the shells around them for ranks that were killed (``rank_outcomes``), say which failed first, and
on which node. Must not import torch or megatron.
"""

from __future__ import annotations

import re
import signal
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from megatron_mup import exit_codes
from megatron_mup.launching.attempts import (
    DECIDE,
    JUDGE,
    Event,
    append_event,
    beginnings,
    beginnings_without_progress,
    read_events,
    signalled_attempts,
)
from megatron_mup.launching.run_folder import RunFolder
from megatron_mup.rank_outcomes import RankOutcome, read_outcomes
from megatron_mup.secrets import mask_text, secret_values
from megatron_mup.status import RunState, read_status

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

_PORT_TAKEN = re.compile(r"address already in use|EADDRINUSE", re.IGNORECASE)
"""Another process had the port: nobody's fault, and gone at the next start."""

_ABORTED, _TERMINATED = 128 + signal.SIGABRT, 128 + signal.SIGTERM
_FOLLOWING = (
    exit_codes.LOST_PEERS,
    exit_codes.STOPPED_SAVED,
    exit_codes.STOPPED_UNSAVED,
    _ABORTED,
    _TERMINATED,
)
"""Codes of a rank that ends because of another one or of the launcher, the most telling first:
NCCL's watchdog aborts those that wait, torchrun terminates those that are left."""

_CRASHED = tuple(
    128 + number
    for number in (signal.SIGILL, signal.SIGBUS, signal.SIGFPE, signal.SIGKILL, signal.SIGSEGV)
)
"""Codes of a rank that its machine ended: no memory, broken memory, a device that is gone."""

_CLOCKS_SECONDS = 2.0
"""Times of two nodes' notes may be wrong by so much: the preflight's limit for clocks (ours), and
the shells' notes count whole seconds."""

SIGNALLED_FACTOR = 10
"""Ends after a signal are no failures, but ``max_restarts`` times as many in a row without progress
are a time limit shorter than the start (ours)."""

_UNSTARTED = 1
"""What srun and torchrun say for a step that they could not start; a rank's own 1 has a note."""


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

    @property
    def facts(self) -> dict[str, Any]:
        """What the list of attempts remembers."""
        return {
            "decision": self.action,
            "reason": self.reason,
            "charged": list(self.charged),
            "excluded": list(self.excluded),
        }


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
        complete: whether the attempt did all iterations, by its own report and that checkpoint.
    """

    attempt: int
    exit_code: int
    signalled: bool = False
    outcomes: Sequence[RankOutcome] = field(default=())
    iteration: int | None = None
    complete: bool = False

    @property
    def first_failure(self) -> RankOutcome | None:
        """The first note of a rank that failed by itself, and not because another one did.

        A crash within the clocks' error of it was the first: peers often see it as their own error.
        """
        own = [outcome for outcome in self.outcomes if outcome.exit_code not in _FOLLOWING]
        if not own:
            return None
        limit = own[0].time + _CLOCKS_SECONDS
        crashes = [note for note in own if note.exit_code in _CRASHED and note.time <= limit]
        return crashes[0] if crashes else own[0]

    @property
    def code(self) -> int:
        """The code that says most: srun gives the highest one, torchrun always 1."""
        if self.exit_code in (0, exit_codes.BAD_NODES):
            return self.exit_code
        codes = {outcome.exit_code for outcome in self.outcomes}
        if self.signalled and exit_codes.STOPPED_SAVED in codes:
            # The checkpoint is whole, whatever went wrong while the ranks took leave.
            return exit_codes.STOPPED_SAVED
        first = self.first_failure
        if first is not None:
            return first.exit_code
        if not codes and self.exit_code == _UNSTARTED:
            return exit_codes.LOST_PEERS
        return next((code for code in _FOLLOWING if code in codes), self.exit_code)

    @property
    def machine_fault(self) -> bool:
        """Whether the first failure reads like one of a machine, whatever its code."""
        return self._first_reads_like(_MACHINE_FAULT)

    @property
    def port_taken(self) -> bool:
        """Whether the first failure was that another process had the port."""
        return self._first_reads_like(_PORT_TAKEN)

    @property
    def crashed(self) -> bool:
        """Whether its machine ended the first rank that failed, and not the scheduler."""
        return self.code in _CRASHED and self.first_failure is not None and not self.signalled

    def _first_reads_like(self, phrases: re.Pattern[str]) -> bool:
        first = self.first_failure
        return first is not None and phrases.search(first.reason) is not None


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
    # A process that is killed while it takes leave has nothing left to do.
    if code == exit_codes.FINISHED or ended.complete:
        return Decision(action=FINISHED)
    cause = _cause(ended, events)
    charged = _charged_nodes(ended, events)
    if code in _FINAL and not ended.machine_fault and not ended.port_taken:
        return Decision(action=STOP, reason=cause, charged=charged)
    idle = _too_many_starts(ended, events, limits.max_restarts)
    if idle is not None:
        after = "" if ended.iteration is None else f" after iteration {ended.iteration}"
        reason = f"{cause}; {idle} in a row left no checkpoint{after}"
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
    environment: Mapping[str, str],
    say: Callable[[str], None],
) -> Decision:
    """Judge an attempt's end by the run folder, and remember the decision there.

    A disk that takes no more lines must not keep the run from being started again.

    Args:
        folder: of the run.
        attempt: its number.
        exit_code: of the job step; 128 + signal for one that was killed.
        signalled: whether the batch script was told to end.
        limits: of the user.
        environment: of the batch script, whose secrets the ranks may have named.
        say: receives warnings.
    """
    events, iteration = read_events(folder), folder.newest_checkpoint()
    ended = Ended(
        attempt=attempt,
        exit_code=exit_code,
        signalled=signalled,
        outcomes=_masked(read_outcomes(folder.outcomes(attempt)), environment),
        iteration=iteration,
        complete=_is_complete(folder, attempt, events, iteration),
    )
    decision = decide(ended, events, limits)
    seen = {"exit_code": exit_code, "signalled": signalled, "iteration": ended.iteration}
    try:
        append_event(folder, DECIDE, attempt, **seen, **decision.facts)
    except OSError as error:
        say(f"warning: cannot note the decision in {folder.attempts}: {error.strerror or error}")
    return decision


def _masked(outcomes: Sequence[RankOutcome], environment: Mapping[str, str]) -> list[RankOutcome]:
    values = secret_values(environment)
    return [replace(note, reason=mask_text(note.reason, values)) for note in outcomes]


def _is_complete(
    folder: RunFolder, attempt: int, events: Sequence[Event], iteration: int | None
) -> bool:
    """Whether this attempt, and not one before a longer schedule, finished the run."""
    begun = [event for event in beginnings(events) if event["attempt"] == attempt]
    try:
        status = read_status(folder.save_folder)
    except (OSError, ValueError):
        return False
    since = begun[-1].get("time") if begun else None
    return (
        status.state is RunState.FINISHED
        and iteration is not None
        and iteration >= status.train_iters
        and isinstance(since, int | float)
        and status.updated + _CLOCKS_SECONDS >= since
    )


def _words(ended: Ended, events: Sequence[Event]) -> str:
    """What the exit code means here."""
    code, silent = ended.code, not ended.outcomes
    if ended.port_taken:
        return "another process had the port"
    if ended.machine_fault:
        return "a machine failed"
    if silent and ended.exit_code == _UNSTARTED:
        return "the ranks could not be started, or not be watched"
    everywhere = _judged(events, ended.attempt).get("everywhere")
    if silent and code == exit_codes.USER_ERROR and isinstance(everywhere, list) and everywhere:
        return f"every node failed the preflight: {'; '.join(map(str, everywhere))}"
    if silent and code == exit_codes.STOPPED_SAVED:
        # Before training: ranks that save leave notes.
        return _AGAIN[exit_codes.STOPPED_UNSAVED]
    words = {**_FINAL, **_AGAIN}.get(code)
    if words is None:
        words = f"killed by signal {code - 128}" if code > 128 else "no known code"
    return words


def _cause(ended: Ended, events: Sequence[Event]) -> str:
    """Why the attempt ended, in one line."""
    code, first = ended.code, ended.first_failure
    cause = f"exit {code}: {_words(ended, events)}"
    if ended.exit_code != code:
        cause += f" (the job step said {ended.exit_code})"
    if ended.signalled:
        cause += ", after a signal"
    if first is not None:
        lines = first.reason.strip().splitlines() or [""]
        cause += f"; first rank {first.rank} on {first.node}: {lines[0][:200]}"
    return " ".join(cause.split())


def _too_many_starts(ended: Ended, events: Sequence[Event], allowed: int) -> str | None:
    """How many starts in a row left no newer checkpoint, in words, if that is too many."""
    begun = [event["attempt"] for event in beginnings_without_progress(events, ended.iteration)]
    told_to_end = signalled_attempts(events) | ({ended.attempt} if ended.signalled else set())
    signalled = sum(attempt in told_to_end for attempt in begun)
    failed = len(begun) - signalled
    if failed > allowed:
        return f"{failed} starts"
    if signalled > SIGNALLED_FACTOR * allowed:
        return f"{signalled} starts that a signal ended"
    return None


def _charged_nodes(ended: Ended, events: Sequence[Event]) -> tuple[str, ...]:
    """Nodes that the failure of this attempt counts against; none if nobody can tell."""
    if ended.exit_code == exit_codes.BAD_NODES:
        bad = _judged(events, ended.attempt).get("bad_nodes")
        return tuple(sorted(bad)) if isinstance(bad, dict) else ()
    first = ended.first_failure
    # Any other failure of a rank's own is the program's, on whatever node it shows first.
    return (first.node,) if first is not None and (ended.machine_fault or ended.crashed) else ()


def _judged(events: Sequence[Event], attempt: int) -> Event:
    """What the preflight of an attempt found; empty without one."""
    for event in reversed(events):
        if event["event"] == JUDGE and event["attempt"] == attempt:
            return event
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
