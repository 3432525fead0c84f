"""``launch/preprocess.sh`` on a real Slurm with two nodes."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sysconfig
from pathlib import Path

import pytest

from megatron_mup.data.tokenizer_training import TokenizerOptions, train_tokenizer
from tests.slurm.cluster import Job, wait_until
from tests.slurm.preprocessing import MEGATRON_MUP, Project, launched, output_digests

pytestmark = pytest.mark.slurm

MODULES = ("ast", "bisect", "calendar", "csv", "dis", "fractions", "gzip", "heapq")
OPTIONS = ("--shard-tokens", "20000", "--deduplicate", "--valid-fraction", "0.1")
STUB_ARGUMENTS = ("--input", "a b.jsonl", "--tokenizer-model", "m", "--output-prefix", "x")


def is_running(job: Job) -> bool:
    return job.state == "RUNNING"


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    """A folder with some JSON lines, one file compressed, and a tokenizer."""
    folder = tmp_path_factory.mktemp("corpus")
    stdlib = Path(sysconfig.get_paths()["stdlib"])
    sources = [stdlib / f"{name}.py" for name in MODULES]
    for source in sources:
        # Parts repeat within and between the files: there is something to leave out.
        parts = [part for part in source.read_text("utf-8").split("\n\n") if part]
        lines = "".join(json.dumps({"text": part}) + "\n" for part in parts)
        (folder / f"{source.stem}.jsonl").write_text(lines, "utf-8")
    (folder / "gzip.jsonl.gz").write_bytes(gzip.compress((folder / "gzip.jsonl").read_bytes()))
    (folder / "gzip.jsonl").unlink()
    options = TokenizerOptions(vocab_size=512, held_out_fraction=0.0)
    train_tokenizer(sources[:4], folder / "bpe", options=options)
    return folder


@pytest.fixture(scope="module")
def arguments(corpus) -> tuple[str, ...]:
    return ("--input", str(corpus), "--tokenizer-model", str(corpus / "bpe.model"), *OPTIONS)


@pytest.fixture(scope="module")
def alone(arguments, tmp_path_factory) -> dict[str, str]:
    """Digests of what one machine makes without Slurm."""
    prefix = tmp_path_factory.mktemp("alone") / "shards"
    command = [MEGATRON_MUP, "data", "preprocess", *arguments, "--output-prefix", prefix]
    subprocess.run(command, check=True, capture_output=True, timeout=300)
    digests = output_digests(prefix)
    # Two splits of several shards, and a manifest: there is something to compare.
    assert len(digests) > 3 * 3
    assert "shards.manifest.json" in digests
    return digests


@pytest.fixture
def project(cluster, tmp_path) -> Project:
    """The real command."""
    return Project(cluster, tmp_path, command=MEGATRON_MUP)


@pytest.fixture
def stub(cluster, tmp_path) -> Project:
    """A command that does nothing and succeeds."""
    return Project(cluster, tmp_path, command="true")


def test_two_nodes_make_the_same_bytes_as_one_machine(project, arguments, alone):
    jobs = project.launch(*arguments, "--output-prefix", "out/shards", parts=4)

    assert project.finish(jobs).state == "COMPLETED", jobs.all_logs()
    tasks = project.cluster.jobs(jobs.array)
    assert {each.state for each in tasks} == {"COMPLETED"}
    assert {each.nodes for each in tasks} == {"n1", "n2"}
    assert output_digests(project.work / "out/shards") == alone
    # The shares were taken, not one job's work left to the last.
    assert "part 2/4: 0 units" not in jobs.log(f"preprocess-{jobs.array}_1.out")
    assert "manifest: out/shards.manifest.json" in jobs.log(f"preprocess-finish-{jobs.finish}.out")


def test_a_part_that_was_cancelled_is_done_by_the_last_job(project, arguments, alone):
    project.trouble('[[ "$*" != *"--part 2/3"* ]] || sleep 600\n')
    jobs = project.launch(*arguments, "--output-prefix", "out/shards", parts=3)
    wait_until(lambda: any("2/3" in call for call in project.calls()), what="part 2 runs")
    project.cluster.run("scancel", f"{jobs.array}_1")

    assert project.finish(jobs).state == "COMPLETED", jobs.all_logs()
    states = {each.task: each.state for each in project.cluster.jobs(jobs.array)}
    assert states == {"0": "COMPLETED", "1": "CANCELLED", "2": "COMPLETED"}
    assert output_digests(project.work / "out/shards") == alone


def test_a_part_whose_node_died_starts_again_elsewhere(project, arguments, alone):
    # At its first start the part does its work and then hangs, so that it dies with all of it made.
    project.trouble(
        'if [[ "$*" == *"--part 1/1"* && -z ${SLURM_RESTART_COUNT:-} ]]; then\n'
        f'    {MEGATRON_MUP} "$@"; touch {project.folder}/hangs; sleep 600\n'
        "fi\n"
    )
    jobs = project.launch(*arguments, "--output-prefix", "out/shards", parts=1)
    wait_until((project.folder / "hangs").exists, what="the part hangs")
    (task,) = project.cluster.jobs(jobs.array)

    project.cluster.kill_node(task.nodes)
    project.cluster.fail_node(task.nodes)
    try:
        last = project.finish(jobs)
    finally:
        project.cluster.restart_node(task.nodes)

    assert last.state == "COMPLETED", jobs.all_logs()
    (again,) = project.cluster.jobs(jobs.array)
    assert (again.state, again.restarts) == ("COMPLETED", 1)
    assert again.nodes != task.nodes
    assert output_digests(project.work / "out/shards") == alone
    # The log of the first start is still there.
    log = jobs.log(f"preprocess-{jobs.array}_0.out")
    assert log.count("part 1/1:") == 2
    assert "part 1/1: 0 units" in log


def test_sbatch_itself_may_call_it_and_its_resources_hold_for_all_jobs(stub):
    controller = stub.cluster.submit(
        *("--time=17", "--cpus-per-task=3", "--mem-per-cpu=100", "--output=first.out"),
        *(stub.script, *STUB_ARGUMENTS),
        cwd=stub.work,
        env=stub.cluster.env | {"PARTS": "2"},
    )
    (first,) = stub.cluster.wait_job(controller)
    text = (stub.work / "first.out").read_text()
    assert first.state == "COMPLETED", text
    jobs = launched(text)

    last = stub.finish(jobs)

    assert jobs.logs == stub.work / "logs/preprocess"
    for record in [last, *stub.cluster.jobs(jobs.array)]:
        assert record.fields["TimeLimit"] == "00:17:00"
        assert record.fields["CPUs/Task"] == "3"
        assert record.fields["MinMemoryCPU"] == "100M"
        assert record.fields["Requeue"] == "1"
    # Two simultaneous parts come in either order.
    given = " ".join(STUB_ARGUMENTS)
    assert sorted(stub.calls()[:2]) == [
        f"data preprocess --workers 3 --part {part}/2 {given}" for part in (1, 2)
    ]
    assert stub.calls()[2:] == [f"data preprocess --workers 3 {given}", "data verify --workers 3 x"]


def test_a_last_job_that_is_requeued_while_it_checks_does_not_make_the_shards_again(stub):
    # The old manifest is there from the start: only a new one tells that the shards are made.
    (stub.work / "x.manifest.json").write_text("old")
    stub.trouble(
        'case "$*" in\n'
        "    *--part*) ;;\n"
        "    *verify*) [[ -n ${SLURM_RESTART_COUNT:-} ]] || sleep 600 ;;\n"
        "    *) echo new >new; mv new x.manifest.json ;;\n"
        "esac\n"
    )
    jobs = stub.launch(*STUB_ARGUMENTS, "--overwrite", parts=1)
    wait_until(lambda: "data verify --workers 1 x" in stub.calls(), what="the check of the shards")
    stub.cluster.run("scontrol", "requeue", str(jobs.finish))

    last = stub.finish(jobs)

    assert (last.state, last.restarts) == ("COMPLETED", 1)
    given = " ".join(STUB_ARGUMENTS)
    assert stub.calls() == [
        f"data preprocess --workers 1 --part 1/1 {given} --overwrite",
        f"data preprocess --workers 1 {given} --overwrite",
        "data verify --workers 1 x",
        "data verify --workers 1 x",
    ]


@pytest.mark.parametrize("broken", ["verify", "preprocess --workers 1 --input"])
def test_the_last_job_fails_when_the_shards_cannot_be_made_or_are_wrong(stub, broken):
    stub.trouble(f'[[ "$*" != "data {broken}"* ]] || exit 3\n')
    jobs = stub.launch(*STUB_ARGUMENTS, parts=1)

    last = stub.finish(jobs)

    assert (last.state, last.exit_code) == ("FAILED", 3)
    assert stub.calls()[-1].startswith(f"data {broken}")


@pytest.mark.parametrize(("options", "code"), [((), 0), (("--cpus-per-task=129",), 1)])
def test_the_request_fits_a_node(stub, options, code):
    judged = stub.cluster.run(
        *("sbatch", "--test-only", "--partition=big", *options, stub.script, *STUB_ARGUMENTS),
        check=False,
        cwd=stub.work,
    )

    assert judged.returncode == code, judged.stderr
    assert os.listdir(stub.work) == []
