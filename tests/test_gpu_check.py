"""tools/gpu_check.sh where there is no GPU: stand-ins for Python, real archives and folders."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from tests.machines import write_script

ROOT = Path(__file__).parents[1]
STAGES = [
    "doctor",
    "tests",
    "equality",
    "resume",
    "losses",
    "coordinates",
    "ranges",
    "speed",
    "speed-fp8",
    "speed-long",
    "speed-wide",
    "speed-stock",
    "profile",
    "stage",
    "sweep-fp8",
    "sweep-sp",
]

# Says where torch is, installs by a note, writes what the stage would, and notes each call.
PYTHON = """#!/bin/bash
echo "$*" >>"{folder}/calls"
case $* in
-c*) echo "{folder}/packages" ;;
*" --target "*) echo installed >>"{folder}/installed" ;;
esac
"""


class Machine:
    """A checkout with the script, archives and wheels, and a Python that takes notes."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.carried, self.out = folder, folder / "carried", folder / "out"
        (folder / "tools").mkdir()
        shutil.copy(ROOT / "tools/gpu_check.sh", folder / "tools")
        self.carried.mkdir()
        package = folder / "transformer_engine"
        package.mkdir()
        with tarfile.open(self.carried / "te220_sm90_site.tar.xz", "w:xz") as archive:
            archive.add(package, "transformer_engine")
        (self.carried / "megatron_core-0.19.2-cp312.whl").touch()
        (self.carried / "typer-0.29.2.whl").touch()
        self.python = write_script(folder / "python", PYTHON.format(folder=folder))

    def run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        options = ("--carried", self.carried, "--out", self.out, "--site", self.folder / "site")
        return subprocess.run(
            ["bash", self.folder / "tools/gpu_check.sh", *arguments[:1], *options, *arguments[1:]],
            env={**os.environ, "PYTHON": str(self.python)},
            capture_output=True,
            text=True,
            check=False,
        )

    def calls(self) -> list[str]:
        """What Python was called with, but for installing and looking for torch."""
        lines = (self.folder / "calls").read_text().splitlines()
        return [line for line in lines if line.startswith("-m") and " pip " not in line]


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


def test_alone_it_lists_its_stages() -> None:
    done = subprocess.run(
        ["bash", ROOT / "tools/gpu_check.sh"], capture_output=True, text=True, check=True
    )
    listed = [line.split()[0] for line in done.stdout.splitlines()[1:]]
    assert listed == STAGES
    assert "at most 8 minutes" in done.stdout


def test_the_documentation_names_every_stage() -> None:
    page = (ROOT / "docs/gpu.md").read_text()
    stages = page.split("| stage | answers | by |")[1].split("\n\n")[0]
    named = [
        name
        for line in stages.splitlines()[2:]
        for name in re.findall(r"`([a-z0-9-]+)`", line.split("|")[1])
    ]
    assert named == STAGES
    checks = page.split("## All checks")[1]
    assert [stage for stage in STAGES[2:] if f"{stage}`" not in checks] == []


@pytest.mark.parametrize("stage", STAGES)
def test_every_stage_calls_what_there_is(machine: Machine, stage: str) -> None:
    done = machine.run(stage)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1].startswith(f"stage {stage}: passed after ")
    *_, call = [line for line in machine.calls() if " sweep status " not in line]
    for path in re.findall(r"(?:tests|examples)/\S+", call):
        assert (ROOT / path).is_file()
    module = call.split()[1]
    assert (
        module in ("pytest", "megatron_mup") or (ROOT / f"{module.replace('.', '/')}.py").is_file()
    )


