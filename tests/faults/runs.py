"""Runs that the fault tests hurt, and what an unhurt one gives."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from megatron_mup.training.metrics import read_metrics
from tests.faults.command_line import Process, Starter

TRAIN_ITERS = 24


@dataclass(frozen=True)
class Run:
    """One run in a folder of its own, started as often as it takes."""

    starter: Starter
    config: Path
    folder: Path

    @property
    def checkpoints(self) -> Path:
        return self.folder / "checkpoints"

    @property
    def arguments(self) -> list[str]:
        """What a launcher would start again and again."""
        return [
            "train",
            "--config",
            str(self.config),
            f"checkpoint.save={self.checkpoints}",
            f"checkpoint.load={self.checkpoints}",
            f"logging.metrics_path={self.folder}/metrics.jsonl",
        ]

    def start(self, *options: str, log: str = "log", **job: object) -> Process:
        """Start or continue the run."""
        output = self.folder / log
        return self.starter.start(*self.arguments, *options, output=output, **job)

    def start_ranks(self, ranks: int, *options: str) -> list[Process]:
        """Start or continue the run on several ranks."""
        return self.starter.start_ranks(*self.arguments, *options, folder=self.folder, ranks=ranks)

    @property
    def losses(self) -> dict[int, float]:
        """Loss of every iteration, the last word of each, with all digits."""
        rows = read_metrics(self.folder / "metrics.jsonl")
        return {int(row["iteration"]): row["lm loss"] for row in rows if "lm loss" in row}

    @property
    def status(self) -> dict[str, object]:
        """What the run last said of itself."""
        loaded: dict[str, object] = json.loads((self.checkpoints / "status.json").read_text())
        return loaded

    def saved(self) -> list[int]:
        """Iterations of the published checkpoints."""
        folders = self.checkpoints.glob("iter_???????")
        return sorted(int(folder.name.removeprefix("iter_")) for folder in folders)

    def begun(self) -> int:
        """The last iteration whose save has begun; 0 before the first."""
        folders = self.checkpoints.glob("iter_*")
        return max((int(folder.name[5:12]) for folder in folders), default=0)

    def being_saved(self) -> bool:
        """Whether a save has begun that is not published."""
        return any(self.checkpoints.glob("iter_*.tmp"))
