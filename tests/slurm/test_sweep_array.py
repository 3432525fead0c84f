"""``launch/sweep.sh`` on a real Slurm: an array of tasks, one of them requeued, and the report.

Workers and the check of shards are acted: what is tested are the jobs.
"""

from __future__ import annotations

import re
import shlex
import sys
from pathlib import Path

import pytest

from megatron_mup.transfer.runs import read_rows
from tests.slurm.cluster import Job, wait_until
from tests.slurm.site import Site
from tests.transfer.sweep.sweeps import write_sweep

pytestmark = pytest.mark.slurm


def requeue(site: Site, task: str) -> None:
    """Put a running task of an array back, with a shorter wait than Slurm's."""
    site.cluster.run("scontrol", "requeue", task)

    def started_again() -> bool:
        site.cluster.run("scontrol", "update", f"job={task}", "starttime=now+2", check=False)
        shown = site.cluster.run("scontrol", "--oneliner", "show", "job", task).stdout
        return "Restarts=1" in shown and "JobState=PENDING" not in shown

    wait_until(started_again, what=f"{task} starts again")


def states(records: list[Job]) -> dict[str, str]:
    return {each.task: each.state for each in records}


def test_a_requeued_task_goes_on_and_the_last_job_writes_the_report(
    cluster, tmp_path: Path
) -> None:
    site = Site(cluster, tmp_path)
    config = write_sweep(
        tmp_path,
        scale={"axis": "width", "values": [32]},
        learning_rate={"log2": [-8, -7, -6, -5]},
        seeds=[1],
    )
    out = site.work / "my sweep"
    # At its first start the first task does its work and then hangs.
    site.trouble(
        f"real=({shlex.join([sys.executable, '-m', 'tests.slurm.stub_sweep'])})\n"
        "export FAKE_WORKER_CALM=1\n"
        'if [[ "$*" == *"--task 1/2"* && ! -e $here/hung ]]; then\n'
        '    "${real[@]}" "$@"; touch "$here/hung"; exec sleep 600\n'
        "fi\n"
    )

    done = site.call("sweep.sh", str(config), str(out), "--workers", "1", TASKS="2")

    assert done.returncode == 0, done.stdout + done.stderr
    jobs = [int(number) for number in re.findall(r"job (\d+)", done.stdout)]
    wait_until((site.stand_in / "hung").exists, what="the first task has done its share")
    before = (out / "tasks/task-1.csv").read_text()
    requeue(site, f"{jobs[1]}_0")
    last = site.end(jobs[3])

    logs = "".join(path.read_text() for path in sorted(site.work.glob("slurm-*.out")))
    assert last.state == "COMPLETED", logs
    for array in jobs[1:3]:
        assert states(cluster.jobs(array)) == {"0": "COMPLETED", "1": "COMPLETED"}, logs
    (first,) = (each for each in cluster.jobs(jobs[1]) if each.task == "0")
    assert first.restarts == 1
    # The second start and the second array found nothing to do.
    assert (out / "tasks/task-1.csv").read_text() == before
    rows = read_rows(out / "runs.csv")
    assert sorted(row.log2_lr for row in rows) == [-8.0, -7.0, -6.0, -5.0]
    assert len(read_rows(out / "tasks/task-2.csv")) == 2
    assert (out / "report/report.html").is_file()


def test_nothing_waits_for_a_check_that_failed(cluster, tmp_path: Path) -> None:
    site = Site(cluster, tmp_path)
    (site.work / "sweep.yaml").write_text("name: 3\n")

    done = site.call("sweep.sh", "sweep.yaml", "out", TASKS="2")

    jobs = [int(number) for number in re.findall(r"job (\d+)", done.stdout)]
    check = site.end(jobs[0])
    assert (check.state, check.exit_code) == ("FAILED", 2)
    for job in jobs[1:]:
        cluster.wait_jobs(job, lambda record: record.state == "CANCELLED", "cancelled")
    assert "sweep.yaml: " in site.log("sweep-check", jobs[0])
    assert sorted(path.name for path in site.work.glob("slurm-*")) == [
        f"slurm-sweep-check-{jobs[0]}.out"
    ]
