"""A private, throw-away real Slurm on this machine: up, down, jobs, failing nodes.

All it writes lies in one folder, all it starts is a child of this process, so clusters live side
by side and a Slurm of the machine's own is not touched. Its jobs run with the tests' own rights.
Every command of Slurm has a time limit: some wait for ever on what cannot be satisfied.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from megatron_mup.os_processes import process_start
from tests.slurm.slurm_conf import Layout, write_configuration

ROOT = Path(__file__).parents[2]
COMMAND_SECONDS = 30
"""Longest run of one command of Slurm."""
PATIENCE_SECONDS = 120
"""Longest wait for anything that must happen."""

# Named one by one: states on the way there are many, and not all of them documented.
FINAL_STATES = {
    "BOOT_FAIL",
    "CANCELLED",
    "COMPLETED",
    "DEADLINE",
    "FAILED",
    "NODE_FAIL",
    "OUT_OF_MEMORY",
    "PREEMPTED",
    "TIMEOUT",
}
# Longest path of a Unix socket, with its closing zero byte: man 7 unix.
_SOCKET_PATH_BYTES = 108
_SYSTEM_FOLDERS = ("/usr/sbin", "/sbin")


def check_installed() -> None:
    """Raise RuntimeError that says what to install, if a command of Slurm is missing."""
    found = subprocess.run(
        [ROOT / "tools/find_slurm.sh"], capture_output=True, text=True, timeout=COMMAND_SECONDS
    )
    if found.returncode != 0:
        raise RuntimeError(found.stderr.strip())


def wait_until(
    condition: Callable[[], object], *, seconds: float = PATIENCE_SECONDS, what: str
) -> None:
    """Poll until a condition holds.

    Raises:
        TimeoutError: It names ``what`` was waited for.
    """
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"{what}: not after {seconds} s")
        time.sleep(0.1)


@dataclass(frozen=True, kw_only=True)
class Job:
    """What Slurm records of a job, or of one task of an array.

    ``fields`` has everything that ``scontrol show job`` prints.
    """

    fields: dict[str, str]

    @property
    def state(self) -> str:
        """RUNNING, COMPLETED, ..."""
        return self.fields["JobState"]

    @property
    def exit_code(self) -> int:
        """The batch script's exit code; 0 as well if a signal ended it."""
        return int(self.fields["ExitCode"].split(":")[0])

    @property
    def restarts(self) -> int:
        """How often it was requeued."""
        return int(self.fields["Restarts"])

    @property
    def nodes(self) -> str:
        """The nodes it ran on, as Slurm writes a list."""
        return self.fields["NodeList"]

    @property
    def task(self) -> str:
        """Its number in the array; a range while several wait, empty outside an array."""
        return self.fields.get("ArrayTaskId", "")


