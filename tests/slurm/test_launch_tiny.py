"""``launch/mup_tiny.sh`` really trains: on this machine by torchrun, on two nodes by srun."""

from __future__ import annotations

import os
import re
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest

from tests.slurm.cluster import Cluster
from tests.slurm.site import Site, read_lines

pytestmark = pytest.mark.slurm

LENGTH = 100
OPTIONS = (f"train_iters={LENGTH}", "lr_warmup_iters=4", "save_interval=1000", "log_interval=1")


def steps(run_folder: Path) -> list[dict[str, Any]]:
    """The lines of the metrics about a step, in the file's order."""
    return [row for row in read_lines(run_folder / "metrics.jsonl") if "lm loss" in row]


def curve(run_folder: Path) -> list[tuple[int, float, float]]:
    """Iteration, samples seen by then, and loss with all its digits."""
    return [
        (row["iteration"], row["consumed-samples"], row["lm loss"]) for row in steps(run_folder)
    ]


@pytest.fixture(scope="module")
def alone(cluster, tmp_path_factory) -> Path:
    """The run folder of two ranks on this machine, without a job."""
    site = Site(cluster, tmp_path_factory.mktemp("alone"))
    done = site.call("mup_tiny.sh", *OPTIONS)
    assert done.returncode == 0, done.stdout + done.stderr
    return site.work / "runs/mup_tiny"


@pytest.fixture
def site(cluster, tmp_path, alone) -> Site:
    """Where the shards are made already."""
    site = Site(cluster, tmp_path)
    shutil.copytree(alone / "data", site.work / "runs/mup_tiny/data")
    return site


def rank_on(cluster: Cluster, node: str) -> int:
    """Process id of the rank that trains on a node."""
    for pid in cluster.leftovers(node):
        command = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
        if command[1:4] == [b"-m", b"megatron_mup", b"train"]:
            return pid
    raise AssertionError(f"nothing trains on {node}")


def test_without_a_job_two_ranks_train_to_the_end(alone):
    done = steps(alone)

    # A batch is 16 samples of 64 tokens.
    assert [row["iteration"] for row in done] == list(range(1, LENGTH + 1))
    assert [row["consumed-samples"] for row in done] == [16 * n for n in range(1, LENGTH + 1)]
    # An untrained model is about as good as a guess: ln 512 = 6.24.
    assert done[0]["lm loss"] == pytest.approx(6.24, abs=0.1)
    assert done[-1]["lm loss"] < 5


def test_without_a_job_one_process_trains_too(site):
    options = (*OPTIONS[1:], "train_iters=5")

    done = site.call("mup_tiny.sh", *options, GPUS_PER_NODE="1", PREFLIGHT_SECONDS="0")

    assert done.returncode == 0, done.stdout + done.stderr
    assert [row["iteration"] for row in steps(site.work / "runs/mup_tiny")] == [1, 2, 3, 4, 5]


def test_a_run_that_is_signalled_and_requeued_ends_where_the_uninterrupted_one_does(site, alone):
    folder = site.work / "runs/mup_tiny"
    job = site.submit("mup_tiny.sh", *OPTIONS)
    site.wait_for(folder / "metrics.jsonl", '"iteration": 5,', job=job)

    site.cluster.run("scancel", "--batch", "--signal=USR1", str(job))
    ended = site.end(job)

    log = site.log("mup_tiny", job)
    assert (ended.state, ended.restarts, ended.nodes) == ("COMPLETED", 1, "n[1-2]"), log
    # The second start went on where the first one saved, in the same log.
    starts = re.findall(
        r"holds no checkpoint: starting from scratch|checkpoints' at iteration", log
    )
    assert len(starts) == 2, log
    assert starts[0].endswith("starting from scratch")
    # Each iteration once, with the samples and, bit for bit, the loss of the uninterrupted run.
    assert curve(folder) == curve(alone)


@pytest.mark.slow
def test_a_hung_rank_and_a_dead_node_cost_only_the_steps_since_the_last_checkpoint(site, alone):
    folder, cluster = site.work / "runs/mup_tiny", site.cluster
    # Twenty seconds, more than ranks that start together wait for each other.
    short = ("distributed_timeout_minutes=0.33", "faults.lease_timeout_seconds=15")
    job = site.submit("mup_tiny.sh", *OPTIONS, *short, "save_interval=10")
    site.wait_for(folder / "metrics.jsonl", '"iteration": 12,', job=job)

    os.kill(rank_on(cluster, "n2"), signal.SIGSTOP)
    # Srun ends the hung rank two minutes after the other one left.
    site.wait_restarts(job, 1, seconds=240)
    site.wait_for(folder / "metrics.jsonl", '"iteration": 40,', job=job)
    cluster.kill_node("n2")
    cluster.fail_node("n2")
    cluster.restart_node("n2")
    ended = site.end(job)

    log = site.log("mup_tiny", job)
    assert (ended.state, ended.restarts) == ("COMPLETED", 2), log
    assert "requeue exit 76" in log
    # Steps after the last checkpoint were done again, with the same samples and the same result.
    assert sorted(set(curve(folder))) == curve(alone)
