"""``launch judge``: which nodes did not pass the preflight, and why.

A node that says itself what is wrong is to blame, and so is one whose processes never reported or
stayed behind the others. Nodes that only wait for such a node are not. What is wrong on every node
in the same way is no node's fault, nor is it where most of them are late. Must not import torch or
megatron.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from megatron_mup import exit_codes
from megatron_mup.launching.attempts import JUDGE, append_event
from megatron_mup.launching.preflight_report import PreflightReport, Stage, read_reports
from megatron_mup.launching.run_folder import RunFolder

_WAITING = {
    Stage.STARTED: "the checks of its own machine did not end",
    Stage.CHECKED: "it did not meet the other ranks",
    Stage.JOINED: "the all-reduce did not end",
}

_SHARED = frozenset({"checkpoint disk", "data"})
"""Checks of what all nodes share: a job of one node cannot tell its own fault there."""


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What the reports of an attempt say.

    Attributes:
        bad_nodes: node -> reasons, in words.
        everywhere: what is wrong on every node alike, so that no node is to blame.
        stuck: why nobody can be blamed although the checks did not end; None if they did.
        notes: measured numbers of rank 0.
    """

    bad_nodes: Mapping[str, Sequence[str]] = field(default_factory=dict)
    everywhere: Sequence[str] = ()
    stuck: str | None = None
    notes: Mapping[str, str] = field(default_factory=dict)

    @property
    def exit_code(self) -> int:
        """0, ``BAD_NODES``, or ``USER_ERROR`` where another start meets the same on any node."""
        if self.everywhere:
            return exit_codes.USER_ERROR
        bad = bool(self.bad_nodes) or self.stuck is not None
        return exit_codes.BAD_NODES if bad else exit_codes.FINISHED

    @property
    def lines(self) -> list[str]:
        """One line a node; otherwise what was measured."""
        lines = [f"{node}: {'; '.join(reasons)}" for node, reasons in self.bad_nodes.items()]
        lines += [f"every node: {reason}" for reason in self.everywhere]
        lines += [] if self.stuck is None else [self.stuck]
        if not lines:
            lines = [f"preflight: all nodes passed{_listed(self.notes)}"]
        return lines


def judge(reports: Sequence[PreflightReport], nodes: Sequence[str], tasks_per_node: int) -> Verdict:
    """Judge the nodes of an attempt.

    Args:
        reports: of its ranks.
        nodes: that the attempt has.
        tasks_per_node: processes on each.

    Returns:
        The verdict.
    """
    by_node: dict[str, list[PreflightReport]] = {node: [] for node in nodes}
    for report in reports:
        by_node.setdefault(report.node, []).append(report)
    said = {node: _own_failures(found) for node, found in by_node.items()}
    for table in (_odd_versions(by_node), _odd_data(by_node)):
        for node, reasons in table.items():
            said[node] = [*said[node], *reasons]
    everywhere = _on_every_node(said)
    common = {_check_of(reason) for reason in everywhere}
    bad = {
        node: [reason for reason in reasons if _check_of(reason) not in common]
        for node, reasons in said.items()
    }
    late, stuck = _late(by_node, tasks_per_node, waited_for=bool(everywhere) or any(bad.values()))
    for node, reasons in late.items():
        bad[node] += reasons
    first = [report for report in reports if report.rank == 0]
    return Verdict(
        bad_nodes={node: tuple(reasons) for node, reasons in bad.items() if reasons},
        everywhere=tuple(everywhere),
        stuck=stuck,
        notes=first[0].notes if first else {},
    )


def judge_and_record(
    folder: RunFolder, attempt: int, nodes: Sequence[str], tasks_per_node: int
) -> Verdict:
    """Judge an attempt by the reports in its folder, and remember the verdict there.

    Args:
        folder: of the run.
        attempt: its number.
        nodes: that it has.
        tasks_per_node: processes on each.
    """
    verdict = judge(read_reports(folder.preflight(attempt)), nodes, tasks_per_node)
    append_event(
        folder,
        JUDGE,
        attempt,
        nodes=list(nodes),
        bad_nodes={node: "; ".join(reasons) for node, reasons in verdict.bad_nodes.items()},
        everywhere=list(verdict.everywhere),
        stuck=verdict.stuck,
        notes=dict(verdict.notes),
    )
    return verdict


