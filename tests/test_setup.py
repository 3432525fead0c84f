import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
COMMANDS = (
    "bash",
    "cat",
    "cmp",
    "cp",
    "dirname",
    "grep",
    "mkdir",
    "mv",
    "rm",
    "sed",
    "sort",
    "tail",
)

# Stands for Python, its venv and its pip: makes an environment that holds a copy of itself, and
# notes what pip is asked to do. The file `pip_breaks` makes pip fail as it does without a network.
FAKE_PYTHON = """#!/usr/bin/env bash
case "$*" in
    *version_info*) echo 3.12 ;;
    "-m venv --clear .venv")
        echo venv >>"$CALLS"
        rm -rf .venv && mkdir -p .venv/bin && cp "$0" .venv/bin/python ;;
    "-m pip"*)
        echo "$*" >>"$CALLS"
        [[ ! -e pip_breaks ]] || { echo "Cannot reach https://index.example/torch/"; exit 1; } ;;
esac
"""

NEW_ENVIRONMENT = [
    "venv",
    "pip install --no-deps --only-binary :all: -r requirements.lock",
]
NEW_PACKAGE = [
    "pip install --no-deps --no-build-isolation --editable .",
    "pip check",
]


def write_script(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)
    return path


def fake_interpreter(path: Path, version: str, *, has_venv: bool = True) -> Path:
    return write_script(
        path,
        f'#!/bin/sh\ncase "$*" in *version_info*) echo {version} ;;'
        f" *ensurepip*) exit {0 if has_venv else 1} ;; esac\n",
    )


def pyenv_shim(path: Path) -> Path:
    return write_script(path, '#!/bin/sh\necho "pyenv: command not found" >&2\nexit 127\n')


@pytest.fixture
def commands(tmp_path: Path) -> Path:
    """A folder for PATH that has what the scripts call, and no Python."""
    folder = tmp_path / "commands"
    folder.mkdir()
    for name in COMMANDS:
        (folder / name).symlink_to(str(shutil.which(name)))
    return folder


def find_python(
    commands: Path, *folders: Path, home: Path | None = None, **env: str
) -> subprocess.CompletedProcess[str]:
    path = ":".join(str(folder) for folder in (*folders, commands))
    return subprocess.run(
        [commands / "bash", ROOT / "tools/find_python.sh"],
        env={"PATH": path, "HOME": str(home or commands), **env},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )


def test_a_shim_that_fails_is_passed_over_for_the_interpreter_behind_it(tmp_path, commands):
    pyenv_shim(tmp_path / "shims/python3.12")
    real = fake_interpreter(tmp_path / "bin/python3.12", "3.12")

    result = find_python(commands, tmp_path / "shims", tmp_path / "bin")

    assert result.stdout == f"{real}\n"


def test_pyenv_versions_are_searched_when_only_shims_are_on_path(tmp_path, commands):
    for name in ("python3.12", "python3.13", "python3"):
        pyenv_shim(tmp_path / "shims" / name)
    real = fake_interpreter(tmp_path / "pyenv/versions/3.12.9/bin/python", "3.12")

    under_root = find_python(commands, tmp_path / "shims", PYENV_ROOT=str(tmp_path / "pyenv"))
    (tmp_path / "pyenv").rename(tmp_path / ".pyenv")
    under_home = find_python(commands, tmp_path / "shims", home=tmp_path)

    assert under_root.stdout == f"{real}\n"
    assert under_home.stdout == f"{tmp_path}/.pyenv/versions/3.12.9/bin/python\n"


def test_python_3_12_is_preferred_to_3_13_wherever_it_is(tmp_path, commands):
    fake_interpreter(tmp_path / "bin/python3.13", "3.13")
    real = fake_interpreter(tmp_path / ".pyenv/versions/3.12.1/bin/python", "3.12")

    assert find_python(commands, tmp_path / "bin", home=tmp_path).stdout == f"{real}\n"


