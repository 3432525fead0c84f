"""What a run folder remembers of its attempts, for ``megatron-mup status``.

Files may hold anything: what is not as expected is left out. Must not import torch or megatron.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron_mup.errors import MupError
from megatron_mup.launching.attempts import DECIDE, JUDGE, Event, beginnings, read_events
from megatron_mup.launching.run_folder import RunFolder


@dataclass(frozen=True, kw_only=True)
class LaunchHistory:
    """A run's attempts.

    Attributes:
        save_folder: ``checkpoint.save``.
        problems: sentences; none means that nothing has to be mended.
        attempts: how many began.
        decision: what was to follow the last ended attempt, and why; None before the first end.
        failures: node -> how often it failed.
        excluded: nodes that the run avoids.
        snapshot: newest snapshot, below ``launch``.
        lr: peak learning rate.
        lr_source: where that comes from.
    """

    save_folder: Path
    problems: tuple[str, ...]
    attempts: int
    decision: str | None
    failures: dict[str, int]
    excluded: tuple[str, ...]
    snapshot: str | None
    lr: float | None
    lr_source: str | None

    @property
    def lines(self) -> list[str]:
        """The report for people."""
        restarts = max(0, self.attempts - 1)
        lines = [f"attempt {self.attempts:,}, {restarts:,} restarts"]
        if self.decision is not None:
            lines[0] += f"; last decision: {self.decision}"
        if self.lr is not None:
            lines.append(f"learning rate {self.lr:g} by {self.lr_source or 'unknown'}")
        if self.failures:
            listed = ", ".join(f"{node} ({count})" for node, count in self.failures.items())
            lines.append(f"failed nodes: {listed}")
        if self.excluded:
            lines.append(f"excluded nodes: {', '.join(self.excluded)}")
        if self.snapshot is not None:
            lines.append(f"snapshot: launch/{self.snapshot}")
        return lines

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        data = {**asdict(self), "save_folder": str(self.save_folder)}
        del data["problems"]
        return data


def find_history(folder: Path) -> LaunchHistory | None:
    """The attempts of a run, if a launch script began it.

    Args:
        folder: the run folder, or its ``checkpoint.save`` directly below.
    """
    for root in (folder, folder.parent):
        run = RunFolder(root.absolute())
        try:
            events = read_events(run)
            save = run.save_folder
            # The parent's run may save elsewhere, and then this folder is not of it.
            if beginnings(events) and (root == folder or save.resolve() == folder.resolve()):
                return _history(save, events)
        except (MupError, OSError):
            continue
    return None


def _history(save: Path, events: list[Event]) -> LaunchHistory:
    begun = beginnings(events)
    last = begun[-1]
    decided = [event for event in events if event["event"] == DECIDE]
    failures: Counter[str] = Counter()
    excluded: set[str] = set()
    for event in decided:
        failures.update(_texts(event.get("charged")))
        excluded.update(_texts(event.get("excluded")))
    decision, problems = None, []
    if decided:
        end = decided[-1]
        decision = " ".join(f"{end.get('decision')} {end.get('reason') or ''}".split())
        if end.get("decision") == "stop" and end["attempt"] >= last["attempt"]:
            problems.append(f"the launch script gave up: {end.get('reason')}")
    judged = [event for event in events if event["event"] == JUDGE]
    if judged and judged[-1]["attempt"] == last["attempt"]:
        bad = judged[-1].get("bad_nodes")
        bad = bad if isinstance(bad, dict) else {}
        problems += [f"node {node} failed the preflight: {reason}" for node, reason in bad.items()]
    return LaunchHistory(
        save_folder=save,
        problems=tuple(problems),
        attempts=len(begun),
        decision=decision,
        failures=dict(sorted(failures.items())),
        excluded=tuple(sorted(excluded)),
        snapshot=_text(last.get("snapshot")),
        lr=last["lr"] if isinstance(last.get("lr"), int | float) else None,
        lr_source=_text(last.get("lr_source")),
    )


def _text(value: object) -> str | None:
    return value if isinstance(value, str) else None


def _texts(value: object) -> list[str]:
    return [item for item in value if isinstance(item, str)] if isinstance(value, list) else []
