"""Launch scripts up to the submission: a stand-in for sbatch notes what it is asked."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SCRIPTS = [*sorted((ROOT / "launch").glob("*.sh")), ROOT / "launch/env.example"]
GOOD = ["--input", "a.jsonl", "b c.jsonl", "--tokenizer-model", "m.model", "--output-prefix", "o/x"]

# One line an argument, an empty line after each call; job ids count up from 11. Refuses the call
# whose number is in the file `refused`.
FAKE_SBATCH = """#!/bin/bash
number=$((10 + $(grep -c '^$' "$CALLS" 2>/dev/null) + 1))
printf '%s\\n' "$@" '' >>"$CALLS"
[[ $number != "${REFUSED:-}" ]] || { echo "sbatch: error: no" >&2; exit 1; }
echo "$number;cluster"
"""


class Login:
    """A folder on a login node, with a checkout that lies elsewhere."""

    def __init__(self, folder: Path) -> None:
        self.project = folder / "the project"
        self.folder = folder / "here"
        self.folder.mkdir()
        self.calls = folder / "calls"
        shutil.copytree(ROOT / "launch", self.project / "launch")
        (self.project / "launch/env").unlink(missing_ok=True)
        for name, text in {
            "sbatch": FAKE_SBATCH,
            "scancel": '#!/bin/bash\nprintf "%s\\n" scancel "$@" "" >>"$CALLS"\n',
            "megatron-mup": "#!/bin/bash\n",
        }.items():
            path = folder / "bin" / name
            path.parent.mkdir(exist_ok=True)
            path.write_text(text)
            path.chmod(0o755)
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM", "SBATCH"))}
        path = f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}"
        self.env = kept | {"PATH": path, "CALLS": str(self.calls)}

    def launch(self, *arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["bash", self.project / "launch/preprocess.sh", *arguments],
            cwd=self.folder,
            env=self.env | env,
            capture_output=True,
            text=True,
            timeout=60,
        )

    def submitted(self) -> list[list[str]]:
        if not self.calls.exists():
            return []
        return [call.splitlines() for call in self.calls.read_text().split("\n\n") if call]


@pytest.fixture
def login(tmp_path: Path) -> Login:
    return Login(tmp_path)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_are_valid_bash(script):
    subprocess.run(["bash", "-n", script], check=True, timeout=60)


def test_an_array_and_a_job_after_it_get_the_arguments_unchanged(login):
    result = login.launch(*GOOD, PARTS="3")

    assert result.returncode == 0, result.stderr
    logs = login.folder / "logs/preprocess"
    script = str(login.project / "launch/preprocess.sh")
    assert login.submitted() == [
        [
            *("--parsable", "--export=ALL", "--requeue", "--open-mode=append", "--array=0-2"),
            *(f"--output={logs}/%x-%A_%a.out", script, "part", *GOOD),
        ],
        [
            *("--parsable", "--export=ALL", "--requeue", "--open-mode=append"),
            *("--dependency=afterany:11", "--job-name=preprocess-finish"),
            *(f"--output={logs}/%x-%j.out", script, "finish", "none", *GOOD),
        ],
    ]
    assert result.stdout == (
        "parts:  job 11, 3 tasks\n"
        "finish: job 12 makes and checks the shards when all parts have ended\n"
        f"logs:   {logs}\n"
    )
    # A job whose log has no folder fails without a word.
    assert logs.is_dir()


@pytest.mark.parametrize(
    ("arguments", "env", "message"),
    [
        ([], {}, "--input is missing"),
        (GOOD[3:], {}, "--input is missing"),
        (GOOD[:3] + GOOD[5:], {}, "--tokenizer-model is missing"),
        (GOOD[:5], {}, "--output-prefix is missing"),
        ([*GOOD[:5], "--output-prefix"], {}, "--output-prefix has no value; pass a path"),
        (["--input", *GOOD[3:]], {}, "--input has no value"),
        (["--input=", *GOOD[3:]], {}, "--input has no value"),
        ([*GOOD[:4], *GOOD[5:]], {}, "--tokenizer-model has no value"),
        ([*GOOD[:4], "", *GOOD[5:]], {}, "--tokenizer-model has no value"),
        ([*GOOD[:5], "--output-prefix="], {}, "--output-prefix is missing"),
        ([*GOOD, "--part", "1/2"], {}, "--part"),
        ([*GOOD, "--part=1/2"], {}, "--part"),
        (["--input", "-", *GOOD[3:]], {}, "standard input"),
        (["--input=-", *GOOD[3:]], {}, "standard input"),
        (GOOD, {"PARTS": "0"}, "PARTS is 0"),
        (GOOD, {"PARTS": "two"}, "PARTS is two"),
        ([*GOOD, "PARTS=4"], {}, "PARTS=4 is given as an argument"),
        (GOOD, {"SLURM_ARRAY_TASK_ID": "1"}, "leave it out and set PARTS"),
        (GOOD, {"MEGATRON_MUP": "/no/such/command"}, "/no/such/command is not there"),
    ],
)
def test_mistakes_are_refused_before_anything_is_submitted(login, arguments, env, message):
    result = login.launch(*arguments, **env)

    assert result.returncode == 2
    assert result.stderr.startswith("error: ")
    assert message in result.stderr
    assert login.submitted() == []


def test_help_is_the_comment_at_the_top_and_submits_nothing(login):
    # Wherever it stands, and before anything is looked for.
    for arguments in (["--help"], [*GOOD, "--help"]):
        result = login.launch(*arguments, MEGATRON_MUP="/no/such/command")

        assert (result.returncode, result.stderr) == (0, "")
        lines = result.stdout.splitlines()
        assert lines[0].startswith("Make token shards on many machines")
        assert "PARTS; WORKERS, processes of a job" in result.stdout
        assert not any(line.startswith("#") or "SBATCH" in line for line in lines)
    assert login.submitted() == []


def test_without_sbatch_the_way_by_hand_is_told(login, tmp_path):
    needed = ("bash", "cat", "dirname", "mkdir", "realpath", "sed", "stat")
    (tmp_path / "few").mkdir()
    for name in needed:
        (tmp_path / "few" / name).symlink_to(str(shutil.which(name)))
    (tmp_path / "few/megatron-mup").symlink_to(tmp_path / "bin/megatron-mup")

    result = login.launch(*GOOD, PATH=str(tmp_path / "few"))

    assert result.returncode == 2
    assert result.stderr.startswith("error: sbatch is not there")
    assert "megatron-mup data preprocess ... --part i/N" in result.stderr
    assert list(login.folder.iterdir()) == []


def test_an_array_that_is_refused_ends_with_a_message(login):
    result = login.launch(*GOOD, REFUSED="11")

    assert result.returncode == 2
    assert "sbatch refused the jobs (see above); nothing was submitted" in result.stderr
    assert len(login.submitted()) == 1


def test_finished_output_is_refused_unless_it_is_to_be_replaced(login):
    (login.folder / "o").mkdir()
    (login.folder / "o/x.manifest.json").touch()

    refused = login.launch(*GOOD)
    assert refused.returncode == 2
    assert "output exists: o/x.manifest.json; pass --overwrite" in refused.stderr
    assert login.submitted() == []

    assert login.launch(*GOOD, "--overwrite").returncode == 0
    (login.folder / "o/x.work").mkdir()
    assert login.launch(*GOOD).returncode == 0


def test_the_array_is_cancelled_when_the_job_after_it_is_refused(login):
    result = login.launch(*GOOD, REFUSED="12")

    assert result.returncode == 2
    assert "the last job was refused" in result.stderr
    assert login.submitted()[2] == ["scancel", "11"]
    assert "parts:" not in result.stdout


def test_settings_of_the_site_reach_every_job(login):
    (login.project / "launch/env").write_text(
        "SITE_OPTIONS=(--partition=cpu --comment='two words')\nPARTS=2\nLOGS='my logs'\n"
    )

    result = login.launch(*GOOD)

    assert result.returncode == 0, result.stderr
    for call in login.submitted():
        assert call[4:6] == ["--partition=cpu", "--comment=two words"]
        assert any(option.startswith(f"--output={login.folder}/my logs/") for option in call)
    assert "--array=0-1" in login.submitted()[0]


def test_the_command_of_the_site_may_have_several_words(login):
    (login.project / "launch/env").write_text('MEGATRON_MUP=(echo "in a container")\n')

    result = login.launch(
        *("part", *GOOD),
        **{"SLURM_ARRAY_TASK_ID": "2", "SLURM_ARRAY_TASK_COUNT": "4", "SLURM_CPUS_PER_TASK": "6"},
    )

    assert result.stdout == (
        "in a container data preprocess --workers 6 --part 3/4 " + " ".join(GOOD) + "\n"
    )
