"""A place to launch training from: a copy of the launch scripts, a command, and its call log."""

from __future__ import annotations

import json
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_mup.checkpoint.record import make_record
from megatron_mup.config_io import load_config
from tests.data.written_shards import write_shard
from tests.slurm.cluster import (
    FINAL_STATES,
    PATIENCE_SECONDS,
    ROOT,
    Cluster,
    Job,
    wait_until,
)

_STAND_IN = Path(__file__).with_name("stub_megatron_mup.sh")
PYTHON = (sys.executable, "-m", "megatron_mup")
"""The command of this checkout, whichever one the environment has installed."""


@dataclass(frozen=True)
class Call:
    """One call of the command.

    Attributes:
        start: job and number of restarts, as ``JOB.RESTARTS``.
        node: where, "none" outside Slurm.
        rank: the process's.
        command: ``train``, ``launch begin``, ...
    """

    start: str
    node: str
    rank: int
    command: str


class Site:
    """A copy of the launch scripts in a folder of its own, and a folder to call them from."""

    def __init__(self, cluster: Cluster, folder: Path, *, acted: Sequence[str] = ()) -> None:
        """Lay it out.

        Args:
            cluster: where the jobs run.
            folder: an empty one.
            acted: commands that a stand-in takes the place of: ``train``, ``launch preflight``.
        """
        self.cluster, self.folder = cluster, folder
        self.work = folder / "work"
        # Spaces, as in names of real folders.
        self.launch_folder = folder / "the project/launch"
        shutil.copytree(ROOT / "launch", self.launch_folder)
        (self.launch_folder / "env").unlink(missing_ok=True)
        self.stand_in = folder / "bin"
        for each in (self.work, self.stand_in / "environments", self.stand_in / "ended"):
            each.mkdir(parents=True)
        command: Path = shutil.copy(_STAND_IN, self.stand_in / "megatron-mup")
        torchrun = self.stand_in / "torchrun"
        agent = shlex.join([sys.executable, "-m", "torch.distributed.run"])
        torchrun.write_text(f'#!/bin/bash\nexec {agent} "$@"\n')
        for each in (command, torchrun):
            each.chmod(0o755)
        trainer = shlex.join([sys.executable, "-m", "tests.slurm.stub_trainer"])
        (self.stand_in / "settings").write_text(
            f"real=({shlex.join(PYTHON)})\ntrainer=({trainer})\n"
            f"acted='{' '.join(each.replace(' ', '-') for each in acted)}'\n"
            f"export PYTHONPATH={shlex.quote(str(ROOT))} PYTHONWARNINGS=ignore\n"
        )
        (self.stand_in / "calls").touch()
        # All nodes are this machine.
        self.settings(f"MEGATRON_MUP={shlex.quote(str(command))}\nexport GLOO_SOCKET_IFNAME=lo\n")

    def settings(self, lines: str) -> None:
        """Append lines to the site's ``launch/env``."""
        with (self.launch_folder / "env").open("a") as stream:
            stream.write(lines)

    def trouble(self, lines: str) -> None:
        """Have every later call of the command run a few lines of bash first.

        They know ``rank``, ``node``, ``start`` (JOB.RESTARTS) and ``command``.
        """
        (self.stand_in / "trouble").write_text(lines)

    def prepare_record(self, config: str, *overrides: str) -> None:
        """Write the record that checkpoints of the acted training keep.

        Args:
            config: name of the launch configuration.
            overrides: ``key=value``.
        """
        run = load_config(ROOT / "launch/configs" / config, overrides)
        (self.stand_in / "record.json").write_text(json.dumps(make_record(run)))

    def script(self, name: str) -> Path:
        """A launch script."""
        return self.launch_folder / name

    def submit(
        self, script: str, *arguments: str, options: Sequence[str] = (), **environment: str
    ) -> int:
        """Call sbatch with a script; returns the job.

        Args:
            script: its name.
            arguments: the script's own.
            options: sbatch's.
            environment: variables that the user sets.
        """
        command = (*options, self.script(script), *arguments)
        return self.cluster.submit(*command, cwd=self.work, env=self._environment | environment)

    def call(
        self, script: str, *arguments: str, **environment: str
    ) -> subprocess.CompletedProcess[str]:
        """Call a script by bash, as on a login node or where there is no Slurm."""
        command = ("bash", self.script(script), *arguments)
        env = self._environment | environment
        return self.cluster.run(*command, seconds=300, cwd=self.work, env=env, check=False)

    @property
    def _environment(self) -> dict[str, str]:
        """This process's, without what the launch scripts are to set by themselves."""
        settled = ("OMP_", "CUDA_", "NCCL_", "TORCH_", "MASTER_", "MEGATRON_MUP")
        return {k: v for k, v in self.cluster.env.items() if not k.startswith(settled)}

    def log(self, name: str, job: int) -> str:
        """The output of a job, by its name and number."""
        return (self.work / f"slurm-{name}-{job}.out").read_text()

    def calls(self, command: str | None = None) -> list[Call]:
        """Calls of the command so far, in order."""
        lines = (self.stand_in / "calls").read_text().splitlines()
        split = [line.split(" ", 3) for line in lines]
        found = [Call(start, node, int(rank), words) for start, node, rank, words in split]
        return [call for call in found if command in (None, call.command)]

    def environments(self, start: str, command: str) -> dict[int, dict[str, str]]:
        """The variables of each rank that a stand-in saw in one start of a job, by rank."""
        found = (self.stand_in / "environments").glob(f"{start}.{command.replace(' ', '-')}.*")
        return {int(path.suffix[1:]): _variables(path) for path in found}

    def wait_for(self, path: Path, text: str, *, job: int) -> None:
        """Wait until a file holds a text, as long as a job has not ended."""

        def holds() -> bool:
            if path.exists() and text in path.read_text(errors="replace"):
                return True
            (record,) = self.cluster.jobs(job)
            assert record.state not in FINAL_STATES, f"job {job} is {record.state}"
            return False

        wait_until(holds, what=f"'{text}' in {path}")

    def end(self, job: int) -> Job:
        """Wait until a job has ended; returns its record."""
        return self._wait(job, lambda record: record.state in FINAL_STATES, "to end")

    def wait_restarts(self, job: int, number: int, *, seconds: float = PATIENCE_SECONDS) -> None:
        """Wait until a job has been put back so many times."""
        self._wait(
            job,
            lambda record: record.restarts >= number and record.state == "RUNNING",
            f"to start for the {number}th time again",
            seconds=seconds,
        )

    def _wait(
        self,
        job: int,
        condition: Callable[[Job], bool],
        what: str,
        *,
        seconds: float = PATIENCE_SECONDS,
    ) -> Job:
        """Wait for a job, with shorter waits before its restarts than Slurm's."""
        hurried = set()

        def holds(record: Job) -> bool:
            waits = record.state == "PENDING" and record.fields["Reason"] == "BeginTime"
            if waits and record.restarts not in hurried:
                hurried.add(record.restarts)
                # A credential of the same second would count as revoked with the last start's.
                change = (f"job={job}", "starttime=now+2")
                self.cluster.run("scontrol", "update", *change, check=False)
            return condition(record)

        (record,) = self.cluster.wait_jobs(job, holds, what, seconds=seconds)
        return record


def _variables(path: Path) -> dict[str, str]:
    lines = path.read_text().split("\0")
    return dict(line.split("=", 1) for line in lines if "=" in line)


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Objects of a file of JSON lines."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def write_shards(folder: Path) -> tuple[str, ...]:
    """Write small shards below a folder; returns the overrides that name them.

    Each document is a row of 200 tokens between 3 and 280, and one that ends it.
    """
    documents = [[*range(start, start + 200), 1] for start in range(3, 80)]
    names = [write_shard(folder / "shards" / split, documents) for split in ("train", "valid")]
    return (f"data.train_data_path=[{names[0]}]", f"data.valid_data_path=[{names[1]}]")
