import shutil
import subprocess
from pathlib import Path

import pytest

from tests.machines import link_commands, write_script

ROOT = Path(__file__).parents[1]

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
    return link_commands(tmp_path / "commands")


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
