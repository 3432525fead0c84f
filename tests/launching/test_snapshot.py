"""What a snapshot holds, when a new one is made, and that no secret gets into the run folder."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import tarfile
from pathlib import Path

import pytest

from megatron_mup.launching import beginning
from megatron_mup.launching.snapshot import kept_environment
from megatron_mup.launching.source_code import find_source_code
from tests.launching.run_folders import began, write_config

SECRETS = {
    "environment": "envsecret-Zq81",
    "allowed prefix": "nccltokenZq82",
    "jwt": "slurmjwtZq83",
    "pasted value": "pastedZq84value",
    "remote": "remotepassZq85",
    "diff assignment": "diffkeyZq86abc",
    "diff netrc": "netrcpassZq87",
    "dotenv file": "dotenvZq88",
    "launch env": "launchenvZq89",
    "credential file": "credfileZq90",
    "committed token": "hf_committedZq91ABCDEFGHIJ",
    "committed literal": "Zq92committedliteral0123456789",
    "url in config": "configurlZq93",
    "comment in config": "configcommentZq94",
    "url in environment": "proxyZq95",
    "private key": "privatekeyZq96",
}


def git(folder: Path, *arguments: str) -> None:
    identity = ("-c", "user.name=a", "-c", "user.email=a@b")
    subprocess.run(
        ["git", *identity, *arguments], cwd=folder, check=True, capture_output=True, timeout=60
    )


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkout of a small package that the launch takes for this one."""
    root = tmp_path / "project"
    (root / "pack").mkdir(parents=True)
    (root / "launch").mkdir()
    (root / "pack" / "__init__.py").write_text("x = 1\n")
    (root / "requirements.lock").write_text("torch==2.11\n")
    git(root, "init", "--quiet")
    git(root, "add", ".")
    git(root, "commit", "--quiet", "--message", "first")
    package = root / "pack"
    monkeypatch.setattr(beginning, "find_source_code", lambda: find_source_code(package))
    return root


def texts(folder: Path) -> dict[str, str]:
    """Everything in a run folder, archives opened, by name."""
    found = {}
    for path in folder.rglob("*"):
        if path.suffix == ".gz":
            with tarfile.open(path) as archive:
                for member in archive:
                    stream = archive.extractfile(member)
                    assert stream is not None
                    found[f"{path.name}/{member.name}"] = stream.read().decode("latin-1")
        elif path.is_file():
            found[path.name] = path.read_bytes().decode("latin-1")
    return found


def test_a_snapshot_holds_what_the_run_was_made_of(project: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path)
    (project / "pack" / "__init__.py").write_text("x = 2\n")
    (project / "pack" / "new.py").write_text("")
    began(config, tmp_path / "run")
    folder = tmp_path / "run" / "launch" / "snapshot"
    with tarfile.open(folder / "code.tar.gz") as archive:
        stream = archive.extractfile("code/pack/__init__.py")
        assert stream is not None
        assert stream.read() == b"x = 1\n"
        assert sorted(archive.getnames()) == ["code/pack/__init__.py", "code/requirements.lock"]
    assert "-x = 1\n+x = 2\n" in (folder / "uncommitted.diff").read_text()
    assert json.loads((folder / "snapshot.json").read_text())["untracked"] == ["pack/new.py"]
    assert (folder / "config.given.yaml").read_text() == config.read_text()
    resolved = tmp_path / "run" / "launch" / "config.yaml"
    assert (folder / "config.yaml").read_text() == resolved.read_text()
    assert (folder / "requirements.lock").read_text() == "torch==2.11\n"
    packages = (folder / "packages.txt").read_text().splitlines()
    assert any(line.startswith("torch==") for line in packages)
    with (folder / "parameters.csv").open(newline="") as stream:
        rows = {row["name"]: row for row in csv.DictReader(stream)}
    query = rows["decoder.layers.0.self_attention.linear_qkv.weight.query"]
    # Width 64 over base 32 at alpha 2^-6.
    assert (query["shape"], float(query["lr"])) == ("64x64", 0.0078125)
    assert "query" in (folder / "parameters.txt").read_text()


def test_a_snapshot_is_made_anew_only_for_what_changed(project: Path, tmp_path: Path) -> None:
    config, run_dir, said = write_config(tmp_path), tmp_path / "run", list[str]()

    def names() -> list[str]:
        began(config, run_dir, said=said)
        return sorted(path.name for path in (run_dir / "launch").glob("snapshot*"))

    assert names() == ["snapshot"]
    assert names() == ["snapshot"]
    assert said == []
    (project / "pack" / "__init__.py").write_text("x = 3\n")
    assert names() == ["snapshot", "snapshot-0002"]
    assert said == [
        "warning: code changed since the attempt before: see "
        f"{run_dir}/launch/snapshot-0002 beside the snapshots before it"
    ]
    assert names() == ["snapshot", "snapshot-0002"]
    assert list((run_dir / "launch").glob(".*")) == []


