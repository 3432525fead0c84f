"""What a launched run does when a node, a rank or its time is lost; training is acted."""

from __future__ import annotations

import re

import pytest

from megatron_mup.checkpoint.integrity import whole_iterations
from tests.slurm.cluster import wait_until
from tests.slurm.site import Site, write_shards

pytestmark = pytest.mark.slurm

OPTIONS = ("train_iters=20", "lr_warmup_iters=2", "save_interval=5")


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> tuple[str, ...]:
    return write_shards(tmp_path_factory.mktemp("data"))


class Run:
    """A run of ``launch/mup_tiny.sh`` on two nodes."""

    def __init__(self, site: Site, shards: tuple[str, ...]) -> None:
        self.site, self.options = site, (*OPTIONS, *shards)
        self.folder = site.work / "runs/mup_tiny"
        site.prepare_record("mup_tiny.yaml", *self.options)
        # Its own shards are made by another test.
        (self.folder / "data").mkdir(parents=True)
        (self.folder / "data/text.manifest.json").touch()

    def submit(self, *, options: tuple[str, ...] = ("--exclusive",), **environment: str) -> int:
        return self.site.submit("mup_tiny.sh", *self.options, options=options, **environment)

    def log(self, job: int) -> str:
        return self.site.log("mup_tiny", job)

    def wait_for_iteration(self, number: int, *, job: int) -> None:
        line = f'{{"iteration": {number},'
        self.site.wait_for(self.folder / "metrics.jsonl", line, job=job)

    def saved(self) -> list[int]:
        return sorted(whole_iterations(self.folder / "checkpoints"))

    def began_at(self, job: int) -> list[int]:
        """The iteration at which each start went on."""
        return [int(found) for found in re.findall(r"starts at iteration (\d+)\n", self.log(job))]


@pytest.fixture
def run(wide_cluster, tmp_path, shards) -> Run:
    return Run(Site(wide_cluster, tmp_path, acted=("train", "launch preflight")), shards)


def test_a_run_goes_on_elsewhere_when_its_node_dies(run):
    job = run.submit()
    run.wait_for_iteration(7, job=job)

    run.site.cluster.kill_node("n2")
    run.site.cluster.fail_node("n2")
    ended = run.site.end(job)
    run.site.cluster.restart_node("n2")

    assert (ended.state, ended.restarts) == ("COMPLETED", 1), run.log(job)
    assert ended.nodes in ("n[1,3]", "n[3-4]")
    first, second = run.began_at(job)
    assert first == 0
    assert second >= 5
    assert run.saved()[-1] == 20


def test_a_signal_in_the_checks_and_a_requeue_from_outside_only_put_the_job_back(run):
    run.site.trouble('[[ $start != *.0 || $command != "launch preflight" ]] || sleep 600\n')
    job = run.submit(MAX_RESTARTS="1")
    wait_until(lambda: len(run.site.calls("launch preflight")) == 2, what="the checks begin")
    run.site.cluster.run("scancel", "--batch", "--signal=USR1", str(job))
    run.site.wait_restarts(job, 1)
    run.wait_for_iteration(7, job=job)

    run.site.cluster.run("scontrol", "requeue", str(job))
    ended = run.site.end(job)

    assert (ended.state, ended.restarts) == ("COMPLETED", 2), run.log(job)
    assert {call.start for call in run.site.calls("train")} == {f"{job}.1", f"{job}.2"}
    # The log still has the lines of the start before.
    first, second = run.began_at(job)
    assert first == 0
    assert second >= 5


def test_ranks_get_the_script_s_environment_though_sbatch_exported_little(run):
    job = run.submit(options=("--exclusive", "--export=PATH,SLURM_CONF"))

    ended = run.site.end(job)

    assert (ended.state, ended.restarts) == ("COMPLETED", 0), run.log(job)
    ranks = run.site.environments(f"{job}.0", "train")
    assert {each["MEGATRON_MUP_ATTEMPT"] for each in ranks.values()} == {"1"}


