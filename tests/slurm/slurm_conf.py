"""Writes the configuration of a throw-away Slurm: no systemd, no cgroups, no accounting database.

Notation: a live node has a slurmd; a planned node has none and takes no job, but ``sbatch
--test-only`` judges requests against it. Checked with Slurm 22.05.
"""

from __future__ import annotations

import contextlib
import getpass
import os
import random
import socket
import stat
from dataclasses import dataclass
from pathlib import Path

CPUS_PER_NODE = 128
MEMORY_MIB_PER_NODE = 2_000_000
"""What a node claims to have, whatever this machine has: production requests pass unchanged."""

_CONTROLLER = """\
ClusterName=throwaway
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
CredType=cred/munge
# A requeued job waits for its old credential to expire, 120 s by default.
AuthInfo=cred_expire=5,socket={folder}/munge/munge.sock
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/run/slurmctld.pid
SlurmdPidFile={folder}/run/slurmd.%n.pid
SlurmctldLogFile={folder}/log/slurmctld.log
SlurmdLogFile={folder}/log/slurmd.%n.log
SlurmctldDebug=verbose
SlurmdDebug=verbose
# Neither cgroups nor systemd nor the right to change limits.
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
PropagateResourceLimits=NONE
MpiDefault=none
# Nodes claim more than the machine has.
SlurmdParameters=config_overrides
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
# Without a database, finished jobs stay visible for MinJobAge seconds.
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/filetxt
JobCompLoc={folder}/log/jobcomp.log
MinJobAge=3600
# Files and ports named after a job do not meet those of an earlier cluster's.
FirstJobId={first_job}
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_min_interval=0,sched_interval=1,bf_interval=1
KillWait=5
UnkillableStepTimeout=30
SlurmdTimeout=10
SlurmctldTimeout=10
ReturnToService=2
JobRequeue=1
# Refuse what no node can ever run; it would pend for ever.
EnforcePartLimits=ALL
GresTypes=gpu
PartitionName=live Nodes=n[1-{nodes}] Default=YES MaxTime=INFINITE State=UP
"""


@dataclass(frozen=True, kw_only=True)
class Layout:
    """The nodes of a cluster."""

    nodes: int = 2
    """Live nodes n1, n2, ... in the partition "live"."""

    gpus_per_node: int = 8
    """Fake GPUs of each node."""

    planned_nodes: int = 16
    """Nodes big1, big2, ... in the partition "big", for ``sbatch --test-only`` alone."""

    @property
    def names(self) -> list[str]:
        """Names of the live nodes."""
        return [f"n{number}" for number in range(1, self.nodes + 1)]


def write_configuration(folder: Path, layout: Layout) -> Path:
    """Write slurm.conf and the files it needs.

    Args:
        folder: the cluster's own folder; its sub-folders exist.
        layout: the nodes.

    Returns:
        The slurm.conf for ``SLURM_CONF``.
    """
    host = socket.gethostname().split(".")[0]
    controller_port, *ports = _free_ports(layout.nodes + 1)
    controller = _CONTROLLER.format(
        host=host,
        port=controller_port,
        user=getpass.getuser(),
        folder=folder,
        first_job=random.SystemRandom().randrange(1000, 900_000),
        nodes=layout.nodes,
    )
    (folder / "gres.conf").write_text(_gres(folder, layout))
    (folder / "cgroup.conf").write_text("")
    path = folder / "slurm.conf"
    path.write_text(controller + _nodes(host, ports, layout))
    return path


def _nodes(host: str, ports: list[int], layout: Layout) -> str:
    resources = f"CPUs={CPUS_PER_NODE} RealMemory={MEMORY_MIB_PER_NODE}"
    gres = f" Gres=gpu:{layout.gpus_per_node}" if layout.gpus_per_node else ""
    lines = [
        f"NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} "
        f"{resources}{gres} State=UNKNOWN"
        for name, port in zip(layout.names, ports, strict=True)
    ]
    if layout.planned_nodes:
        # Of all states only CLOUD lets --test-only accept a request for nodes without a slurmd.
        planned = f"big[1-{layout.planned_nodes}]"
        lines += [
            f"NodeName={planned} NodeHostname={host} NodeAddr=127.0.0.1 Port=1 "
            f"{resources}{gres} State=CLOUD",
            f"PartitionName=big Nodes={planned} MaxTime=INFINITE State=UP",
        ]
    return "\n".join(lines) + "\n"


def _gres(folder: Path, layout: Layout) -> str:
    if not layout.gpus_per_node:
        return ""
    devices = folder / "gpus"
    devices.mkdir(exist_ok=True)
    for number in range(layout.gpus_per_node):
        _make_device(devices / f"nvidia{number}")
    files = f"{devices}/nvidia[0-{layout.gpus_per_node - 1}]"
    lines = [f"NodeName={name} Name=gpu File={files}" for name in layout.names]
    if layout.planned_nodes:
        lines.append(
            f"NodeName=big[1-{layout.planned_nodes}] Name=gpu Count={layout.gpus_per_node}"
        )
    return "\n".join(lines) + "\n"


def _make_device(path: Path) -> None:
    # A device that acts as /dev/null: slurmd then hands out CUDA_VISIBLE_DEVICES as for a GPU. A
    # plain file, where devices may not be made, is schedulable, but the variable stays empty.
    with contextlib.suppress(PermissionError):
        os.mknod(path, 0o600 | stat.S_IFCHR, os.makedev(1, 3))
        return
    path.touch()


def _free_ports(count: int) -> list[int]:
    """Distinct free ports; one could be taken again before it is used, at worst a start fails."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]
