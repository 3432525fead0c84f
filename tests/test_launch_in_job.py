"""Launch scripts of training in a job: stand-ins for scontrol and srun, and for what they start."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.launch_machine import ROOT, Machine

# Takes a line of `answers` for each request but those for names; an empty one is success.
SCONTROL = """#!/bin/bash
[[ $2 != hostnames ]] || { echo "$3"; exit; }
answer=$(head -n 1 "$FOLDER/answers")
sed -i 1d "$FOLDER/answers"
echo "$1 $answer" >>"$FOLDER/requests"
[[ -z $answer ]] || { echo "slurm error: $answer" >&2; exit 1; }
[[ $1 != show ]] || echo "JobId=77 JobState=RUNNING ExcNodeList=(null) "
"""

# Starts the ranks of one node.
SRUN = """#!/bin/bash
while [[ $1 != bash ]]; do
    case $1 in --ntasks-per-node=*) count=${1#*=} ;; esac
    shift
done
for rank in $(seq 0 $((count - 1))); do SLURM_PROCID=$rank SLURM_NODEID=0 "$@" & done
code=0
for rank in $(jobs -p); do wait "$rank" || code=$?; done
exit $code
"""

JOB = {
    "SLURM_JOB_ID": "77",
    "SLURM_JOB_NODELIST": "n7",
    "SLURM_JOB_NUM_NODES": "1",
    "SLURM_NTASKS_PER_NODE": "2",
    "SLURM_CPUS_PER_TASK": "6",
    "ENVIRONMENT": "BATCH",
    "LR": "0.5",
    "PREFLIGHT_SECONDS": "0",
    "CONTROLLER_SECONDS": "0",
}
AWAY = "Unable to contact slurm controller (connect failure)"


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    machine = Machine(tmp_path)
    for name, text in {"scontrol": SCONTROL, "srun": SRUN}.items():
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)
    machine.train(
        'echo "${RANK:-none} $MASTER_ADDR $MASTER_PORT $OMP_NUM_THREADS" >>"$FOLDER/places"\n'
    )
    return machine


def places(machine: Machine) -> list[str]:
    """Of each rank in training: RANK, address, port and threads."""
    return sorted((machine.folder / "places").read_text().splitlines())


def requests(machine: Machine) -> list[str]:
    path = machine.folder / "requests"
    return path.read_text().splitlines() if path.exists() else []


def test_a_requeue_waits_for_a_controller_that_is_away(machine):
    machine.decide("requeue exit 76: a rank died")
    (machine.folder / "answers").write_text(f"{AWAY}\n\n{AWAY}\n\n\n")
    process = machine.start("mup_10b", **JOB)
    expected = [f"show {AWAY}", "show ", f"requeue {AWAY}", "show ", "requeue "]
    deadline = time.monotonic() + 60
    while requests(machine) != expected:
        assert time.monotonic() < deadline, requests(machine)
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)

    # As Slurm does then.
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=30)

    assert process.returncode == 76
    assert requests(machine) == expected


@pytest.mark.parametrize(
    ("answers", "expected", "word"),
    [
        (
            ["", "Requested operation is presently disabled for job 77"],
            ["show ", "requeue Requested operation is presently disabled for job 77"],
            "disabled",
        ),
        ([AWAY] * 20, [f"show {AWAY}"] * 10, "not requeued: Slurm's controller did not do it"),
    ],
)
def test_a_requeue_that_cannot_be_ends_the_job_with_its_code(machine, answers, expected, word):
    machine.decide("requeue exit 76: a rank died")
    (machine.folder / "answers").write_text("".join(f"{line}\n" for line in answers))

    code, _, err = machine.launch("mup_10b", **JOB)

    assert code == 76
    assert requests(machine) == expected
    assert word in err


def test_each_restart_has_another_port_and_nothing_of_the_user_s_shell_reaches_the_ranks(machine):
    left = {"RANK": "5", "MASTER_ADDR": "elsewhere", "WORLD_SIZE": "9", "MASTER_PORT": "1"}
    machine.decide("finished", "finished")

    for restart in ("0", "1"):
        code, _, err = machine.launch("mup_10b", **(JOB | left | {"SLURM_RESTART_COUNT": restart}))
        assert code == 0, err

    # 10,000 + 2 x 77, and as much for 178.
    assert places(machine) == ["none 127.0.0.1 10154 6"] * 2 + ["none 127.0.0.1 10356 6"] * 2


@pytest.mark.parametrize(("set_by_user", "threads"), [({}, "3"), ({"OMP_NUM_THREADS": "2"}, "2")])
def test_ranks_of_torchrun_share_the_threads_of_their_task(machine, set_by_user, threads):
    one_task = {"LAUNCHER": "torchrun", "SLURM_NTASKS_PER_NODE": "1", "GPUS_PER_NODE": "2"}

    assert machine.launch("mup_10b", **(JOB | one_task | set_by_user))[0] == 0

    assert [line.split()[-1] for line in places(machine)] == [threads, threads]


def test_an_interactive_job_is_started_on_one_of_its_nodes(machine):
    interactive = {name: value for name, value in JOB.items() if name != "ENVIRONMENT"}
    machine.decide("finished", "finished")

    code, _, err = machine.launch("mup_10b", **interactive)
    assert code == 2
    assert err.startswith(
        f"error: {os.uname().nodename} is not one of this allocation's nodes (n7)"
    )
    assert "MASTER_ADDR=n7" in err
    assert machine.calls() == []

    (machine.project / "launch/env").write_text("export MASTER_ADDR=n7\n")
    assert machine.launch("mup_10b", **interactive)[0] == 0
    assert places(machine) == ["none n7 10154 6"] * 2

    (machine.project / "launch/env").unlink()
    here = {"SLURM_JOB_NODELIST": os.uname().nodename.partition(".")[0]}
    assert machine.launch("mup_10b", **(interactive | here))[0] == 0


def test_ranks_get_the_environment_whatever_sbatch_was_told(machine):
    # Fails as srun does where SLURM_EXPORT_ENV says so: the ranks' variables are gone.
    (machine.folder / "bin/srun").write_text(
        '#!/bin/bash\n[[ $1 == --export=ALL ]] || { echo "no environment" >&2; exit 5; }\n'
        + SRUN.removeprefix("#!/bin/bash\n")
    )

    assert machine.launch("mup_10b", **JOB, SLURM_EXPORT_ENV="NONE")[0] == 0
    assert len(places(machine)) == 2


def test_a_container_s_commands_get_the_environment_too(machine):
    (machine.folder / "bin/srun").write_text(
        '#!/bin/bash\necho "$*" >>"$FOLDER/steps"\n'
        'while [[ $1 == --* ]]; do shift; done\nexec "$@"\n'
    )
    (machine.project / "launch/env").write_text("CONTAINER=(--container-image=x.sqsh)\n")

    assert machine.launch("mup_10b", **JOB)[0] == 0

    steps = (machine.folder / "steps").read_text().splitlines()
    assert steps[0].startswith("--export=ALL --nodes=1 --ntasks=1 --overlap ")
    assert " --container-image=x.sqsh " in steps[0]
    assert all(step.startswith("--export=ALL ") for step in steps if step.startswith("--"))


def test_an_array_of_a_sweep_that_lost_its_rates_fails_and_another_one_runs(machine):
    task = {"SLURM_ARRAY_JOB_ID": "70", "SLURM_ARRAY_TASK_ID": "1"}
    (machine.folder / "answers").write_text("\n")

    assert machine.launch("mup_10b", **JOB, **task)[0] == 0
    assert requests(machine) == ["show "]

    text = SCONTROL.replace("ExcNodeList", "Comment=lr_sweep ExcNodeList")
    (machine.folder / "bin/scontrol").write_text(text)
    (machine.folder / "answers").write_text("\n")
    machine.decide("finished", "finished")
    calls = len(machine.calls())
    code, _, err = machine.launch("mup_10b", **JOB, **task)
    assert code == 2
    assert err.startswith("error: the learning rates of lr_sweep.sh did not reach this job")
    assert len(machine.calls()) == calls

    assert machine.launch("mup_10b", **JOB, **task, SWEEP_RATES="0.1 0.2")[0] == 0
    assert " --lr 0.2 " in machine.calls("launch begin")[-1]
    assert f" --run-dir {machine.work}/runs/mup_10b/lr-0.2 " in machine.calls("launch begin")[-1]


def test_a_pause_whose_sleep_has_ended_says_nothing():
    functions = ROOT / "launch/run_functions.sh"
    lines = f"source '{functions}'; sleep() {{ return 1; }}; set -e; pause 1; pause 1"

    done = subprocess.run(["bash", "-c", lines], capture_output=True, text=True, timeout=60)

    assert (done.returncode, done.stderr) == (0, "")
