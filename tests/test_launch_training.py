"""Launch scripts of training outside of a job: stand-ins for sbatch, torchrun and megatron-mup."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron_mup.rank_outcomes import read_outcomes
from tests.launch_machine import ROOT, Machine

TRAINING = ["mup_10b", "mup_10b_4096", "mup_10b_adamw", "mup_proxy", "mup_tiny"]

STATUS = """{{
 "state": "{state}",
 "iteration": {iteration},
 "train_iters": 20,
 "launch": {{
  "state": "other",
  "lr": 7
 }},
 "metrics": {{
  "lm loss": 2.5,
  "lm loss validation": {loss}
 }}
}}
"""


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


def test_all_scripts_pass_shellcheck():
    scripts = [*sorted((ROOT / "launch").glob("*.sh")), ROOT / "launch/env.example"]
    checker = Path(sys.executable).parent / "shellcheck"
    result = subprocess.run(
        [checker, "--external-sources", *scripts], cwd=ROOT, capture_output=True, text=True
    )
    assert (result.returncode, result.stdout) == (0, "")


@pytest.mark.parametrize("script", [*TRAINING, "lr_sweep"])
def test_help_is_the_comment_at_the_top_and_starts_nothing(machine, script):
    code, out, err = machine.launch(script, "--help", MEGATRON_MUP="/no/such/command")

    assert (code, err) == (0, "")
    assert f"launch/{script}.sh" in out
    assert "#" not in out.replace("  #", "")
    assert machine.jobs() == []


def test_bash_submits_a_script_with_the_site_s_options_where_slurm_is(machine):
    (machine.project / "launch/env").write_text("SITE_OPTIONS=(--partition='a b')\n")

    code, out, _ = machine.launch("mup_10b", "train_iters=9", LR="0.5")

    assert (code, out) == (0, "Submitted batch job 11\n")
    script = str(machine.project / "launch/mup_10b.sh")
    assert machine.jobs() == [
        ["--export=ALL", "--partition=a b", script, "train_iters=9", "array=", "rates=", "memory="]
    ]
    assert machine.calls() == []


@pytest.mark.parametrize("script", [*TRAINING, "lr_sweep", "preprocess"])
def test_a_script_under_another_name_says_so(machine, script):
    (machine.project / f"launch/{script}.sh").rename(machine.work / "mine.sh")

    done = subprocess.run(
        ["bash", "mine.sh"], cwd=machine.work, env=machine.env, capture_output=True, text=True
    )

    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].endswith(
        f"is not found; keep this script's name and folder, {script}.sh"
    )


def test_a_run_without_a_learning_rate_is_not_submitted(machine):
    code, _, err = machine.launch("mup_10b")

    assert (code, machine.jobs()) == (2, [])
    assert err.startswith("error: no learning rate is given; set LR=number")
    # The twin has a published one; an argument or a file will do.
    for script, arguments, env in (
        ("mup_10b_adamw", [], {}),
        ("mup_10b", ["optimizer.lr=0.5"], {}),
        ("mup_10b", [], {"LR_FROM": "tuned.yaml"}),
    ):
        assert machine.launch(script, *arguments, **env)[0] == 0
    assert len(machine.jobs()) == 3


@pytest.mark.parametrize(("width", "nodes"), [(128, 1), (512, 1), (1024, 2), (2048, 4), (4096, 8)])
def test_a_proxy_asks_for_nodes_by_its_width(machine, width, nodes):
    assert machine.launch("mup_proxy", str(width), "train_iters=9", LR="0.5")[0] == 0

    script = str(machine.project / "launch/mup_proxy.sh")
    options = [f"--job-name=mup_proxy_{width}", f"--nodes={nodes}", script, str(width)]
    assert machine.jobs()[0][:6] == ["--export=ALL", *options, "train_iters=9"]


@pytest.mark.parametrize("width", ["", "100", "wide"])
def test_a_width_that_is_none_is_refused(machine, width):
    code, _, err = machine.launch("mup_proxy", *([width] if width else []), LR="0.5")

    assert code == 2
    assert err.startswith(f"error: the width is '{width}'; give a multiple of 128 first")


def test_a_proxy_of_a_width_is_that_model(machine):
    settings = {"LAUNCHER": "torchrun", "GPUS_PER_NODE": "1", "LR": "0.5"}

    assert machine.launch("mup_proxy", "512", "train_iters=9", **settings)[0] == 0

    (begin,) = machine.calls("launch begin")
    assert f"--run-dir {machine.work}/runs/mup_proxy_512 " in begin
    assert begin.endswith(" hidden_size=512 num_attention_heads=4 train_iters=9")


def test_a_run_here_is_checked_and_trained_on_all_ranks(machine):
    code, out, err = machine.here("train_iters=9", RUN_DIR="a run")

    assert code == 0, err
    assert out == "finished\n"
    run = f"{machine.work}/a run"
    configs = f"{machine.project}/launch/configs"
    assert machine.calls("launch begin") == [
        f"  launch begin --run-dir {run} --config {configs}/mup_10b.yaml --world-size 2 --lr 0.5 "
        f'--max-restarts 3 checkpoint.save="{run}/checkpoints" checkpoint.load="{run}/checkpoints" '
        f'logging.metrics_path="{run}/metrics.jsonl" train_iters=9'
    ]
    # Each rank, with the variable that "begin" printed.
    assert sorted(machine.calls("launch preflight")) == [
        f"{rank} yes launch preflight --run-dir {run} --timeout-seconds 240" for rank in (0, 1)
    ]
    assert machine.calls("launch judge") == [
        f" yes launch judge --run-dir {run} --nodes {os.uname().nodename} --tasks-per-node 2"
    ]
    assert sorted(machine.calls("train")) == [
        f"{rank} yes train --config {run}/launch/config.yaml" for rank in (0, 1)
    ]
    assert machine.calls("launch decide") == [
        f" yes launch decide --run-dir {run} --exit-code 0 --max-restarts 3"
    ]


def test_a_mistake_ends_the_script_before_any_rank_starts(machine):
    (machine.folder / "mistake").write_text("error: no such option\n")

    assert machine.here() == (2, "", "error: no such option\n")

    assert len(machine.calls()) == 1


def test_a_run_is_started_again_until_it_is_decided_otherwise(machine):
    machine.decide("requeue once", "resubmit n1,n2 twice", "stop exit 3: it failed")
    machine.train("exit 3\n")

    code, out, _ = machine.here(MAX_RESTARTS="5", EXCLUDE_AFTER="2", PREFLIGHT_SECONDS="0")

    # Torchrun says 1 whatever its ranks said; the decision knows.
    assert code == 3
    assert out == "requeue once\nresubmit n1,n2 twice\nstop exit 3: it failed\n"
    assert len(machine.calls("train")) == 6
    assert machine.calls("launch preflight") == []
    decided = machine.calls("launch decide")
    assert len(decided) == 3
    for call in decided:
        assert call.endswith(" --exit-code 1 --max-restarts 5 --exclude-after 2")


def test_a_rank_that_ends_without_a_word_gets_a_note_and_one_that_wrote_keeps_its_own(machine):
    machine.decide("stop exit 137: it failed")
    machine.train(
        "[[ $RANK != 0 ]] || kill -KILL $$\n"
        "if [[ $RANK == 1 ]]; then\n"
        '    echo mine >"$MEGATRON_MUP_OUTCOMES/rank-00001.json"\n    exit 1\nfi\n'
    )
    before = int(time.time())

    assert machine.here(RUN_DIR="a run", GPUS_PER_NODE="3")[0] == 137

    folder = machine.work / "a run/launch/outcomes"
    # The third rank and the checks ended well.
    assert sorted(each.name for each in folder.iterdir()) == [
        "rank-00000.json",
        "rank-00001.json",
    ]
    (note,) = read_outcomes(folder)
    assert before <= note.time <= time.time()
    assert (note.rank, note.node, note.exit_code) == (0, os.uname().nodename, 137)
    assert note.reason == "ended with 137"
    assert (folder / "rank-00001.json").read_text() == "mine\n"


def test_no_rank_starts_on_nodes_that_fail_their_checks(machine):
    (machine.folder / "bad_nodes").touch()
    machine.decide("stop bad nodes")

    assert machine.here()[0] == 79

    assert machine.calls("train") == []
    # Notes are of training alone.
    assert list(machine.work.glob("runs/mup_10b/launch/outcomes/*")) == []
    assert "--exit-code 79" in machine.calls("launch decide")[0]


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM, signal.SIGINT])
def test_a_signal_reaches_the_ranks_and_ends_the_run(machine, number):
    machine.decide("requeue exit 75: stopped in time", "finished")
    machine.train(
        'trap \'echo "$RANK" >>"$FOLDER/saved"; exit 75\' USR1\n'
        'echo "$RANK" >>"$FOLDER/ready"\nwhile true; do sleep 0.1; done\n'
    )
    settings = {"LAUNCHER": "torchrun", "GPUS_PER_NODE": "2", "LR": "0.5"}
    process = machine.start("mup_10b", PREFLIGHT_SECONDS="0", **settings)
    ready = machine.folder / "ready"
    deadline = time.monotonic() + 60
    while not ready.exists() or len(ready.read_text().split()) < 2:
        assert time.monotonic() < deadline
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)

    process.send_signal(number)
    out, err = process.communicate(timeout=60)

    assert (process.returncode, out) == (75, "requeue exit 75: stopped in time\n"), err
    assert err.endswith(f"stopped by {number.name}; the same command continues the run\n")
    assert sorted((machine.folder / "saved").read_text().split()) == ["0", "1"]
    assert "--exit-code 1 --signalled" in machine.calls("launch decide")[0]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"LAUNCHER": "srun"}, "LAUNCHER=srun needs a Slurm job"),
        ({"LAUNCHER": "mpirun"}, "LAUNCHER is mpirun; set srun or torchrun"),
        ({"LAUNCHER": "torchrun", "GPUS_PER_NODE": "0"}, "GPUS_PER_NODE is 0; set the number"),
        ({"MAX_RESTARTS": "many"}, "MAX_RESTARTS is many; set a number"),
        ({"EXCLUDE_AFTER": "0"}, "EXCLUDE_AFTER is 0; set 1 or more failures"),
        ({"LAUNCHER": "torchrun", "PREFLIGHT_SECONDS": "5m"}, "PREFLIGHT_SECONDS is 5m; set whole"),
    ],
)
def test_settings_that_cannot_be_are_refused(machine, settings, message):
    code, _, err = machine.launch("mup_10b", LR="0.5", **settings)

    assert code == 2
    assert err.startswith(f"error: {message}")
    assert (machine.calls(), machine.jobs()) == ([], [])


def test_a_command_of_several_words_needs_torchrun_to_be_found_inside_of_it(machine):
    image = machine.folder / "bin/container"
    image.write_text(
        '#!/bin/bash\necho "$1" >>"$FOLDER/inside"\nexec "$FOLDER/bin/${1##*/}" "${@:2}"\n'
    )
    image.chmod(0o755)
    settings = machine.project / "launch/env"
    settings.write_text("MEGATRON_MUP=(container /opt/megatron-mup)\n")

    assert machine.here(PREFLIGHT_SECONDS="0")[0] == 0
    assert set((machine.folder / "inside").read_text().split()) == {
        "/opt/megatron-mup",
        "/opt/torchrun",
    }

    settings.write_text("MEGATRON_MUP=(container 'mup of mine')\n")
    code, _, err = machine.here()
    assert code == 2
    assert "set TORCHRUN in launch/env" in err


def test_a_sweep_is_an_array_and_a_table_after_it(machine):
    script = machine.project / "launch/mup_proxy.sh"

    code, out, _ = machine.launch(
        *("lr_sweep", str(script), "512", "train_iters=9"),
        **{"RATES": "0.1 0.2 0.4", "AT_ONCE": "2", "SLURM_MEM_PER_CPU": "2048"},
    )

    assert code == 0
    runs = f"{machine.work}/runs/lr_sweep"
    assert out.splitlines()[-1] == f"runs: job 11, 3 tasks, in {runs}"
    options = ["--export=ALL", "--comment=lr_sweep", "--job-name=mup_proxy_512", "--nodes=1"]
    options += [str(script), "512", "train_iters=9"]
    report = ["--export=ALL", "--dependency=afterany:11", "--job-name=lr_sweep_report"]
    sweep = str(machine.project / "launch/lr_sweep.sh")
    # The memory that this script itself has as a job is not passed on.
    assert machine.jobs() == [
        [*options, "array=0-2%2", "rates=0.1 0.2 0.4", "memory="],
        [*report, sweep, "report", runs, "0.1", "0.2", "0.4", "array=", "rates=", "memory="],
    ]


def test_a_sweep_without_slurm_follows_the_list_and_makes_the_table(machine):
    (machine.folder / "bin/sbatch").unlink()
    runs = machine.work / "runs/lr_sweep"
    for rate, state, iteration, loss in (
        ("0.1", "finished", 20, 2.25),
        ("0.2", "finished", 20, 1.75),
        ("0.4", "failed", 7, 1.5),
    ):
        (runs / f"lr-{rate}").mkdir(parents=True)
        text = STATUS.format(state=state, iteration=iteration, loss=loss)
        (runs / f"lr-{rate}/status.json").write_text(text)
    machine.decide("finished", "finished", "stop it failed", "finished")

    code, out, err = machine.launch(
        *("lr_sweep", str(machine.project / "launch/mup_10b.sh")),
        **{"RATES": "0.1 0.2 0.4 0.8", "GPUS_PER_NODE": "1", "PREFLIGHT_SECONDS": "0"},
    )

    assert code == 0, err
    given = [call.split("--lr ")[1].split()[0] for call in machine.calls("launch begin")]
    assert given == ["0.1", "0.2", "0.4", "0.8"]
    assert "the run at 0.4 failed" in err
    assert (runs / "sweep.csv").read_text() == (
        "lr,state,iteration,train_iters,loss,validation_loss\n0.1,finished,20,20,2.5,2.25\n"
        "0.2,finished,20,20,2.5,1.75\n0.4,failed,7,20,2.5,1.5\n0.8,missing,,,,\n"
    )
    assert (runs / "sweep.md").read_text().splitlines()[:3] == [
        "| lr | state | iteration | train_iters | loss | validation_loss |",
        "|---|---|---|---|---|---|",
        "| 0.1 | finished | 20 | 20 | 2.5 | 2.25 |",
    ]
    # Not the lower loss of a run that failed.
    assert f"lowest loss at 0.2: LR_FROM={runs}/lr-0.2/launch/config.yaml\n" in out
    assert "end of the list" not in out


def test_a_sweep_whose_best_rate_is_the_last_says_so(machine):
    for rate, loss in (("0.1", 2.25), ("0.2", 1.75)):
        (machine.work / f"lr-{rate}").mkdir()
        text = STATUS.format(state="finished", iteration=20, loss=loss)
        (machine.work / f"lr-{rate}/status.json").write_text(text)

    # In whatever order they were given.
    for rates in (["0.1", "0.2"], ["0.05", "0.2", "0.1"], ["0.4", "0.2"]):
        code, out, _ = machine.launch("lr_sweep", "report", str(machine.work), *rates)
        assert code == 0
        assert "lowest loss at 0.2: " in out
        assert "that is the end of the list" in out
    _, out, _ = machine.launch("lr_sweep", "report", str(machine.work), "0.1", "0.4", "0.2")
    assert "lowest loss at 0.2: " in out
    assert "end of the list" not in out
    code, _, err = machine.launch("lr_sweep", "report", str(machine.work), "0.3")
    assert (code, err) == (2, "error: no run has finished; their logs say why\n")
