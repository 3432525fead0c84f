"""What a rank writes during the preflight, and how it is read: one small file a rank.

The file is replaced at every stage, so that a rank that hangs or dies has said how far it came.
Must not import torch or megatron.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from enum import IntEnum
from pathlib import Path

from megatron_mup.data.publication import published

_LARGEST_FILE_BYTES = 1_000_000
_LONGEST_TEXT = 1000


class Stage(IntEnum):
    """How far a rank has come; larger is later."""

    STARTED = 0
    """Its process runs."""
    CHECKED = 1
    """Its machine was checked; it waits for the other ranks."""
    JOINED = 2
    """It met all other ranks; the all-reduce runs."""
    DONE = 3
    """Everything was checked."""


@dataclass(frozen=True, kw_only=True)
class PreflightReport:
    """What one rank found.

    Attributes:
        rank: global rank.
        local_rank: rank on its node.
        node: the scheduler's name of it, or the host name.
        stage: how far it came.
        failures: check -> what is wrong, in words.
        versions: package -> version; of local rank 0 only.
        data: digest of the training data's index and manifests; of local rank 0 only.
        device: what names this rank's GPU among the node's; None on a CPU.
        notes: measured numbers, in words.
    """

    rank: int
    local_rank: int
    node: str
    stage: Stage = Stage.STARTED
    failures: Mapping[str, str] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    data: str | None = None
    device: str | None = None
    notes: Mapping[str, str] = field(default_factory=dict)


def write_report(folder: Path, report: PreflightReport) -> None:
    """Replace this rank's file.

    Args:
        folder: of the attempt.
        report: what to say.

    Raises:
        OSError: the folder cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with published(folder / f"rank-{report.rank:05d}.json", synced=False) as stream:
        stream.write(json.dumps(asdict(report), indent=1).encode())


def read_reports(folder: Path) -> list[PreflightReport]:
    """The reports of an attempt, by rank; damaged ones are passed over, as if never written.

    Args:
        folder: of the attempt; may be missing.
    """
    found = []
    for path in sorted(folder.glob("rank-*.json")):
        try:
            with path.open("rb") as stream:
                data = json.loads(stream.read(_LARGEST_FILE_BYTES))
            report = PreflightReport(
                rank=int(data["rank"]),
                local_rank=int(data["local_rank"]),
                node=str(data["node"]),
                stage=Stage(data["stage"]),
                failures=_texts(data["failures"]),
                versions=_texts(data["versions"]),
                data=None if data["data"] is None else str(data["data"]),
                device=None if data["device"] is None else str(data["device"]),
                notes=_texts(data["notes"]),
            )
        except (OSError, ValueError, TypeError, LookupError, RecursionError, AttributeError):
            continue
        found.append(report)
    return found


def _texts(data: Mapping[object, object]) -> dict[str, str]:
    return {str(name): str(text)[:_LONGEST_TEXT] for name, text in data.items()}
