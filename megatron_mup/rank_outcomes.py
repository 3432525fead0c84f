"""How single ranks ended, as small files: the one exit code of a job cannot tell who failed first.

The launcher names a folder in ``FOLDER_VARIABLE``; a rank that ends with anything but success
leaves ``rank-00017.json`` there. ``launching.decision`` reads them. A rank that is killed leaves
nothing. Must not import torch or megatron.
"""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from megatron_mup.secrets import mask_text, secret_values

FOLDER_VARIABLE = "MEGATRON_MUP_OUTCOMES"
"""Environment variable with the folder of this attempt; without it nothing is written."""

_LONGEST_TEXT = 2000
_LARGEST_FILE_BYTES = 100_000


@dataclass(frozen=True, kw_only=True)
class RankOutcome:
    """How one rank ended.

    Attributes:
        rank: global rank.
        node: Slurm's name of its node, or the host name.
        exit_code: what its process says.
        reason: in words, first lines only.
        time: of the failure, seconds since 1970.
    """

    rank: int
    node: str
    exit_code: int
    reason: str
    time: float


def node_name(environment: Mapping[str, str] = os.environ) -> str:
    """The name by which the scheduler knows this machine, else its host name."""
    return environment.get("SLURMD_NODENAME") or socket.gethostname()


def tell_outcome(rank: int, exit_code: int, reason: str) -> None:
    """Leave a note of this rank's end, if the launcher asks for one; the first note stays.

    Args:
        rank: global rank.
        exit_code: what the process is going to say.
        reason: in words.
    """
    folder = os.environ.get(FOLDER_VARIABLE)
    if not folder:
        return
    outcome = RankOutcome(
        rank=rank,
        node=node_name(),
        exit_code=exit_code,
        # Masked before it is cut: half a secret has no known form.
        reason=mask_text(reason, secret_values(os.environ))[:_LONGEST_TEXT],
        time=time.time(),
    )
    target = Path(folder) / f"rank-{rank:05d}.json"
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    # A note must never replace the error that it is about.
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(json.dumps(asdict(outcome)), encoding="utf-8")
        os.link(temporary, target)
    except OSError:
        return
    finally:
        _remove(temporary)


def _remove(path: Path) -> None:
    try:
        path.unlink(missing_ok=True)
    except OSError:
        return


def read_outcomes(folder: Path) -> list[RankOutcome]:
    """The notes of an attempt, earliest first; damaged ones are passed over.

    Args:
        folder: of the attempt; may be missing.
    """
    found = []
    for path in sorted(folder.glob("rank-*.json")):
        try:
            with path.open("rb") as stream:
                data = json.loads(stream.read(_LARGEST_FILE_BYTES))
            outcome = RankOutcome(
                rank=int(data["rank"]),
                node=str(data["node"]),
                exit_code=int(data["exit_code"]),
                reason=str(data["reason"])[:_LONGEST_TEXT],
                time=float(data["time"]),
            )
        except (OSError, ValueError, TypeError, LookupError, RecursionError):
            continue
        found.append(outcome)
    return sorted(found, key=lambda outcome: outcome.time)
