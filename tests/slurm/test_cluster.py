"""The throw-away Slurm behaves as the tests of launch scripts need it to."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_mup.os_processes import process_start
from tests.slurm.cluster import ROOT, Cluster, wait_until
from tests.slurm.slurm_conf import Layout

pytestmark = pytest.mark.slurm

# Holds a cluster and never lets it go by itself.
HOLDER = """
import sys
from pathlib import Path
from tests.slurm.cluster import Cluster
from tests.slurm.slurm_conf import Layout

with Cluster(Path(sys.argv[1]), Layout(nodes=1)) as cluster:
    print(*cluster.daemon_pids(), flush=True)
    sys.stdin.read()
"""


def script(folder: Path, text: str) -> Path:
    path = folder / "job.sh"
    path.write_text(f"#!/bin/bash\n{text}\n")
    return path


def running(pids: list[int]) -> list[int]:
    return [pid for pid in pids if process_start(pid) is not None]


def test_a_cluster_leaves_no_process_and_does_not_disturb_one_beside_it(
    cluster, tmp_path, tmp_path_factory
):
    # A test's own folder bears its name, which is too long for sockets below it.
    folder = tmp_path_factory.mktemp("two")
    started = tmp_path / "started"
    job = script(
        tmp_path,
        f"trap '' TERM\nsleep 601 & other=$!\necho $$ $other >{started}.tmp\n"
        f"mv {started}.tmp {started}\nsleep 602",
    )
    with Cluster(folder, Layout(nodes=1, gpus_per_node=0, planned_nodes=0)) as other:
        number = other.submit(f"--output={tmp_path / 'log'}", job)
        wait_until(started.exists, what=f"start of {other.jobs(number)}")
        jobs_own = [int(pid) for pid in started.read_text().split()]
        assert set(jobs_own) < set(other.leftovers())
        pids = other.daemon_pids() + other.leftovers()
        assert other.run("srun", "-n1", "echo", "1").stdout == "1\n"

    assert running(pids) == []
    assert other.leftovers() == []
    assert len(running(cluster.daemon_pids())) == 4
    assert cluster.run("srun", "-N2", "echo", "2").stdout == "2\n2\n"


def test_the_daemons_end_when_the_tests_are_killed(installed_slurm, tmp_path_factory):
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, tmp_path_factory.mktemp("held")],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert holder.stdout is not None
    pids = [int(pid) for pid in holder.stdout.readline().split()]
    assert len(running(pids)) == 3

    holder.send_signal(signal.SIGKILL)
    holder.communicate()

    wait_until(lambda: running(pids) == [], what="end of the daemons")


def test_a_job_after_an_array_runs_though_a_task_failed_and_sees_all_output(cluster, tmp_path):
    task = script(tmp_path, 'echo "$SLURM_ARRAY_TASK_ID" >out.$1\nexit $(($1 == 1 ? 7 : 0))')
    array = cluster.submit(
        *("--array=0-3", "--exclusive", "--output=/dev/null"),
        *(f"--chdir={tmp_path}", "--wrap", f"bash {task} $SLURM_ARRAY_TASK_ID"),
    )
    after = cluster.submit(
        f"--dependency=afterany:{array}",
        f"--chdir={tmp_path}",
        "--output=all",
        *("--wrap", "cat out.*"),
    )

    tasks = {each.task: each for each in cluster.wait_job(array)}

    assert [each.state for each in cluster.wait_job(after)] == ["COMPLETED"]
    assert {number: (each.state, each.exit_code) for number, each in tasks.items()} == {
        "0": ("COMPLETED", 0),
        "1": ("FAILED", 7),
        "2": ("COMPLETED", 0),
        "3": ("COMPLETED", 0),
    }
    assert {each.nodes for each in tasks.values()} == {"n1", "n2"}
    assert (tmp_path / "all").read_text() == "0\n1\n2\n3\n"


def test_a_job_of_a_node_that_dies_starts_again_on_another_and_the_node_comes_back(
    cluster, tmp_path
):
    # Waits for ever at its first start alone.
    started = tmp_path / "started"
    job = script(
        tmp_path, f"[[ -n ${{SLURM_RESTART_COUNT:-}} ]] || {{ touch '{started}'; sleep 600; }}"
    )
    number = cluster.submit("--requeue", "--exclusive", "--output=/dev/null", job)
    node = cluster.wait_jobs(number, lambda each: each.state == "RUNNING", "to run")[0].nodes
    # A node that dies before it has begun the script costs a restart more.
    wait_until(started.exists, what="start of the script")

    cluster.kill_node(node)
    assert cluster.leftovers(node) == []
    cluster.fail_node(node)
    (ended,) = cluster.wait_job(number)
    cluster.restart_node(node)

    assert (ended.state, ended.restarts) == ("COMPLETED", 1)
    assert {node, ended.nodes} == {"n1", "n2"}
    shown = ("sinfo", "-h", "-p", "live", "-t", "idle", "-o", "%D")
    wait_until(lambda: cluster.run(*shown).stdout == "2\n", what="the node is back")


def test_a_job_gets_the_gpus_it_asks_for(cluster):
    show = "echo $SLURM_GPUS_ON_NODE $CUDA_VISIBLE_DEVICES"
    # Only root can make a device that passes for a GPU.
    devices = " 0,1,2" if (cluster.folder / "gpus/nvidia0").is_char_device() else ""

    shown = cluster.run("srun", "--gpus-per-node=3", "bash", "-c", show).stdout

    assert shown == f"3{devices}\n"


@pytest.mark.parametrize(
    ("options", "code"),
    [
        (("--nodes=16", "--ntasks-per-node=8", "--gpus-per-node=8", "--cpus-per-task=16"), 0),
        (("--nodes=17",), 1),
        (("--gpus-per-node=9",), 1),
        (("--ntasks-per-node=8", "--cpus-per-task=17"), 1),
    ],
)
def test_requests_are_judged_against_nodes_that_do_not_run(cluster, tmp_path, options, code):
    job = script(tmp_path, "true")
    judged = cluster.run("sbatch", "--test-only", "--partition=big", *options, job, check=False)

    assert judged.returncode == code, judged.stderr


def test_a_command_that_waits_is_cut_off(cluster):
    with pytest.raises(subprocess.TimeoutExpired):
        cluster.run("srun", "-N2", "sleep", "2", seconds=0.5)


def test_variables_of_a_job_around_the_tests_do_not_reach_the_cluster(
    tmp_path_factory, monkeypatch
):
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SBATCH_PARTITION", "elsewhere")

    env = Cluster(tmp_path_factory.mktemp("c")).env

    assert [name for name in env if name.startswith(("SLURM", "SBATCH"))] == ["SLURM_CONF"]


def test_a_folder_too_long_for_a_socket_is_refused(tmp_path):
    with pytest.raises(ValueError, match="too long for a socket"):
        Cluster(tmp_path / ("long" * 30))
