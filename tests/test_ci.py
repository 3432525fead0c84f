"""CI's script, the Makefile and the choice of test levels, with stand-ins for all they call."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.machines import link_commands, write_script

ROOT = Path(__file__).parents[1]


@pytest.fixture
def commands(tmp_path: Path) -> Path:
    """A folder for PATH that has what the scripts call, and no Python."""
    return link_commands(tmp_path / "commands")


def make(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    # MAKEFLAGS of a make that runs these tests would reach the one under test.
    env = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    return subprocess.run(
        ["make", *arguments], cwd=folder, env=env, capture_output=True, text=True, check=False
    )


@pytest.fixture
def checked(tmp_path: Path) -> Path:
    """A checkout whose tools all succeed, the tests with pytest's closing line."""
    shutil.copytree(ROOT / ".ci", tmp_path / ".ci")
    shutil.copy(ROOT / "Makefile", tmp_path)
    for name in (".venv/bin/ruff", ".venv/bin/mypy", ".venv/bin/shellcheck"):
        write_script(tmp_path / name, "#!/bin/sh\necho checked\n")
    write_script(tmp_path / "tools/set_up_venv.sh", "#!/bin/sh\n")
    write_script(tmp_path / "tools/find_slurm.sh", "#!/bin/sh\n")
    write_script(tmp_path / "tools/find_chromium.sh", "#!/bin/sh\n")
    write_script(tmp_path / "tools/run_tests.sh", "#!/bin/sh\necho ran >>runs\necho 3 passed\n")
    return tmp_path


def run_ci(folder: Path) -> subprocess.CompletedProcess[str]:
    """Run CI with the commands in `folder/bin` before all others."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    env["PATH"] = f"{folder / 'bin'}{os.pathsep}{env['PATH']}"
    return subprocess.run(
        ["bash", folder / ".ci/run"], env=env, capture_output=True, text=True, check=False
    )


def test_ci_runs_the_tests_once_and_ends_with_their_closing_line(checked):
    result = run_ci(checked)

    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[-1] == "3 passed"
    assert (checked / "runs").read_text() == "ran\n"


@pytest.mark.parametrize(
    "step",
    [
        "tools/set_up_venv.sh",
        ".venv/bin/ruff",
        ".venv/bin/mypy",
        ".venv/bin/shellcheck",
        "tools/run_tests.sh",
    ],
)
def test_ci_fails_when_any_step_fails(checked, step):
    write_script(checked / step, "#!/bin/sh\nexit 1\n")

    assert run_ci(checked).returncode != 0


@pytest.fixture
def without_slurm(checked: Path) -> Path:
    """A checkout on a machine without Slurm, whose root may install it: nothing is really done."""
    write_script(checked / "tools/find_slurm.sh", "#!/bin/sh\necho install it >&2\nexit 1\n")
    write_script(checked / "bin/id", "#!/bin/sh\necho 0\n")
    write_script(checked / "bin/apt-get", f'#!/bin/sh\necho "$*" >>"{checked}/installed"\n')
    for name in ("install", "rm"):
        write_script(checked / "bin" / name, "#!/bin/sh\ncat >/dev/null\n")
    return checked


def test_ci_installs_slurm_where_it_is_missing(without_slurm):
    result = run_ci(without_slurm)

    assert result.returncode == 0, result.stderr
    assert (without_slurm / "installed").read_text().splitlines() == [
        "update -qq",
        "install -y -qq --no-install-recommends slurmctld slurmd slurm-client munge",
    ]
    assert result.stdout.splitlines()[-1] == "3 passed"


def test_ci_goes_on_without_slurm_when_it_cannot_be_installed(without_slurm):
    write_script(without_slurm / "bin/apt-get", "#!/bin/sh\nexit 100\n")

    result = run_ci(without_slurm)

    assert result.returncode == 0, result.stderr
    assert "Slurm could not be installed: its tests are left out" in result.stderr
    assert result.stdout.splitlines()[-1] == "3 passed"


def test_ci_installs_nothing_where_slurm_is_or_for_a_user_who_may_not(without_slurm):
    write_script(without_slurm / "bin/id", "#!/bin/sh\necho 1000\n")
    as_user = run_ci(without_slurm)
    write_script(without_slurm / "bin/id", "#!/bin/sh\necho 0\n")
    write_script(without_slurm / "tools/find_slurm.sh", "#!/bin/sh\n")
    with_slurm = run_ci(without_slurm)

    assert as_user.returncode == with_slurm.returncode == 0
    assert not (without_slurm / "installed").exists()


def test_ci_installs_chromium_where_it_is_missing_and_goes_on_without_it(without_slurm):
    write_script(without_slurm / "tools/find_slurm.sh", "#!/bin/sh\n")
    write_script(without_slurm / "tools/find_chromium.sh", "#!/bin/sh\nexit 1\n")
    installing = run_ci(without_slurm)
    write_script(without_slurm / "bin/apt-get", "#!/bin/sh\nexit 100\n")
    failing = run_ci(without_slurm)

    assert installing.returncode == failing.returncode == 0
    assert (without_slurm / "installed").read_text().splitlines() == [
        "update -qq",
        "install -y -qq --no-install-recommends chromium",
    ]
    assert "Chromium could not be installed: its tests are left out" in failing.stderr
    assert failing.stdout.splitlines()[-1] == "3 passed"


def run_tests(checked: Path, commands: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run tools/run_tests.sh where only `commands` and `checked/machine` are; prints the call."""
    for name in ("run_tests.sh", "find_slurm.sh", "find_chromium.sh"):
        shutil.copy(ROOT / "tools" / name, checked / "tools")
    write_script(checked / ".venv/bin/python", "#!/bin/sh\nprintf '%s,' \"$@\"\n")
    return subprocess.run(
        [commands / "bash", checked / "tools/run_tests.sh", *arguments],
        env={"PATH": f"{checked / 'machine'}:{commands}"},
        capture_output=True,
        text=True,
        check=True,
    )


