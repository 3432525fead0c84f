"""A machine to launch training from: stand-ins for sbatch, torchrun and megatron-mup."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[1]
TOOLS = (
    *("awk", "basename", "bash", "cat", "dirname", "env", "grep", "mkdir", "paste", "realpath"),
    *("rm", "sed", "seq", "setsid", "sleep", "stat", "timeout", "uname", "wc"),
)

# Notes what it is asked, and the array that the environment asks for.
SBATCH = """#!/bin/bash
printf '%s\\n' "$@" "array=${SBATCH_ARRAY_INX:-}" "rates=${SWEEP_RATES:-}" \\
    "memory=${SLURM_MEM_PER_CPU:-}" '' >>"$FOLDER/jobs"
echo "Submitted batch job $((10 + $(grep -c '^$' "$FOLDER/jobs")))"
"""

# Starts ranks as torchrun does: sessions of their own; its own exit code is 0 or 1.
TORCHRUN = """#!/bin/bash
while [[ $1 != --no-python ]]; do
    [[ $1 != --nproc-per-node ]] || count=$2
    shift
done
for rank in $(seq 0 $((count - 1))); do
    RANK=$rank setsid --wait "${@:2}" &
done
code=0
for rank in $(jobs -p); do wait "$rank" || code=1; done
exit $code
"""

# Notes its calls; does in `train` what the test wrote, and decides from a list.
COMMAND = """#!/bin/bash
echo "${RANK:-} ${GIVEN:-} $*" >>"$FOLDER/calls"
case "$1 $2" in
    "launch begin")
        [[ ! -e $FOLDER/mistake ]] || { cat "$FOLDER/mistake" >&2; exit 2; }
        mkdir -p "$4/launch/outcomes"
        printf '%s\\n' GIVEN=yes "MEGATRON_MUP_OUTCOMES=$4/launch/outcomes"
        ;;
    "launch preflight") [[ ! -e $FOLDER/bad_nodes ]] || exit 1 ;;
    "launch judge") [[ ! -e $FOLDER/bad_nodes ]] || exit 79 ;;
    "launch decide") head -n 1 "$FOLDER/decisions" && sed -i 1d "$FOLDER/decisions" ;;
    "train "*) source "$FOLDER/train" ;;
    "status --json") cat "$3/status.json" ;;
esac
"""


class Machine:
    """A folder to launch from, and a checkout with a site's settings."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.work = folder, folder / "my work"
        self.project = folder / "the project"
        shutil.copytree(ROOT / "launch", self.project / "launch")
        (self.project / "launch/env").unlink(missing_ok=True)
        for each in (self.work, folder / "bin", folder / "tools"):
            each.mkdir()
        for name, text in {"sbatch": SBATCH, "torchrun": TORCHRUN, "megatron-mup": COMMAND}.items():
            (folder / "bin" / name).write_text(text)
            (folder / "bin" / name).chmod(0o755)
        for name in (*TOOLS, "head"):
            (folder / "tools" / name).symlink_to(str(shutil.which(name)))
        (folder / "calls").touch()
        self.decide("finished")
        self.train("")
        self.env = {
            "PATH": f"{folder}/bin:{folder}/tools",
            "FOLDER": str(folder),
            "MEGATRON_MUP": f"{folder}/bin/megatron-mup",
        }

    def decide(self, *lines: str) -> None:
        (self.folder / "decisions").write_text("".join(f"{line}\n" for line in lines))

    def train(self, lines: str) -> None:
        (self.folder / "train").write_text(lines)

    def start(self, script: str, *arguments: str, **env: str) -> subprocess.Popen[str]:
        # A shell cannot trap a signal that its parent ignores, as nohup's children do with Ctrl-C.
        default = ("/usr/bin/env", "--default-signal=INT")
        return subprocess.Popen(
            [*default, "bash", self.project / f"launch/{script}.sh", *arguments],
            cwd=self.work,
            env=self.env | env,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def launch(self, script: str, *arguments: str, **env: str) -> tuple[int, str, str]:
        process = self.start(script, *arguments, **env)
        out, err = process.communicate(timeout=60)
        return process.returncode, out, err

    def here(self, *arguments: str, **env: str) -> tuple[int, str, str]:
        settings = {"LAUNCHER": "torchrun", "GPUS_PER_NODE": "2", "LR": "0.5"}
        return self.launch("mup_10b", *arguments, **(settings | env))

    def calls(self, start: str = "") -> list[str]:
        """What megatron-mup was called with, behind its rank and a variable of the attempt."""
        lines = (self.folder / "calls").read_text().splitlines()
        return [line for line in lines if line.split(" ", 2)[2].startswith(start)]

    def jobs(self) -> list[list[str]]:
        text = (self.folder / "jobs").read_text() if (self.folder / "jobs").exists() else ""
        return [job.splitlines() for job in text.split("\n\n") if job]
