"""Ranks that die or hang: what the others say, with which code and how soon they end."""

from __future__ import annotations

import json
import os
import sys
import threading
from pathlib import Path

import pytest
import torch.distributed as dist

from megatron_mup.errors import CheckpointError, DataError, PeerLostError
from megatron_mup.training.peers import is_lost_peer, prompt_farewell, translate_lost_peers
from tests.configurations import tiny
from tests.distributed.spawn import run_ranks
from tests.training.faulty_ranks import DEADLINE_SECONDS, HANG_MINUTES

CLOSED = RuntimeError(
    "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:547] Connection closed by peer "
    "[127.0.0.1]:8118"
)


@pytest.mark.parametrize(
    "error",
    [
        CLOSED,
        RuntimeError(
            "[/pytorch/third_party/gloo/gloo/transport/tcp/unbound_buffer.cc:78] Timed out waiting "
            "3000ms for recv operation to complete"
        ),
        RuntimeError(
            "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:538] Read error "
            "[127.0.0.1]:53984: Connection reset by peer"
        ),
        dist.DistNetworkError(
            "Failed to recv, got 0 bytes. Connection was likely closed. Did the remote server "
            "shutdown or crash?"
        ),
        dist.DistStoreError("Timed out after 4 seconds waiting for clients. 1/2 clients joined."),
        dist.DistBackendError("NCCL communicator was aborted on rank 3."),
        dist.DistBackendError(
            "NCCL error in: ProcessGroupNCCL.cpp:3699, remote process exited or there was a "
            "network error, NCCL version 2.27.5\nncclRemoteError: A call failed possibly due to a "
            "network error or a remote process exiting prematurely."
        ),
    ],
)
def test_what_collectives_raise_when_a_rank_is_gone_is_recognized(error: Exception) -> None:
    assert is_lost_peer(error)


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("mat1 and mat2 shapes cannot be multiplied (4x8 and 9x4)"),
        RuntimeError(
            "[enforce fail at /pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:446] "
            "op.preamble.length <= op.nbytes. 8 vs 4"
        ),
        RuntimeError("DataLoader timed out after 5 seconds"),
        ConnectionResetError(104, "Connection reset by peer"),
        TimeoutError("timed out"),
        dist.DistBackendError("ncclUnhandledCudaError: Call to CUDA function failed."),
        dist.DistNetworkError(
            "The server socket has failed to listen on any local network "
            "address. port: 29500, EADDRINUSE: address already in use"
        ),
        DataError("/gloo/ timed out"),
    ],
)
def test_other_errors_are_not_renamed(error: Exception) -> None:
    assert not is_lost_peer(error)
    with pytest.raises(type(error)) as caught, translate_lost_peers(tiny(), 0):
        raise error
    assert caught.value is error


def fail_at_step_41() -> None:
    with translate_lost_peers(tiny(), 5) as here:
        here.iteration = lambda: 41
        raise CLOSED


def fail_again_in_the_farewell(first: Exception) -> None:
    """An error whose handling meets a closed connection."""
    with translate_lost_peers(tiny(), 0):
        try:
            raise first
        finally:
            raise RuntimeError(*CLOSED.args)


def test_the_message_says_who_where_why_and_what_to_do() -> None:
    with pytest.raises(PeerLostError) as caught:
        fail_at_step_41()
    assert str(caught.value) == (
        "rank 5 lost another rank after iteration 41 "
        "([/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:547] Connection closed by peer "
        "[127.0.0.1]:8118). Another rank died or hung: the first error in the logs of the other "
        "ranks says why. If it was only slow, raise parallel.distributed_timeout_minutes, now 10. "
        "Start the run again to continue from its last checkpoint"
    )
    assert caught.value.exit_code == 76
    assert caught.value.__cause__ is CLOSED


def test_a_rank_that_was_never_there_is_possible_before_the_first_step() -> None:
    expected = "before the first step .*Another rank died, hung or was never started"
    with pytest.raises(PeerLostError, match=expected), translate_lost_peers(tiny(), 0):
        raise dist.DistStoreError("Timed out after 4 seconds waiting for clients. 1/2 joined.")


def test_an_error_that_was_made_from_a_lost_connection_is_one() -> None:
    with pytest.raises(PeerLostError), translate_lost_peers(tiny(), 0):
        raise CheckpointError("cannot load checkpoint") from CLOSED


def test_an_own_user_error_comes_through_a_farewell_that_fails() -> None:
    with pytest.raises(DataError, match="sample 12"):
        fail_again_in_the_farewell(DataError("sample 12 is damaged"))


def test_an_own_defect_is_named_beside_the_lost_connection() -> None:
    expected = r"This came while handling ValueError: a defect\."
    with pytest.raises(PeerLostError, match=expected):
        fail_again_in_the_farewell(ValueError("a defect"))


@pytest.mark.parametrize(("error", "code"), [(DataError("x is bad"), 2), (KeyError("defect"), 1)])
def test_a_farewell_that_hangs_ends_the_process(
    tmp_path: Path, error: Exception, code: int
) -> None:
    log = tmp_path / "stderr"
    child = os.fork()
    if child == 0:
        sys.stderr = log.open("w")
        with prompt_farewell(error, seconds=0.05):
            threading.Event().wait(DEADLINE_SECONDS)
        os._exit(99)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == code
    assert str(error) in log.read_text()
    assert "the process group was not left in 0.05 s" in log.read_text()


def test_a_farewell_in_time_ends_nothing() -> None:
    before = threading.active_count()
    with prompt_farewell(DataError("x"), seconds=600):
        assert threading.active_count() == before + 1
    for thread in threading.enumerate():
        if isinstance(thread, threading.Timer):
            thread.join(DEADLINE_SECONDS)
    assert threading.active_count() == before


@pytest.mark.dist
def test_the_other_ranks_end_soon_and_say_why(tmp_path: Path) -> None:
    run_ranks("tests.training.faulty_ranks", {"world_size": 1}, tmp_path)
    endings = json.loads((tmp_path / "endings.json").read_text())
    codes = {name: [ending["code"] for ending in found] for name, found in endings.items()}
    assert codes == {
        "killed": [76, -9, 76],
        "killed_store": [-9, 76, 76],
        "killed_stage": [76, -9],
        # The stopped rank itself cannot end.
        "stopped": [76, 76],
        "stopped_stage": [76],
        "own_failure": [76, 2, 76],
    }
    for name, found in endings.items():
        for ending in found:
            hung = name.startswith("stopped")
            assert ending["seconds"] > 60 * HANG_MINUTES / 2 if hung else True
            if ending["code"] == 76:
                assert "lost another rank after iteration" in ending["output"]
                assert "Traceback" not in ending["output"]
    own = endings["own_failure"][1]["output"]
    assert own.splitlines()[-1] == "error: sample 12 is damaged; mend it"
    assert "lost another rank" not in own