def install_slurm_and_chromium(folder: Path) -> None:
    for name in ("slurmctld", "slurmd", "sbatch", "munged", "chromium"):
        write_script(folder / name, "#!/bin/sh\n")


@pytest.mark.parametrize(
    ("driver_output", "levels"),
    [
        (None, "not slow and not gpu"),
        ("No devices were found", "not slow and not gpu"),
        ("GPU 0: NVIDIA H100 80GB HBM3", "not slow"),
    ],
)
def test_gpu_tests_are_deselected_where_there_is_no_gpu(checked, commands, driver_output, levels):
    install_slurm_and_chromium(checked / "machine")
    if driver_output is not None:
        write_script(checked / "machine/nvidia-smi", f"#!/bin/sh\necho '{driver_output}'\n")

    result = run_tests(checked, commands, "-m", "slow")

    assert result.stdout == f"-m,pytest,-n,2,--dist,loadfile,-m,{levels},-m,slow,"


def test_slurm_tests_are_deselected_with_a_line_where_slurm_is_missing(checked, commands):
    install_slurm_and_chromium(checked / "machine")
    (checked / "machine/sbatch").unlink()

    result = run_tests(checked, commands)
    chosen = run_tests(checked, commands, "-m", "gpu")

    levels = "not slow and not slurm and not gpu"
    assert result.stdout == f"-m,pytest,-n,2,--dist,loadfile,-m,{levels},"
    assert result.stderr == (
        "left out: tests of the level slurm. Slurm is missing: apt-get install "
        "--no-install-recommends slurmctld slurmd slurm-client munge\n"
    )
    assert chosen.stderr == ""


def test_browser_tests_are_deselected_with_a_line_where_chromium_is_missing(checked, commands):
    install_slurm_and_chromium(checked / "machine")
    (checked / "machine/chromium").unlink()

    result = run_tests(checked, commands)

    levels = "not slow and not browser and not gpu"
    assert result.stdout == f"-m,pytest,-n,2,--dist,loadfile,-m,{levels},"
    assert result.stderr == (
        "left out: tests of the level browser. Chromium is missing: apt-get install "
        "--no-install-recommends chromium\n"
    )


def test_slurm_tests_alone_stop_where_slurm_is_missing_and_name_what_to_install(checked):
    write_script(checked / "tools/find_slurm.sh", "#!/bin/sh\necho install it >&2\nexit 1\n")

    result = make(checked, "test-slurm")

    assert result.returncode != 0
    assert "install it" in result.stderr
    assert not (checked / "runs").exists()


def test_ci_without_make_names_what_to_install(checked, commands):
    result = subprocess.run(
        [commands / "bash", checked / ".ci/run"],
        env={"PATH": str(commands)},
        capture_output=True,
        text=True,
        check=False,
    )

    assert result.returncode == 1
    assert "apt-get install make" in result.stderr


@pytest.mark.parametrize(
    "target",
    [
        "quickstart",
        "test",
        "test-slow",
        "test-slurm",
        "lint",
        "format",
        "types",
        "shellcheck",
        "bench",
    ],
)
def test_each_target_sets_up_first_and_stops_if_that_fails(checked, target):
    for tool in ("python", "megatron-mup"):
        write_script(checked / ".venv/bin" / tool, "#!/bin/sh\n")
    working = make(checked, target)
    write_script(checked / "tools/set_up_venv.sh", "#!/bin/sh\necho no Python >&2\nexit 1\n")
    broken = make(checked, target)

    assert working.returncode == 0, working.stderr
    assert broken.returncode != 0
    assert broken.stdout == ""
    assert "no Python" in broken.stderr


def test_quickstart_passes_text_out_and_options(checked):
    write_script(checked / ".venv/bin/megatron-mup", "#!/bin/sh\nprintf '%s,' \"$@\"\n")

    without = make(checked, "quickstart")
    with_both = make(checked, "quickstart", "TEXT=my text.txt", "OUT=runs/a")

    assert without.stdout == "quickstart,"
    assert with_both.stdout == "quickstart,--text,my text.txt,--out,runs/a,"
    short = make(checked, "quickstart", "ARGS=--steps 50 --widths 32,64")
    assert short.stdout == "quickstart,--steps,50,--widths,32,64,"


def test_help_is_the_default_and_lists_every_target():
    targets = re.findall(r"^([a-z-]+):(?!=)", (ROOT / "Makefile").read_text(), re.MULTILINE)
    listed = re.findall(r"^  make ([a-z-]+) ", make(ROOT).stdout, re.MULTILINE)

    assert sorted(listed) == sorted(targets)
    assert {"quickstart", "test", "check", "bench"} <= set(listed)
