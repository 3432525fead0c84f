"""What the tests of ``launch/preprocess.sh`` share: a project, launching it, comparing outputs."""

from __future__ import annotations

import hashlib
import re
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

from tests.slurm.cluster import ROOT, Cluster, Job

MEGATRON_MUP = Path(sys.executable).parent / "megatron-mup"

# Notes each call, obeys `trouble`, lines of bash that a test may write, then runs the command.
_COMMAND = """#!/bin/bash
printf '%s\\n' "$*" >>"{folder}/calls"
if [[ -e "{folder}/trouble" ]]; then source "{folder}/trouble"; fi
exec {command} "$@"
"""


def output_digests(prefix: Path) -> dict[str, str]:
    """SHA-256 of each file that belongs to an output prefix, by name; a folder counts as one."""
    return {
        path.name: "folder" if path.is_dir() else hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(prefix.parent.glob(f"{prefix.name}*"))
    }


@dataclass(frozen=True)
class Launched:
    """The jobs of one launch."""

    array: int
    finish: int
    logs: Path

    def log(self, name: str) -> str:
        """Contents of a log."""
        return (self.logs / name).read_text()

    def all_logs(self) -> str:
        """Contents of all logs of this launch."""
        paths = [
            p for p in self.logs.iterdir() if re.search(f"-({self.array}|{self.finish})", p.name)
        ]
        return "".join(f"--- {path.name}\n{path.read_text()}" for path in sorted(paths))


class Project:
    """A copy of the launch scripts in a folder of its own, and a folder to call them from."""

    def __init__(self, cluster: Cluster, folder: Path, *, command: str | Path) -> None:
        """Lay it out.

        Args:
            cluster: where the jobs run.
            folder: an empty one.
            command: what megatron-mup is; the launch scripts see a wrapper that notes its calls.
        """
        self.cluster, self.folder = cluster, folder
        self.work = folder / "work"
        self.work.mkdir()
        # A space, as in names of real folders.
        self.launch_folder = folder / "the project/launch"
        shutil.copytree(ROOT / "launch", self.launch_folder)
        wrapper = folder / "megatron-mup"
        wrapper.write_text(_COMMAND.format(folder=folder, command=command))
        wrapper.chmod(0o755)
        (folder / "calls").touch()
        # On two nodes that both do something: a task has its node to itself.
        (self.launch_folder / "env").write_text(
            f"MEGATRON_MUP={wrapper}\nSITE_OPTIONS=(--exclusive)\nexport OMP_NUM_THREADS=1\n"
        )

    @property
    def script(self) -> Path:
        """The script under test."""
        return self.launch_folder / "preprocess.sh"

    def trouble(self, lines: str) -> None:
        """Have every later call of the command run a few lines of bash first."""
        (self.folder / "trouble").write_text(lines)

    def calls(self) -> list[str]:
        """The arguments of each call of the command so far."""
        return (self.folder / "calls").read_text().splitlines()

    def launch(self, *arguments: str, parts: int) -> Launched:
        """Call the script on the login node."""
        environment = self.cluster.env | {"PARTS": str(parts), "WORKERS": "1"}
        done = self.cluster.run("bash", self.script, *arguments, cwd=self.work, env=environment)
        return launched(done.stdout)

    def finish(self, jobs: Launched) -> Job:
        """Wait for the last job, at most two minutes; returns its record."""
        (record,) = self.cluster.wait_job(jobs.finish, seconds=120)
        return record


def launched(text: str) -> Launched:
    """Read what the script prints."""
    found = re.search(r"parts: +job (\d+), .*\nfinish: job (\d+) .*\nlogs: +(.*)\n", text)
    assert found is not None, text
    return Launched(int(found[1]), int(found[2]), Path(found[3]))
