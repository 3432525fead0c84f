"""Names inside a run folder, which attempt a process belongs to, and how far the run has come.

    DIR/checkpoints            checkpoint.save, unless the configuration names another folder
    DIR/metrics.jsonl          logging.metrics_path, likewise
    DIR/launch/config.yaml     the configuration that the ranks read
    DIR/launch/attempts.jsonl  what happened, one event a line; see ``attempts``
    DIR/launch/snapshot        code, configuration, packages and table of the first attempt
    DIR/launch/preflight/0001  reports of the ranks of attempt 1; see ``preflight_report``
    DIR/launch/outcomes/0001   how ranks of attempt 1 failed; see ``rank_outcomes``

Must not import torch or megatron.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from megatron_mup.config_io import read_sections
from megatron_mup.errors import ConfigError

ATTEMPT_VARIABLE = "MEGATRON_MUP_ATTEMPT"
"""Environment variable with the number of the attempt that a process belongs to."""

# Spelled here as in checkpoint.integrity, whose package brings torch, and seconds, with it.
_CHECKPOINT = re.compile(r"iter_([0-9]{7,18})")
_CHECKSUMS = "checksums.json"


@dataclass(frozen=True)
class RunFolder:
    """The folder of one run.

    Attributes:
        root: DIR of ``--run-dir``, absolute.
    """

    root: Path

    @property
    def launch(self) -> Path:
        """Everything that belongs to launching."""
        return self.root / "launch"

    @property
    def config(self) -> Path:
        """The resolved configuration."""
        return self.launch / "config.yaml"

    @property
    def attempts(self) -> Path:
        """The list of events."""
        return self.launch / "attempts.jsonl"

    def preflight(self, attempt: int) -> Path:
        """Folder of the ranks' reports."""
        return self.launch / "preflight" / f"{attempt:04d}"

    def outcomes(self, attempt: int) -> Path:
        """Folder of the ranks' ends."""
        return self.launch / "outcomes" / f"{attempt:04d}"

    @property
    def save_folder(self) -> Path:
        """``checkpoint.save`` of the resolved configuration; the usual place without one."""
        usual = self.root / "checkpoints"
        if not self.config.is_file():
            return usual
        section = read_sections(self.config).get("checkpoint") or {}
        return Path(section.get("save") or usual)

    def newest_checkpoint(self) -> int | None:
        """Iteration of the newest whole checkpoint; None without one."""
        found = []
        for path in self.save_folder.glob(f"iter_*/{_CHECKSUMS}"):
            match = _CHECKPOINT.fullmatch(path.parent.name)
            if match:
                found.append(int(match[1]))
        return max(found, default=None)


def existing_run_folder(folder: Path) -> RunFolder:
    """The run folder that an earlier ``launch begin`` made.

    Args:
        folder: DIR of ``--run-dir``.

    Raises:
        ConfigError: nothing has begun there.
    """
    found = RunFolder(folder.absolute())
    if not found.attempts.is_file():
        raise ConfigError(
            f"--run-dir '{folder}' holds no {found.attempts.relative_to(found.root)}: "
            "'megatron-mup launch begin' comes first, with the same --run-dir"
        )
    return found


def attempt_of_process(environment: Mapping[str, str] = os.environ) -> int | None:
    """The attempt that ``launch begin`` named to this process; None if it did not."""
    text = environment.get(ATTEMPT_VARIABLE, "")
    return int(text) if text.isdecimal() and int(text) > 0 else None