def _own_failures(found: Sequence[PreflightReport]) -> list[str]:
    """What a node's ranks say is wrong, each once."""
    reasons = [f"{check}: {text}" for report in found for check, text in report.failures.items()]
    devices = Counter(report.device for report in found if report.device is not None)
    reasons += [
        f"GPUs: {count} processes share {gpu}" for gpu, count in devices.items() if count > 1
    ]
    return list(dict.fromkeys(reasons))


def _late(
    by_node: Mapping[str, Sequence[PreflightReport]], tasks: int, *, waited_for: bool
) -> tuple[dict[str, list[str]], str | None]:
    """Blame the nodes that never reported or stayed behind the others, if those are few.

    Args:
        by_node: reports of each node.
        tasks: processes on each.
        waited_for: whether something else is wrong, so that the others could not go on.

    Returns:
        Node -> reasons, and why nobody is blamed although the checks did not end.
    """
    late = {node: found for node, said in by_node.items() if (found := _absent(said, tasks))}
    stuck = None
    blamed = dict(late)
    if late:
        # They count, but whether the node or what it waits for is slow cannot be told.
        late |= {node: [] for node in by_node if node not in late and _is_starting(by_node[node])}
    elif not waited_for:
        late, stuck = _behind(by_node)
        blamed = late
    if len(late) > max(1, len(by_node) / 2):
        return {}, (
            f"{len(late)} of {len(by_node)} nodes did not report in time: the file system, the "
            "container or PREFLIGHT_SECONDS"
        )
    return blamed, stuck


def _is_starting(found: Sequence[PreflightReport]) -> bool:
    return any(report.stage is Stage.STARTED for report in found)


def _absent(found: Sequence[PreflightReport], tasks: int) -> list[str]:
    missing = tasks - len(found)
    if missing <= 0:
        return []
    if not found:
        return ["never reported: the node, its network or its file system is down"]
    return [f"{missing} of {tasks} processes never reported"]


def _behind(
    by_node: Mapping[str, Sequence[PreflightReport]],
) -> tuple[dict[str, list[str]], str | None]:
    """The nodes that stayed behind the others, or why nobody stands out."""
    reached = {node: min(report.stage for report in found) for node, found in by_node.items()}
    last, first = max(reached.values()), min(reached.values())
    if first is Stage.DONE:
        return {}, None
    if first == last:
        where = ", ".join(reached)
        return {}, f"{where}: {_WAITING[first]} on any node; none of them stands out"
    return {node: [_WAITING[first]] for node, stage in reached.items() if stage == first}, None


def _majority(values: Mapping[str, str], by_node: Mapping[str, Sequence[PreflightReport]]) -> str:
    """The commonest value; of two equally common ones, that of the node with the lowest rank."""
    counts = Counter(values.values())

    def preference(value: str) -> tuple[int, int]:
        ranks = [
            report.rank for node in values if values[node] == value for report in by_node[node]
        ]
        return counts[value], -min(ranks)

    return max(counts, key=preference)


def _odd_versions(by_node: Mapping[str, Sequence[PreflightReport]]) -> dict[str, list[str]]:
    found: dict[str, dict[str, str]] = {}
    reporting = [node for node in by_node if any(report.versions for report in by_node[node])]
    for node in reporting:
        for report in by_node[node]:
            for package, version in report.versions.items():
                found.setdefault(package, {})[node] = version
    odd: dict[str, list[str]] = {}
    for package, versions in found.items():
        values = {node: versions.get(node, "missing") for node in reporting}
        usual = _majority(values, by_node)
        for node, version in values.items():
            if version != usual:
                odd.setdefault(node, []).append(f"{package} is {version}, elsewhere {usual}")
    return odd


def _odd_data(by_node: Mapping[str, Sequence[PreflightReport]]) -> dict[str, list[str]]:
    values = {
        node: report.data for node, found in by_node.items() for report in found if report.data
    }
    if not values:
        return {}
    usual = _majority(values, by_node)
    text = "data: its shards are not those of the other nodes"
    return {node: [text] for node, value in values.items() if value != usual}


def _on_every_node(said: Mapping[str, Sequence[str]]) -> list[str]:
    """The first node's reasons whose check fails on every node; numbers in them may differ."""
    checks = [{_check_of(reason) for reason in reasons} for reasons in said.values()]
    common = set.intersection(*checks, *([_SHARED] if len(checks) == 1 else []))
    return [reason for reason in next(iter(said.values())) if _check_of(reason) in common]


def _check_of(reason: str) -> str:
    return reason.partition(":")[0]


def _listed(notes: Mapping[str, str]) -> str:
    return "".join(f", {name} {text}" for name, text in notes.items())