def test_plain_python3_of_version_3_13_is_taken_when_there_is_no_other(tmp_path, commands):
    real = fake_interpreter(tmp_path / "bin/python3", "3.13")

    assert find_python(commands, tmp_path / "bin").stdout == f"{real}\n"


def test_without_a_usable_python_it_names_what_to_install_and_what_it_rejected(tmp_path, commands):
    pyenv_shim(tmp_path / "bin/python3.12")
    fake_interpreter(tmp_path / "bin/python3", "3.11")

    result = find_python(commands, tmp_path / "bin")

    assert result.returncode == 1
    assert result.stdout == ""
    assert "Python 3.12 or 3.13 is needed" in result.stderr
    assert "apt-get install python3.12 python3.12-venv" in result.stderr
    assert "make venv PYTHON=" in result.stderr
    assert f"rejected: {tmp_path}/bin/python3.12 does not run" in result.stderr
    assert f"rejected: {tmp_path}/bin/python3 is Python 3.11" in result.stderr


def test_on_a_machine_without_any_python_it_names_what_to_install(commands):
    result = find_python(commands)

    assert result.returncode == 1
    assert "rejected" not in result.stderr
    assert "apt-get install python3.12 python3.12-venv" in result.stderr


def test_python_without_venv_is_rejected_with_the_package_that_has_it(tmp_path, commands):
    fake_interpreter(tmp_path / "bin/python3.12", "3.12", has_venv=False)

    result = find_python(commands, tmp_path / "bin")

    assert result.returncode == 1
    assert "apt-get install python3.12-venv)" in result.stderr


def test_an_interpreter_that_was_named_is_taken_or_refused_but_not_replaced(tmp_path, commands):
    fake_interpreter(tmp_path / "bin/python3.12", "3.12")
    named = fake_interpreter(tmp_path / "mine/python", "3.13")
    old = fake_interpreter(tmp_path / "old/python", "3.10")

    taken = find_python(commands, tmp_path / "bin", PYTHON=str(named))
    refused = find_python(commands, tmp_path / "bin", PYTHON=str(old))

    assert taken.stdout == f"{named}\n"
    assert refused.returncode == 1
    assert f"{old} is Python 3.10" in refused.stderr


class Checkout:
    """A copy of the set-up scripts with a fake Python."""

    def __init__(self, folder: Path, commands: Path) -> None:
        self.folder = folder
        self.calls = folder.parent / "calls"
        self.env = {
            "PATH": f"{commands}:/usr/bin:/bin",
            "CALLS": str(self.calls),
            "PYTHON": str(write_script(folder.parent / "fake/python3.12", FAKE_PYTHON)),
        }
        shutil.copytree(ROOT / "tools", folder / "tools")
        for name in ("requirements.lock", "pyproject.toml", "setup.py"):
            (folder / name).write_text(f"# {name}\n")

    def set_up(self) -> subprocess.CompletedProcess[str]:
        self.calls.write_text("")
        return subprocess.run(
            ["bash", self.folder / "tools/set_up_venv.sh"],
            env=self.env,
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
        )

    def steps(self) -> list[str]:
        flags = "-m pip --no-input --disable-pip-version-check"
        return [line.replace(flags, "pip") for line in self.calls.read_text().splitlines()]


@pytest.fixture
def checkout(tmp_path: Path, commands: Path) -> Checkout:
    return Checkout(tmp_path / "checkout", commands)


def test_set_up_installs_exactly_the_lock_and_then_the_package(checkout):
    result = checkout.set_up()

    assert result.returncode == 0, result.stderr
    assert checkout.steps() == NEW_ENVIRONMENT + NEW_PACKAGE


def test_second_set_up_does_nothing(checkout):
    checkout.set_up()
    result = checkout.set_up()

    assert checkout.steps() == []
    assert result.stdout == ""


