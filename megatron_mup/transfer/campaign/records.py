"""One file for each stage that is through, with a digest of all that it depends on.

A stage whose digest is on record need not run again; anything that changed it makes it run.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_mup.data.publication import publish_text


@dataclass(frozen=True)
class Records:
    """The stages of a campaign's folder.

    Attributes:
        folder: of their files.
    """

    folder: Path

    def is_done(self, stage: str, inputs: Any) -> bool:
        """Whether the stage ended well with these inputs.

        Args:
            stage: its name.
            inputs: plain data that its result depends on.
        """
        return self._read(stage).get("inputs_sha256") == digest(inputs)

    def result(self, stage: str) -> dict[str, Any]:
        """What ``write`` kept of the stage; empty if it is not on record."""
        result = self._read(stage).get("result")
        return result if isinstance(result, dict) else {}

    def _read(self, stage: str) -> dict[str, Any]:
        try:
            record = json.loads(self._file(stage).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return record if isinstance(record, dict) else {}

    def write(self, stage: str, inputs: Any, result: Any) -> None:
        """Keep that a stage ended well, and ``result`` for readers."""
        self.folder.mkdir(parents=True, exist_ok=True)
        record = {"stage": stage, "inputs_sha256": digest(inputs), "result": result}
        publish_text(self._file(stage), json.dumps(record, indent=1) + "\n")

    def drop(self, stage: str) -> None:
        """Forget a stage."""
        self._file(stage).unlink(missing_ok=True)

    def _file(self, stage: str) -> Path:
        return self.folder / f"{stage}.json"


def digest(inputs: Any) -> str:
    """SHA-256 of plain data."""
    return hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()
