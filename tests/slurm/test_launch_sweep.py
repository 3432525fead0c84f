"""``launch/lr_sweep.sh``: an array of runs and the table after them; training is acted."""

from __future__ import annotations

import re

import pytest

from tests.slurm.site import Site, write_shards

pytestmark = pytest.mark.slurm

RATES = ("0.03125", "0.015625", "0.0078125")


def test_the_last_job_makes_a_table_of_all_rates_though_one_failed(cluster, tmp_path):
    site = Site(cluster, tmp_path, acted=("train", "launch preflight"))
    options = ("train_iters=4", "lr_warmup_iters=1", *write_shards(tmp_path))
    site.prepare_record("mup_tiny.yaml", *options)
    # Its third argument is the configuration.
    site.trouble("[[ $command != train ]] || ! grep --quiet 'lr: 0.03125' \"$3\" || exit 3\n")
    folder = site.work / "runs/lr_sweep"
    for rate in RATES:
        # Shards are made by another test.
        (folder / f"lr-{rate}/data").mkdir(parents=True)
        (folder / f"lr-{rate}/data/text.manifest.json").touch()

    script = str(site.script("mup_tiny.sh"))
    done = site.call("lr_sweep.sh", script, *options, RATES=" ".join(RATES))

    assert done.returncode == 0, done.stdout + done.stderr
    last = int(re.findall(r"Submitted batch job (\d+)", done.stdout)[-1])
    site.end(last)
    tasks = cluster.jobs(int(re.findall(r"runs: job (\d+)", done.stdout)[0]))
    logs = "".join(path.read_text() for path in sorted(site.work.glob("slurm-*.out")))
    assert {each.task: (each.state, each.exit_code) for each in tasks} == {
        "0": ("FAILED", 3),
        "1": ("COMPLETED", 0),
        "2": ("COMPLETED", 0),
    }, logs
    assert (folder / "sweep.csv").read_text() == (
        "lr,state,iteration,train_iters,loss,validation_loss\n"
        "0.03125,missing,,,,\n"
        "0.015625,finished,4,4,4.0,\n"
        "0.0078125,finished,4,4,5.0,\n"
    ), logs
    table = (folder / "sweep.md").read_text().splitlines()
    assert table[0] == "| lr | state | iteration | train_iters | loss | validation_loss |"
    assert re.fullmatch(r"\|( *-+ *\|){6}", table[1])
    assert len(table) == 5
    assert f"lowest loss at 0.015625: LR_FROM={folder}/lr-0.015625/launch/config.yaml" in logs