def test_archive_and_wheels_are_installed_once(machine: Machine) -> None:
    assert [machine.run("doctor").returncode for _ in range(2)] == [0, 0]
    site = machine.folder / "site/te220"
    assert (site / "transformer_engine").is_dir()
    assert (machine.folder / "installed").read_text() == "installed\n"
    (install,) = [
        line
        for line in (machine.folder / "calls").read_text().splitlines()
        if line.startswith("-m pip")
    ]
    assert install.split() == [
        *["-m", "pip", "install", "-q", "--no-index", "--no-deps", "--target"],
        str(site),
        str(machine.carried / "megatron_core-0.19.2-cp312.whl"),
        str(machine.carried / "typer-0.29.2.whl"),
    ]


def test_what_transformer_engine_imports_for_its_export_is_stood_in_for(machine: Machine) -> None:
    assert machine.run("doctor").returncode == 0
    code = "import onnxscript\nfrom onnxscript import opset18\nfrom onnx import defs\nprint('ok')"
    done = subprocess.run(
        [sys.executable, "-S", "-c", code],
        env={"PYTHONPATH": str(machine.folder / "site/te220")},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == "ok\n"


def test_an_interrupted_installation_is_begun_anew(machine: Machine) -> None:
    write_script(machine.python, "#!/bin/sh\nexit 1\n")
    assert machine.run("doctor").returncode != 0
    write_script(machine.python, PYTHON.format(folder=machine.folder))
    assert machine.run("doctor").returncode == 0
    assert (machine.folder / "installed").exists()


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        ("te220_sm90_site.tar.xz", "te220_sm90_site.tar.xz is missing; put it into the folder of"),
        ("megatron_core-0.19.2-cp312.whl", "has no megatron_core-*.whl; download the wheels"),
    ],
)
def test_a_missing_file_is_named(machine: Machine, missing: str, message: str) -> None:
    (machine.carried / missing).unlink()
    done = machine.run("doctor")
    assert done.returncode == 2
    assert message in done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("everything",), "no stage 'everything'; stages of tools/gpu_check.sh"),
        (("doctor", "--engine", "3"), "--engine is 3; use te220 or te217"),
        (("doctor", "--output", "x"), "unknown option --output; use --carried"),
        (("doctor", "tests"), "two stages, doctor and tests; give one"),
        (("doctor", "--out"), "--out needs a value"),
    ],
)
def test_wrong_arguments_are_refused(
    machine: Machine, arguments: tuple[str, ...], message: str
) -> None:
    done = machine.run(*arguments)
    assert done.returncode == 2
    assert message in done.stderr


def test_a_failing_stage_says_so_and_its_arguments_go_to_the_last_command(machine: Machine) -> None:
    script = PYTHON.format(folder=machine.folder) + '[[ $* != *"-m pytest"* ]]\n'
    write_script(machine.python, script)
    done = machine.run("equality", "--", "-k", "FP8 delayed")
    assert done.returncode == 1
    assert "stage equality: FAILED (1)" in done.stdout
    assert machine.calls()[-1].endswith("tests/gpu/test_stock.py -k FP8 delayed")
    assert (machine.out / "equality.log").is_file()


def test_plugins_that_happen_to_be_installed_are_left_out(machine: Machine) -> None:
    write_script(machine.python, PYTHON.format(folder=machine.folder) + "env >>calls\n")
    machine.run("resume")
    assert "PYTEST_DISABLE_PLUGIN_AUTOLOAD=1" in (machine.folder / "calls").read_text().splitlines()
    assert machine.calls()[-1].startswith("-m pytest -p pytest_timeout -m gpu --measured")


def test_a_ninth_file_or_a_deep_folder_is_reported(machine: Machine) -> None:
    machine.out.mkdir()
    for number in range(8):
        (machine.out / f"{number}.json").touch()
    done = machine.run("doctor")
    assert done.returncode == 2
    assert "holds 9 files, more than 8; give another --out" in done.stderr


def test_a_sweep_goes_on_from_the_table_that_came_back(machine: Machine) -> None:
    machine.out.mkdir()
    (machine.out / "sweep-sp.csv").write_text("rows\n")
    assert machine.run("sweep-sp").returncode == 0
    assert (machine.folder / "site/sweep-sp/runs.csv").read_text() == "rows\n"
    run, status = machine.calls()
    assert run.startswith("-m megatron_mup sweep run examples/mup_against_sp_gpu/sweep.yaml --out")
    assert "--gpu-share 4" in run
    assert status.endswith("--json")