def test_changed_lock_makes_the_environment_anew(checkout):
    checkout.set_up()
    (checkout.folder / "requirements.lock").write_text("numpy==1.0\n")
    checkout.set_up()

    assert checkout.steps() == NEW_ENVIRONMENT + NEW_PACKAGE


@pytest.mark.parametrize("name", ["pyproject.toml", "setup.py"])
def test_changed_package_metadata_installs_only_the_package_again(checkout, name):
    checkout.set_up()
    (checkout.folder / name).write_text("# changed\n")
    checkout.set_up()

    assert checkout.steps() == NEW_PACKAGE


def test_interrupted_installation_is_done_again_from_the_start(checkout):
    (checkout.folder / "pip_breaks").touch()
    failed = checkout.set_up()
    (checkout.folder / "pip_breaks").unlink()
    checkout.set_up()

    assert failed.returncode == 1
    assert checkout.steps() == NEW_ENVIRONMENT + NEW_PACKAGE


def test_environment_of_a_moved_checkout_is_made_anew(checkout):
    checkout.set_up()
    checkout.folder = checkout.folder.rename(checkout.folder.with_name("moved"))
    checkout.set_up()

    assert checkout.steps() == NEW_ENVIRONMENT + NEW_PACKAGE


def test_failing_pip_shows_its_message_without_the_address_of_the_index(checkout):
    (checkout.folder / "pip_breaks").touch()
    result = checkout.set_up()

    assert "Cannot reach <index>" in result.stderr
    assert "index.example" not in result.stdout + result.stderr
    assert ".venv/install.log" in result.stderr


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
    write_script(tmp_path / "tools/run_tests.sh", "#!/bin/sh\necho ran >>runs\necho 3 passed\n")
    return tmp_path


def run_ci(folder: Path) -> subprocess.CompletedProcess[str]:
    env = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
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


@pytest.mark.parametrize(
    ("driver_output", "levels"),
    [
        (None, "not slow and not slurm and not gpu"),
        ("No devices were found", "not slow and not slurm and not gpu"),
        ("GPU 0: NVIDIA H100 80GB HBM3", "not slow and not slurm"),
    ],
)
def test_gpu_tests_are_deselected_where_there_is_no_gpu(checked, commands, driver_output, levels):
    shutil.copy(ROOT / "tools/run_tests.sh", checked / "tools")
    write_script(checked / ".venv/bin/python", "#!/bin/sh\nprintf '%s,' \"$@\"\n")
    if driver_output is not None:
        write_script(checked / "driver/nvidia-smi", f"#!/bin/sh\necho '{driver_output}'\n")

    result = subprocess.run(
        [commands / "bash", checked / "tools/run_tests.sh", "-m", "slow"],
        env={"PATH": f"{checked / 'driver'}:{commands}"},
        capture_output=True,
        text=True,
        check=True,
    )

    assert result.stdout == f"-m,pytest,-n,2,--dist,loadfile,-m,{levels},-m,slow,"


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
    ["quickstart", "test", "test-slow", "lint", "format", "types", "shellcheck", "bench"],
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


def test_quickstart_passes_text_and_out(checked):
    write_script(checked / ".venv/bin/megatron-mup", "#!/bin/sh\nprintf '%s,' \"$@\"\n")

    without = make(checked, "quickstart")
    with_both = make(checked, "quickstart", "TEXT=my text.txt", "OUT=runs/a")

    assert without.stdout == "quickstart,"
    assert with_both.stdout == "quickstart,--text,my text.txt,--out,runs/a,"


def test_help_is_the_default_and_lists_every_target():
    targets = re.findall(r"^([a-z-]+):(?!=)", (ROOT / "Makefile").read_text(), re.MULTILINE)
    listed = re.findall(r"^  make ([a-z-]+) ", make(ROOT).stdout, re.MULTILINE)

    assert sorted(listed) == sorted(targets)
    assert {"quickstart", "test", "check", "bench"} <= set(listed)