def test_a_job_that_is_cancelled_does_not_come_back(run):
    job = run.submit()
    run.wait_for_iteration(2, job=job)

    run.site.cluster.run("scancel", str(job))
    ended = run.site.end(job)

    assert (ended.state, ended.restarts) == ("CANCELLED", 0), run.log(job)


def test_a_node_that_hangs_in_its_checks_is_named_and_excluded(run):
    run.site.trouble('[[ $node != n2 || $command != "launch preflight" ]] || sleep 600\n')
    job = run.submit(EXCLUDE_AFTER="1", PREFLIGHT_SECONDS="4")

    ended = run.site.end(job)

    log = run.log(job)
    assert (ended.state, ended.restarts) == ("COMPLETED", 1), log
    assert ended.fields["ExcNodeList"] == "n2"
    assert ended.nodes in ("n[1,3]", "n[3-4]")
    assert "\nn2: never reported" in log
    assert "\nn1: " not in log
    assert {call.start for call in run.site.calls("train")} == {f"{job}.1"}


def test_a_run_is_started_again_until_restarts_bring_no_progress(run):
    # Saves at 5, then the disk is full at 6; then a rank is lost at 7, again and again.
    run.site.trouble(
        "export STUB_LAST=7 STUB_CODE=76\n[[ $start != *.0 ]] || export STUB_LAST=6 STUB_CODE=74\n"
    )
    job = run.submit(MAX_RESTARTS="1")

    ended = run.site.end(job)

    log = run.log(job)
    assert (ended.state, ended.exit_code, ended.restarts) == ("FAILED", 76, 2), log
    assert run.began_at(job) == [0, 5, 5]
    assert re.findall(r"^(requeue|stop) exit (\d+)", log, flags=re.MULTILINE) == [
        ("requeue", "74"),
        ("requeue", "76"),
        ("stop", "76"),
    ]


def test_a_node_whose_rank_is_killed_in_training_is_avoided(run):
    # The other rank fails with an error of its own, as one does whose connection breaks.
    run.site.trouble(
        "[[ $start != *.0 ]] || export STUB_LAST=7 STUB_CODE=1\n"
        "[[ $start != *.0 || $command != train || $node != n2 ]] || kill -KILL $$\n"
    )
    job = run.submit(EXCLUDE_AFTER="1", PREFLIGHT_SECONDS="0")

    ended = run.site.end(job)

    log = run.log(job)
    assert (ended.state, ended.restarts) == ("COMPLETED", 1), log
    assert ended.fields["ExcNodeList"] == "n2"
    assert ended.nodes in ("n[1,3]", "n[3-4]")
    assert re.findall(r"^resubmit (\S+) exit (\d+)", log, flags=re.MULTILINE) == [("n2", "137")]
    assert run.began_at(job) == [0, 5]


@pytest.mark.slow
def test_torchrun_takes_the_place_of_srun(run):
    run.options = (*run.options, "micro_batch_size=4")
    run.site.prepare_record("mup_tiny.yaml", *run.options)
    job = run.submit(LAUNCHER="torchrun", GPUS_PER_NODE="2", PREFLIGHT_SECONDS="0")
    run.wait_for_iteration(2, job=job)

    run.site.cluster.run("scancel", "--batch", "--signal=USR1", str(job))
    ended = run.site.end(job)

    assert (ended.state, ended.restarts) == ("COMPLETED", 1), run.log(job)
    first, second = run.began_at(job)
    assert first == 0
    assert second >= 2
    for start in (f"{job}.0", f"{job}.1"):
        ranks = run.site.environments(start, "train")
        places = {
            (rank, each["SLURMD_NODENAME"], each["LOCAL_RANK"], each["WORLD_SIZE"])
            for rank, each in ranks.items()
        }
        assert places == {
            (0, "n1", "0", "4"),
            (1, "n1", "1", "4"),
            (2, "n2", "0", "4"),
            (3, "n2", "1", "4"),
        }
