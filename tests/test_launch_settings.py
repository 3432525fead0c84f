"""What users set for the launch scripts: in the environment, as arguments, in ``launch/env``."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.launch_machine import Machine


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


def test_the_example_s_lines_for_conda_fail_where_conda_fails(machine):
    example = (machine.project / "launch/env.example").read_text()
    lines = re.findall(r"^# (.*(?:conda|CONDA).*)$", example, flags=re.MULTILINE)[1:]

    assert lines[1:] == [
        "conda activate megatron-mup",
        "MEGATRON_MUP=$CONDA_PREFIX/bin/megatron-mup",
    ]
    (machine.project / "launch/env").write_text("conda() { return 7; }\n" + "\n".join(lines[1:]))
    assert machine.launch("mup_10b", LR="0.5")[0] == 7
    assert machine.jobs() == []


@pytest.mark.parametrize("rate", ["abc", "-0.1", "0", "0.0", "1e", "0,1", "nan"])
def test_a_learning_rate_that_is_none_is_not_submitted(machine, rate):
    code, _, err = machine.launch("mup_10b", LR=rate)

    assert (code, machine.jobs()) == (2, [])
    assert err == f"error: LR is {rate}; set a positive number, e.g. LR=0.01\n"


@pytest.mark.parametrize("rate", ["0.01", "1", ".5", "2.", "1e-3", "3.90625E-03"])
def test_learning_rates_are_submitted(machine, rate):
    assert machine.launch("mup_10b", LR=rate)[0] == 0


def test_a_sweep_with_one_wrong_rate_is_not_submitted(machine):
    script = str(machine.project / "launch/mup_10b.sh")

    code, _, err = machine.launch("lr_sweep", script, RATES="0.1 0,2")

    assert (code, machine.jobs()) == (2, [])
    assert err.startswith("error: RATES is 0,2; set a positive number")


@pytest.mark.parametrize("argument", ["LR=0.01", "RUN_DIR=x", "MAX_RESTARTS=1"])
@pytest.mark.parametrize("script", ["mup_10b", "mup_tiny", "lr_sweep"])
def test_a_setting_among_the_arguments_is_told_from_an_option(machine, script, argument):
    given = {"LR": "0.5", "RATES": "0.5"}
    name = argument.partition("=")[0]

    first = [str(machine.project / "launch/mup_10b.sh")] if script == "lr_sweep" else []
    code, _, err = machine.launch(script, *first, argument, **given)

    assert (code, machine.jobs(), machine.calls()) == (2, [], [])
    assert err.startswith(
        f"error: {argument} is given as an argument, but {name} is an environment variable: write "
        "it before the command"
    )


@pytest.mark.parametrize("folder", ['a "run"', "${HOME}/x", "a\\b", "a\nb"])
@pytest.mark.parametrize("script", ["mup_10b", "mup_tiny"])
def test_a_run_folder_that_no_configuration_can_name_is_refused(machine, script, folder):
    code, _, err = machine.launch(script, LR="0.5", RUN_DIR=folder)

    assert (code, machine.jobs(), machine.calls()) == (2, [], [])
    assert err.startswith(f"error: RUN_DIR is {folder}; give a folder without")


def test_a_misspelt_setting_of_the_site_is_told(machine):
    (machine.project / "launch/env").write_text(
        "SITE_OPTION=(--partition=gpu)\nMEGATRONMUP=()\nIMAGE=/x.sif\nexport MAX_JOBS=4\n"
        "TORCHRUN=(torchrun)\nMAX_RESTARTS=2\n"
    )

    code, _, err = machine.launch("mup_10b", LR="0.5")

    assert code == 0
    assert err.splitlines() == [
        f"warning: launch/env sets {name}, which no launch script reads; see launch/env.example"
        for name in ("MEGATRONMUP", "SITE_OPTION")
    ]


def test_a_command_of_several_words_is_to_be_a_list(machine):
    (machine.project / "launch/env").write_text('MEGATRON_MUP="python -m megatron_mup"\n')

    code, _, err = machine.launch("mup_10b", LR="0.5")

    assert code == 2
    assert "make a list in launch/env: MEGATRON_MUP=(python -m megatron_mup)" in err


def test_a_container_is_not_started_on_the_login_node_and_need_not_be_known_there(machine):
    (machine.folder / "bin/srun").write_text("#!/bin/bash\nexit 9\n")
    (machine.folder / "bin/srun").chmod(0o755)
    (machine.project / "launch/env").write_text("CONTAINER=(--container-image=x.sqsh)\n")
    nowhere = {"MEGATRON_MUP": "/in/the/image/megatron-mup"}

    assert machine.launch("mup_10b", LR="0.5", **nowhere)[0] == 0
    assert len(machine.jobs()) == 1
    # What runs here, runs beside the script.
    assert machine.here(PREFLIGHT_SECONDS="0")[0] == 0
    code, _, err = machine.here(**nowhere)
    assert code == 2
    assert err.startswith("error: the command /in/the/image/megatron-mup is not there")
