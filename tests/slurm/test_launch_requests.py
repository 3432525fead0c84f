"""What the launch scripts ask of Slurm, judged against sixteen nodes of eight GPUs."""

from __future__ import annotations

import re
import subprocess

import pytest

from tests.slurm.cluster import ROOT
from tests.slurm.site import Site

pytestmark = pytest.mark.slurm

REQUESTS = {
    "mup_10b.sh": ((), 16, 2048),
    "mup_10b_4096.sh": ((), 16, 2048),
    "mup_10b_adamw.sh": ((), 16, 2048),
    "mup_proxy.sh": (("512",), 1, 128),
    "mup_tiny.sh": ((), 2, 4),
    "lr_sweep.sh": (("launch/mup_proxy.sh", "512"), 1, 1),
    "sweep.sh": (("sweep.yaml", "runs/widths"), 1, 4),
    "preprocess.sh": (("--input", "a", "--tokenizer-model", "m", "--output-prefix", "x"), 1, 8),
}
"""By script: arguments, nodes, processors; a node that is taken as a whole has 128."""


@pytest.fixture(scope="module")
def site(cluster, tmp_path_factory) -> Site:
    return Site(cluster, tmp_path_factory.mktemp("requests"))


def judged(site: Site, script: str, *options: str) -> subprocess.CompletedProcess[str]:
    """What sbatch says of a script, with options before its name."""
    arguments, _, _ = REQUESTS[script]
    command = ("sbatch", "--test-only", "--partition=big", *options, site.script(script))
    return site.cluster.run(*command, *arguments, check=False, cwd=site.work)


def test_every_script_that_can_be_submitted_is_judged_here():
    scripts = {path.name for path in (ROOT / "launch").glob("*.sh")}

    # The others are sourced.
    assert scripts - set(REQUESTS) == {"functions.sh", "run_functions.sh", "step_functions.sh"}


@pytest.mark.parametrize("script", sorted(REQUESTS))
def test_a_request_is_granted_on_the_nodes_that_it_is_for(site, script):
    _, nodes, processors = REQUESTS[script]

    answer = judged(site, script)

    assert answer.returncode == 0, answer.stderr
    granted = re.search(r"using (\d+) processors on nodes (\S+) ", answer.stderr)
    assert granted is not None, answer.stderr
    assert granted[1] == str(processors)
    assert granted[2] == ("big1" if nodes == 1 else f"big[1-{nodes}]")


@pytest.mark.parametrize("script", ["mup_10b.sh", "mup_10b_4096.sh", "mup_10b_adamw.sh"])
@pytest.mark.parametrize("option", ["--nodes=17", "--gpus-per-node=9", "--cpus-per-task=17"])
def test_a_request_beyond_sixteen_such_nodes_is_refused(site, script, option):
    assert judged(site, script, option).returncode == 1


@pytest.mark.parametrize(
    "script", sorted({*REQUESTS} - {"lr_sweep.sh", "preprocess.sh", "sweep.sh"})
)
def test_a_training_run_asks_to_be_signalled_and_requeued_and_keeps_its_log(site, script):
    answer = judged(site, script, "--verbose")

    asked = dict(re.findall(r"^sbatch: (\S+) +: (.*)$", answer.stderr, flags=re.MULTILINE))
    assert asked["requeue"] == "requeue"
    assert asked["open-mode"] == "a"
    # To the batch script alone, twenty minutes before the end; sbatch leaves its usual 60 s out.
    assert asked["signal"] == ("B:USR1" if script == "mup_tiny.sh" else "B:USR1@1200")
