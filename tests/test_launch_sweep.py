"""``launch/sweep.sh`` without Slurm, and what it asks sbatch for; the jobs are in tests/slurm."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.launch_machine import Machine


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    machine = Machine(tmp_path)
    (machine.work / "sweep.yaml").touch()
    return machine


def test_without_sbatch_the_sweep_runs_here(machine: Machine) -> None:
    (machine.folder / "bin/sbatch").unlink()
    code, _, err = machine.launch("sweep", "sweep.yaml", "my out", "--text", "a b")
    assert (code, err) == (0, "")
    assert [call.strip() for call in machine.calls()] == [
        "sweep run sweep.yaml --out my out --text a b",
        "sweep report my out",
    ]


@pytest.mark.parametrize(("code", "reported"), [(0, True), (1, True), (2, False), (75, False)])
def test_here_a_report_follows_unless_the_sweep_was_refused_or_stopped(
    machine: Machine, code: int, reported: bool
) -> None:
    (machine.folder / "bin/sbatch").unlink()
    answer(machine, f'[[ "$1 $2" != "sweep run" ]] || exit {code}')
    assert machine.launch("sweep", "sweep.yaml", "out")[0] == code
    assert ("sweep report out" in machine.calls()[-1]) == reported


def answer(machine: Machine, line: str) -> None:
    """Have megatron-mup note its calls and run a line of bash."""
    command = machine.folder / "bin/megatron-mup"
    command.write_text(f'#!/bin/bash\necho "  $*" >>"$FOLDER/calls"\n{line}\n')


@pytest.mark.parametrize(
    ("part", "called"),
    [
        ("check", ["sweep prepare c.yaml --out out --text a --text=b"]),
        (
            "task",
            [
                "sweep run out/sweep.yaml --out out --text a --only mup --text=b --workers 2 "
                "--task 2/3"
            ],
        ),
        ("report", ["sweep merge out --only mup", "sweep report out"]),
    ],
)
def test_each_job_calls_its_command(machine: Machine, part: str, called: list[str]) -> None:
    (machine.work / "c.yaml").touch()
    job = {"SLURM_JOB_ID": "5", "SLURM_ARRAY_TASK_ID": "1", "SLURM_ARRAY_TASK_COUNT": "3"}
    options = ("--text", "a", "--only", "mup", "--text=b", "--workers", "2")
    code, _, err = machine.launch("sweep", part, "c.yaml", "out", *options, **job)
    assert (code, err) == (0, "")
    assert [call.strip() for call in machine.calls()] == called


@pytest.mark.parametrize(("code", "reported"), [(1, True), (2, False)])
def test_the_report_job_fails_where_runs_are_missing(
    machine: Machine, code: int, reported: bool
) -> None:
    answer(machine, f'[[ "$1 $2" != "sweep merge" ]] || exit {code}')
    (machine.work / "c.yaml").touch()
    assert machine.launch("sweep", "report", "c.yaml", "out", SLURM_JOB_ID="5")[0] == code
    assert ("sweep report out" in machine.calls()[-1]) == reported


def test_jobs_that_were_taken_are_cancelled_when_one_is_refused(machine: Machine) -> None:
    for name, lines in {
        "sbatch": 'echo job >>"$FOLDER/taken"; n=$(wc -l <"$FOLDER/taken"); ((n < 3)) || exit 1; '
        "echo $((10 + n))",
        "scancel": 'echo "$@" >"$FOLDER/cancelled"',
    }.items():
        (machine.folder / "bin" / name).write_text(f"#!/bin/bash\n{lines}\n")
        (machine.folder / "bin" / name).chmod(0o755)
    code, _, err = machine.launch("sweep", "sweep.yaml", "out", TASKS="2000")
    assert code == 2
    assert "nothing of this sweep stays submitted" in err
    assert "MaxArraySize of `scontrol show config`; TASKS is 2000" in err
    assert (machine.folder / "cancelled").read_text() == "11 12\n"


def test_four_jobs_follow_each_other(machine: Machine) -> None:
    code, out, err = machine.launch(
        *("sweep", "sweep.yaml", "out", "--text", "a b"),
        TASKS="3",
        AT_ONCE="2",
        TASK_OPTIONS="--gpus=1 --time=60",
    )
    assert (code, err) == (0, "")
    script = str(machine.project / "launch/sweep.sh")
    words = [f"{machine.work}/sweep.yaml", f"{machine.work}/out", "--text", "a b"]
    kill = "--kill-on-invalid-dep=yes"
    array = ["--gpus=1", "--time=60", "--array=0-2%2", "--output=slurm-%x-%A_%a.out"]
    jobs = [job[: job.index("array=")] for job in machine.jobs()]
    # The stand-in for sbatch numbers its jobs from 11, in words that end with the number.
    first, second, third = (f"Submitted batch job {number}" for number in (11, 12, 13))
    asked = {
        "check": [],
        "task": [*array, f"--dependency=afterok:{first}", kill],
        "again": [*array, f"--dependency=afterok:{first},afterany:{second}", kill],
        "report": [f"--dependency=afterok:{first},afterany:{third}", kill],
    }
    names = ["check", "task", "task", "report"]
    assert jobs == [
        ["--parsable", "--export=ALL", f"--job-name=sweep-{name}", *options, script, name, *words]
        for name, options in zip(names, asked.values(), strict=True)
    ]
    assert out.count("job ") == 8


@pytest.mark.parametrize(
    ("words", "settings", "message"),
    [
        (["sweep.yaml"], {}, "give the sweep's YAML and a folder"),
        (["sweep.yaml", "--workers", "2"], {}, "the second argument is --workers"),
        (["other.yaml", "out"], {}, "there is no configuration other.yaml"),
        (["sweep.yaml", "out", "--task", "1/2"], {}, "leave it out, set TASKS"),
        (["sweep.yaml", "out", "AT_ONCE=3"], {}, "AT_ONCE is an environment variable"),
        (["sweep.yaml", "out", "TASKS=3"], {}, "TASKS is an environment variable"),
        (["sweep.yaml", "out", "TASK_OPTIONS=-n2"], {}, "TASK_OPTIONS is an environment variable"),
        (["sweep.yaml", "out"], {"MAX_RESTARTS": "many"}, "MAX_RESTARTS is many"),
        (["sweep.yaml", "out"], {"TASKS": "0"}, "TASKS is 0; set the number of tasks"),
        (["sweep.yaml", "out"], {"TASKS": "many"}, "TASKS is many"),
    ],
)
def test_a_mistake_is_told_before_anything_is_submitted(
    machine: Machine, words: list[str], settings: dict[str, str], message: str
) -> None:
    code, _, err = machine.launch("sweep", *words, **settings)
    assert code == 2
    assert message in err
    assert machine.jobs() == []


def test_without_arguments_the_help_is_an_error(machine: Machine) -> None:
    code, out, err = machine.launch("sweep")
    assert (code, out) == (2, "")
    assert "TASKS=8 bash launch/sweep.sh CONFIG OUT" in err
    assert (machine.calls(), machine.jobs()) == ([], [])


def test_help_prints_the_head_of_the_script(machine: Machine) -> None:
    code, out, _ = machine.launch("sweep", "--help")
    assert code == 0
    assert out.startswith("`megatron-mup sweep run` on many machines")
    assert "#SBATCH" not in out