@dataclass
class Cluster:
    """A running Slurm; a context manager that starts and stops it.

    Attributes:
        folder: for everything that it writes; stays behind, with the logs.
        layout: its nodes.
        env: environment of its commands: this process's, without variables of another Slurm job.
    """

    folder: Path
    layout: Layout = field(default_factory=Layout)
    env: dict[str, str] = field(init=False, repr=False)
    _daemons: dict[str, subprocess.Popen[bytes]] = field(
        init=False, repr=False, default_factory=dict
    )

    def __post_init__(self) -> None:
        self.folder = self.folder.resolve()
        # The longest: a step's, whose batch script would otherwise never start, without a word.
        longest = self.folder / "spool/n16/n16_900999.4294967291"
        if len(os.fsencode(longest)) >= _SOCKET_PATH_BYTES:
            raise ValueError(
                f"{self.folder} is too long for a socket; pass pytest --basetemp /tmp/s"
            )
        slurms_own = ("SLURM", "SBATCH", "SRUN", "SALLOC", "SQUEUE", "SCANCEL", "SINFO")
        self.env = {k: v for k, v in os.environ.items() if not k.startswith(slurms_own)}
        self.env["PATH"] = os.pathsep.join([self.env.get("PATH", ""), *_SYSTEM_FOLDERS])
        self.env["SLURM_CONF"] = str(self.folder / "slurm.conf")

    def __enter__(self) -> Self:
        """Start it; returns when all live nodes are idle."""
        check_installed()
        for name in ("munge", "state", "run", "log", *(f"spool/{n}" for n in self.layout.names)):
            (self.folder / name).mkdir(parents=True)
        (self.folder / "munge").chmod(0o700)
        configuration = write_configuration(self.folder, self.layout)
        try:
            self._start_munge()
            self._start("slurmctld", ["slurmctld", "-D", "-f", str(configuration)])
            for node in self.layout.names:
                self.restart_node(node)
            self._wait_for_nodes()
        except BaseException:
            self.down()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        """Stop it."""
        self.down()

    def down(self) -> None:
        """End all jobs and every process of the cluster; may be called twice."""
        if "slurmctld" in self._daemons:
            # Jobs first: what runs a job outlives its node's slurmd.
            with contextlib.suppress(subprocess.SubprocessError, TimeoutError):
                self._end_jobs()
        for daemon in [*self.layout.names, "slurmctld", "munged"]:
            self._stop(daemon)
        self._kill_leftovers()

    def run(
        self, *command: str | Path, seconds: float = COMMAND_SECONDS, **options: Any
    ) -> subprocess.CompletedProcess[str]:
        """Run a command that talks to this cluster.

        Args:
            command: the command and its arguments.
            seconds: its time limit.
            options: more for ``subprocess.run``; ``check`` is true unless given.
        """
        settings = {"env": self.env, "check": True, "capture_output": True, "text": True} | options
        return subprocess.run(command, timeout=seconds, **settings)

    def submit(self, *arguments: str | Path, **options: Any) -> int:
        """Call sbatch with its options, a script and the script's arguments; returns the job."""
        done = self.run("sbatch", "--parsable", *arguments, **options)
        return int(done.stdout.split(";")[0])

    def jobs(self, job: int) -> list[Job]:
        """The records of a job: one, or one for each task of an array that has started."""
        shown = self.run("scontrol", "--oneliner", "show", "job", str(job)).stdout
        return [
            Job(fields=dict(re.findall(r"(?:^| )([A-Za-z/:]+)=(\S*)", line)))
            for line in shown.splitlines()
        ]

    def wait_job(self, job: int, *, seconds: float = PATIENCE_SECONDS) -> list[Job]:
        """Wait until a job, with all tasks of its array, has ended.

        Raises:
            TimeoutError: It has not; the message has its last states.
        """
        return self.wait_jobs(
            job, lambda each: each.state in FINAL_STATES, "to end", seconds=seconds
        )

    def wait_jobs(
        self,
        job: int,
        condition: Callable[[Job], bool],
        what: str,
        *,
        seconds: float = PATIENCE_SECONDS,
    ) -> list[Job]:
        """Wait until a condition holds for each record of a job.

        Raises:
            TimeoutError: It does not; the message has the last states.
        """
        deadline = time.monotonic() + seconds
        while True:
            records = self.jobs(job)
            if records and all(map(condition, records)):
                return records
            if time.monotonic() > deadline:
                states = [(each.task, each.state, each.fields["Reason"]) for each in records]
                raise TimeoutError(f"waited {seconds} s for job {job} {what}: {states}")
            time.sleep(0.1)

    def kill_node(self, node: str) -> None:
        """Let a node lose its power: its slurmd and all that it runs vanish at once.

        Slurm notices after SlurmdTimeout; ``fail_node`` tells it at once.
        """
        slurmd = self._daemons.pop(node)
        slurmd.kill()
        slurmd.wait()
        self._kill_leftovers(node)

    def fail_node(self, node: str) -> None:
        """Have Slurm take a node for dead, which requeues its jobs."""
        self.run("scontrol", "update", f"nodename={node}", "state=down", "reason=test")

    def restart_node(self, node: str) -> None:
        """Start the slurmd of a node."""
        self._start(node, ["slurmd", "-D", "-f", self.env["SLURM_CONF"], "-N", node])

    def leftovers(self, node: str | None = None) -> list[int]:
        """Process ids of what runs jobs, and of the jobs, on one node or on all."""
        found = []
        configuration = f"SLURM_CONF={self.env['SLURM_CONF']}"
        for entry in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                variables = (entry / "environ").read_bytes().decode(errors="replace").split("\0")
                names = [v.split("=", 1)[1] for v in variables if v.startswith("SLURMD_NODENAME=")]
                if configuration in variables and names and node in (None, *names):
                    found.append(int(entry.name))
        return [pid for pid in found if process_start(pid) is not None]

    def daemon_pids(self) -> list[int]:
        """Process ids of munged, slurmctld and the slurmds."""
        return [daemon.pid for daemon in self._daemons.values()]

    def _start(self, name: str, command: Sequence[str]) -> None:
        # Should the tests be killed, the kernel ends the daemons with them.
        tied = ["setpriv", "--pdeathsig", "KILL", *command]
        # Handed down to what runs the node's jobs, so that `leftovers` knows it.
        environment = self.env | ({"SLURMD_NODENAME": name} if name in self.layout.names else {})
        with (self.folder / "log" / f"{name}.out").open("ab") as output:
            self._daemons[name] = subprocess.Popen(
                tied,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )

    def _start_munge(self) -> None:
        folder = self.folder / "munge"
        (folder / "key").write_bytes(secrets.token_bytes(128))
        (folder / "key").chmod(0o600)
        paths = {"key-file": "key", "socket": "munge.sock", "pid-file": "munged.pid"}
        paths |= {"log-file": "munged.log", "seed-file": "seed"}
        options = [f"--{option}={folder / name}" for option, name in paths.items()]
        # --force: folders above may be open to others, as /tmp is.
        self._start("munged", ["munged", "--foreground", "--force", "--num-threads=2", *options])
        probe = ("munge", "--no-input", f"--socket={folder / 'munge.sock'}")
        wait_until(lambda: self.run(*probe, check=False).returncode == 0, what="munged answers")

    def _wait_for_nodes(self) -> None:
        def idle() -> bool:
            for name, daemon in self._daemons.items():
                if daemon.poll() is not None:
                    output = (self.folder / "log" / f"{name}.out").read_text(errors="replace")
                    raise RuntimeError(f"{name} ended at its start:\n{output[-3000:]}")
            count = self.run("sinfo", "-h", "-p", "live", "-t", "idle", "-o", "%D", check=False)
            return count.stdout.strip() == str(self.layout.nodes)

        wait_until(idle, what=f"{self.layout.nodes} nodes idle; logs in {self.folder / 'log'}")

    def _end_jobs(self) -> None:
        def listed(*options: str) -> list[str]:
            shown = self.run("squeue", "--noheader", "--format=%A", *options, seconds=5)
            return sorted(set(shown.stdout.split()))

        for how in ([], ["--signal=KILL"]):
            if jobs := listed():
                self.run("scancel", *how, *jobs, seconds=10, check=False)
        states = "--states=RUNNING,COMPLETING,SUSPENDED"
        wait_until(lambda: not listed(states), seconds=10, what="jobs end")

    def _stop(self, name: str) -> None:
        daemon = self._daemons.pop(name, None)
        if daemon is None:
            return
        daemon.terminate()
        try:
            daemon.wait(timeout=5)
        except subprocess.TimeoutExpired:
            daemon.kill()
            daemon.wait()

    def _kill_leftovers(self, node: str | None = None) -> None:
        def killed() -> bool:
            # Again until none is left: what is killed last may have started another meanwhile.
            pids = self.leftovers(node)
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            return not pids

        wait_until(killed, what="killed processes are gone")