def test_a_sweep_takes_the_text_that_was_carried(machine: Machine) -> None:
    assert machine.run("sweep-fp8").returncode == 0
    assert "--text" not in machine.calls()[0]
    text = machine.carried / "text.jsonl.xz"
    text.touch()
    assert machine.run("sweep-fp8", "--", "--max-cells", "1").returncode == 0
    assert machine.calls()[2].endswith(f"--threads 1 --text {text} --max-cells 1")


def documented_download() -> str:
    """The command of docs/gpu.md that downloads the wheels."""
    (block,) = re.findall(r"```bash\n(\{ grep .*?)\n```", (ROOT / "docs/gpu.md").read_text(), re.S)
    return str(block)


def test_every_wheel_of_the_download_stands_in_the_lock(tmp_path: Path) -> None:
    pattern = re.search(r"\^\(([^)]*)\)==", documented_download())
    assert pattern is not None
    wanted = pattern.group(1).split("|")
    caught = write_script(tmp_path / "python3.12", "#!/bin/sh\ncat\n")
    done = subprocess.run(
        ["bash", "-c", documented_download()],
        cwd=ROOT,
        env={**os.environ, "PATH": f"{caught.parent}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        check=True,
    )
    named = [line.split("==")[0] for line in done.stdout.splitlines()]
    # TransformerEngine's, and in no lock of this package.
    assert sorted(named) == sorted([*wanted, "einops"])


# What torch brings along, and what is in the archive of TransformerEngine.
WITH_TORCH = {"torch", "triton", "sympy", "mpmath", "networkx", "fsspec", "typing_extensions"}
WITH_TORCH |= {"setuptools", "filelock", "Jinja2", "MarkupSafe"}
WITH_ENGINE = {"pydantic", "pydantic_core", "annotated-types", "typing-inspection"}

# A package that the download leaves out cannot be imported: what it would provide is hidden.
PROBE = """
import importlib.machinery, importlib.metadata, sys
import torch
allowed = set(sys.argv[1].split(","))
owners = importlib.metadata.packages_distributions()
class Hidden:
    def create_module(self, spec):
        raise ModuleNotFoundError(spec.name, name=spec.name)
    def exec_module(self, module):
        pass
class Finder:
    def find_spec(self, name, path=None, target=None):
        owned = owners.get(name.split(".")[0])
        if owned and not allowed & set(owned):
            return importlib.machinery.ModuleSpec(name, Hidden())
sys.meta_path.insert(0, Finder())
for name in sys.argv[2:]:
    __import__(name)
"""


def test_the_download_has_all_that_the_stages_import() -> None:
    pattern = re.search(r"\^\(([^)]*)\)==", documented_download())
    assert pattern is not None
    allowed = {*pattern.group(1).split("|"), *WITH_TORCH, *WITH_ENGINE, "megatron-mup"}
    # Optional parts of torch, which are looked for and imported if found.
    allowed |= {"dill", "tqdm", "xxhash"}
    modules = [
        "megatron_mup.cli",
        "megatron_mup.benchmark.gpu_speed",
        "megatron_mup.benchmark.stage",
        "megatron_mup.training.loop",
        "megatron_mup.transfer.sweep.session",
        "megatron_mup.transfer.sweep.worker",
        "pytest_timeout",
        "tests.conftest",
        *(
            f"tests.gpu.{path.stem}"
            for path in sorted((ROOT / "tests/gpu").glob("test_*.py"))
            if path.stem != "test_check_functions"
        ),
    ]
    done = subprocess.run(
        [sys.executable, "-c", PROBE, ",".join(allowed), "megatron_mup.platform", *modules],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
