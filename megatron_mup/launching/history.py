"""What a run folder remembers of its attempts, for ``megatron-mup status``.

Files may hold anything: what is not as expected is left out. Where a second job began on the folder
of one that trains, the run is that of the job which holds the lease. Must not import torch or
megatron.
"""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron_mup.config import FaultConfig
from megatron_mup.config_io import read_sections
from megatron_mup.errors import MupError
from megatron_mup.launching.attempts import DECIDE, JUDGE, Event, beginnings, read_events
from megatron_mup.launching.run_folder import RunFolder
from megatron_mup.status import read_json

# Spelled here as in checkpoint.lease, whose package brings torch, and seconds, with it.
_LEASE = "lease.json"
_LARGEST_LEASE_BYTES = 64 * 1024


@dataclass(frozen=True, kw_only=True)
class LaunchHistory:
    """A run's attempts.

    Attributes:
        save_folder: ``checkpoint.save``.
        problems: sentences; none means that nothing has to be mended.
        attempts: how many began.
        decision: what was to follow the last ended attempt, and why; None before the first end.
        decided: number of that attempt, if a newer one has begun since.
        failures: node -> how often it failed.
        excluded: nodes that the run avoids.
        snapshot: newest snapshot, below ``launch``.
        lr: peak learning rate.
        lr_source: where that comes from.
        others: attempts of other jobs than the one that trains, in words.
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
    others: tuple[str, ...] = ()
    decided: int | None = None

    @property
    def lines(self) -> list[str]:
        """The report for people."""
        restarts = max(0, self.attempts - 1)
        lines = [f"attempt {self.attempts:,}, {restarts:,} restarts"]
        if self.decision is not None:
            which = (
                "last decision"
                if self.decided is None
                else f"no decision on it yet; decision after attempt {self.decided:,}"
            )
            lines[0] += f"; {which}: {self.decision}"
        lines += self.others
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
                return _history(save, events, _owning_job(run))
        except (MupError, OSError):
            continue
    return None


def _owning_job(run: RunFolder) -> str | None:
    """The scheduler's id of the job that holds the save folder; None if none does for sure."""
    lease = run.save_folder / _LEASE
    try:
        age = time.time() - lease.stat().st_mtime
        job = read_json(lease, _LARGEST_LEASE_BYTES).get("job_id")
        section = read_sections(run.config).get("faults") if run.config.is_file() else None
    except (OSError, ValueError):
        return None
    limit = (section or {}).get("lease_timeout_seconds")
    if not isinstance(limit, int | float):
        limit = FaultConfig().lease_timeout_seconds
    return _text(job) if age <= limit else None


def _history(save: Path, events: list[Event], owner: str | None) -> LaunchHistory:
    begun = beginnings(events)
    owned = [event for event in begun if owner is not None and event.get("job") == owner]
    last = (owned or begun)[-1]
    others = begun[begun.index(last) + 1 :]
    strange = {event["attempt"] for event in others}
    decided = [event for event in events if event["event"] == DECIDE]
    failures: Counter[str] = Counter()
    excluded: set[str] = set()
    for event in decided:
        failures.update(_texts(event.get("charged")))
        excluded.update(_texts(event.get("excluded")))
    ends = [event for event in decided if event["attempt"] not in strange]
    return LaunchHistory(
        save_folder=save,
        problems=tuple(_problems(events, last["attempt"], ends)),
        attempts=len(begun),
        decision=_words(ends[-1]) if ends else None,
        decided=ends[-1]["attempt"] if ends and ends[-1]["attempt"] < last["attempt"] else None,
        failures=dict(sorted(failures.items())),
        excluded=tuple(sorted(excluded)),
        snapshot=_text(last.get("snapshot")),
        lr=last["lr"] if isinstance(last.get("lr"), int | float) else None,
        lr_source=_text(last.get("lr_source")),
        others=tuple(
            f"attempt {event['attempt']:,}, of job {event.get('job')}, does not train: job {owner} "
            "holds the folder"
            for event in others
        ),
    )


def _problems(events: list[Event], attempt: int, ends: list[Event]) -> list[str]:
    """What has to be mended after the latest attempt of the run."""
    problems = []
    if ends and ends[-1].get("decision") == "stop" and ends[-1]["attempt"] >= attempt:
        problems.append(f"the launch script gave up: {ends[-1].get('reason')}")
    judged = [event for event in events if event["event"] == JUDGE and event["attempt"] == attempt]
    found = judged[-1] if judged else {}
    problems += [f"every node failed the preflight: {t}" for t in _texts(found.get("everywhere"))]
    stuck = _text(found.get("stuck"))
    problems += [] if stuck is None else [f"the preflight did not end: {stuck}"]
    bad = found.get("bad_nodes")
    bad = bad if isinstance(bad, dict) else {}
    return problems + [f"node {node} failed the preflight: {text}" for node, text in bad.items()]


def _words(end: Event) -> str:
    return " ".join(f"{end.get('decision')} {end.get('reason') or ''}".split())


def _text(value: object) -> str | None:
    return value if isinstance(value, str) else None


def _texts(value: object) -> list[str]:
    return [item for item in value if isinstance(item, str)] if isinstance(value, list) else []
