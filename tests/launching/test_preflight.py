"""The preflight as several processes run it, and how it ends when one of them does not come."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from megatron_mup.launching import beginning
from megatron_mup.launching.source_code import SourceCode
from tests.launching.run_folders import began

pytestmark = pytest.mark.dist

_NO_CODE = SourceCode(
    root=Path("/nowhere"), commit=None, difference=None, untracked=(), origin=None, revision="x",
    lock=None,
)  # fmt: skip

# A machine whose clock is fast, as the process sees it.
_FAST = (
    "import time, sys\n"
    "now = time.time\n"
    "time.time = lambda: now() + 9.0\n"
    "from megatron_mup.cli import main\n"
    "main()\n"
)

# A machine whose disk never answers.
_HUNG = (
    "import threading\n"
    "from megatron_mup.launching import preflight\n"
    "preflight.check_machine = lambda *_, **__: threading.Event().wait()\n"
    "from megatron_mup.cli import main\n"
    "main()\n"
)


@pytest.fixture
def run_dir(config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(beginning, "find_source_code", lambda: _NO_CODE)
    began(config, tmp_path / "run", "distributed_timeout_minutes=2.5")
    return tmp_path / "run"


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def start(
    run_dir: Path, rank: int, world_size: int, port: int, *options: str, code: str | None = None
) -> subprocess.Popen[str]:
    """A rank on a node of its own."""
    environment = {
        **os.environ,
        "RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_RANK": "0",
        "LOCAL_WORLD_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "SLURMD_NODENAME": f"n{rank + 1}",
        "MEGATRON_MUP_ATTEMPT": "1",
    }
    command = ["-m", "megatron_mup"] if code is None else ["-c", code]
    return subprocess.Popen(
        [sys.executable, *command, "launch", "preflight", "--run-dir", str(run_dir),
         "--min-free-gb", "0", *options],
        env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


def output_of(rank: subprocess.Popen[str]) -> str:
    try:
        return rank.communicate(timeout=240)[0]
    finally:
        rank.kill()


def report(run_dir: Path, rank: int) -> dict[str, Any]:
    path = run_dir / "launch" / "preflight" / "0001" / f"rank-{rank:05d}.json"
    found: dict[str, Any] = json.loads(path.read_text())
    return found


def test_ranks_meet_and_the_one_with_the_wrong_clock_says_so(run_dir: Path) -> None:
    port = free_port()
    # The median of three clocks is that of the two that agree.
    ranks = [start(run_dir, rank, 3, port, code=_FAST if rank == 2 else None) for rank in range(3)]
    outputs = [output_of(rank) for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0, 79], outputs
    assert "preflight: all-reduce " in outputs[0]
    for rank in range(3):
        found = report(run_dir, rank)
        assert (found["rank"], found["node"], found["stage"]) == (rank, f"n{rank + 1}", 3)
        assert found["notes"]["all-reduce"].endswith(" GB/s")
        assert found["versions"]["python"] == ".".join(map(str, sys.version_info[:3]))
    assert report(run_dir, 0)["failures"] == report(run_dir, 1)["failures"] == {}
    assert list(report(run_dir, 2)["failures"]) == ["clock"]
    assert re.match(r"off by \+(8\.|9\.)", report(run_dir, 2)["failures"]["clock"])


def test_a_rank_whose_peer_never_comes_gives_up_and_has_said_where(run_dir: Path) -> None:
    lonely = start(run_dir, 0, 2, free_port(), "--timeout-seconds", "8")
    output = output_of(lonely)
    assert lonely.returncode == 76, output
    assert report(run_dir, 0)["stage"] == 1
    judged = subprocess.run(
        [sys.executable, "-m", "megatron_mup", "launch", "judge", "--run-dir", str(run_dir),
         "--nodes", "n1,n2", "--tasks-per-node", "1"],
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert judged.returncode == 79
    assert judged.stdout == "n2: never reported: the node, its network or its file system is down\n"


def test_a_rank_whose_own_machine_hangs_is_ended_and_has_said_so(run_dir: Path) -> None:
    hung = start(run_dir, 0, 2, free_port(), "--timeout-seconds", "1", code=_HUNG)
    output = output_of(hung)
    assert hung.returncode == 76, output
    assert "rank 0 on n1 is not done after 1 s, at stage 'started': ending" in output
    assert report(run_dir, 0)["stage"] == 0