def test_an_installed_package_is_copied_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "site" / "pack"
    (package / "part").mkdir(parents=True)
    (package / "__init__.py").write_text("x = 1\n")
    (package / "part" / "code.py").write_text("y = 1\n")
    (package / "__pycache__").mkdir()
    (package / "__pycache__" / "code.pyc").write_text("")
    monkeypatch.setattr(beginning, "find_source_code", lambda: find_source_code(package))
    began(write_config(tmp_path), tmp_path / "run")
    with tarfile.open(tmp_path / "run" / "launch" / "snapshot" / "code.tar.gz") as archive:
        assert sorted(archive.getnames()) == ["code/pack/__init__.py", "code/pack/part/code.py"]


def plant(project: Path, config: Path) -> dict[str, str]:
    """Put each secret where users leave them; the environment to begin in."""
    committed = project / "pack" / "push.py"
    committed.write_text(
        f'login("{SECRETS["committed token"]}")\nAPI_KEY = "{SECRETS["committed literal"]}"\n'
    )
    (project / "launch" / "env").write_text(f"export SITE={SECRETS['launch env']}\n")
    (project / ".env").write_text(f"A={SECRETS['dotenv file']}\n")
    (project / "credentials.json").write_text(SECRETS["credential file"])
    git(project, "add", "--force", ".")
    git(project, "commit", "--quiet", "--message", "second")
    git(project, "remote", "add", "origin", f"https://me:{SECRETS['remote']}@host.example/repo.git")
    committed.write_text(
        f"WANDB_API_KEY={SECRETS['diff assignment']}\n"
        f"machine api.wandb.ai login user password {SECRETS['diff netrc']}\n"
        f"use({SECRETS['pasted value']!r})\n"
        f"-----BEGIN RSA PRIVATE KEY-----\n{SECRETS['private key']}\n"
    )
    (project / ".env").write_text(f"A={SECRETS['dotenv file']}2\n")
    config.write_text(
        f"# https://me:{SECRETS['url in config']}@host/data\n"
        f"# WANDB_API_KEY={SECRETS['comment in config']}\n{config.read_text()}"
    )
    return {
        "WANDB_API_KEY": SECRETS["environment"],
        "NCCL_TOKEN": SECRETS["allowed prefix"],
        "SLURM_JWT": SECRETS["jwt"],
        "SITE_PASSWORD": SECRETS["pasted value"],
        "NCCL_PROXY": f"http://me:{SECRETS['url in environment']}@proxy:80",
        "NCCL_DEBUG": "WARN",
        "HOME_OF_ALL": SECRETS["environment"],
    }


def test_no_secret_reaches_the_run_folder(project: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path)
    environment = plant(project, config)
    request = beginning.BeginRequest(
        run_dir=tmp_path / "run", config=config, world_size=1, lr=0.015625
    )
    beginning.begin(request, environment, lambda _line: None)
    found = texts(tmp_path / "run")
    leaks = [
        (kind, name)
        for kind, secret in SECRETS.items()
        for name, text in found.items()
        if secret in text
    ]
    assert leaks == []
    # What the run was made of is there all the same.
    assert "NCCL_DEBUG=WARN" in found["environment.txt"]
    assert "NCCL_PROXY=http://***@proxy:80" in found["environment.txt"]
    assert "host.example/repo.git" in found["snapshot.json"]
    assert "code.tar.gz/code/pack/push.py" in found
    about = json.loads(found["snapshot.json"])
    assert about["left_out"] == 3
    assert about["masked"] == ["pack/push.py"]


def test_of_the_environment_only_harmless_names_of_the_libraries_are_kept() -> None:
    environment = {
        "NCCL_DEBUG": "WARN",
        "NCCL_TOKEN": "x1",
        "SLURM_JWT": "x2",
        "HOME": "/home/me",
        "MY_NCCL_DEBUG": "x3",
        "SLURM_JOB_ID": "7",
    }
    assert kept_environment(environment, []) == "NCCL_DEBUG=WARN\nSLURM_JOB_ID=7\n"


def test_the_batch_script_is_kept_without_its_secrets(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    programs = tmp_path / "bin"
    programs.mkdir()
    # What scontrol prints for `write batch_script 77 -` and `show job 77`.
    (programs / "scontrol").write_text(
        "#!/bin/sh\n"
        '[ "$1 $2 $3 $4" = "write batch_script 77 -" ] && '
        'printf "#!/bin/bash\\n#SBATCH --nodes=2\\nexport WANDB_API_KEY=s3cr3tvalue\\n"\n'
        '[ "$1 $2 $3" = "show job 77" ] && echo "JobId=77 Command=run.sh --token=s3cr3tvalue"\n'
        "exit 0\n"
    )
    (programs / "scontrol").chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    request = beginning.BeginRequest(
        run_dir=tmp_path / "run", config=write_config(tmp_path), world_size=1, lr=0.015625
    )
    beginning.begin(request, {"SLURM_JOB_ID": "77"}, lambda _line: None)
    folder = tmp_path / "run" / "launch" / "snapshot"
    script = (folder / "script.sh").read_text()
    assert script == "#!/bin/bash\n#SBATCH --nodes=2\nexport WANDB_API_KEY=***\n"
    assert (folder / "job.txt").read_text() == "JobId=77 Command=run.sh --token=***\n"
