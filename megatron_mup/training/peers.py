"""When another rank dies or hangs: what the collectives then raise, in words that help.

gloo and the store raise in the rank that waits. NCCL (``TORCH_NCCL_ASYNC_ERROR_HANDLING``, on by
default) instead ends the process from its own thread, with SIGABRT and a message, so that there is
nothing to translate.

An error of this rank itself is never renamed. Its process has to end promptly all the same, because
the other ranks only see that something is wrong when its connections close.
"""

from __future__ import annotations

import re
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch.distributed as dist

from megatron_mup.config import RunConfig
from megatron_mup.errors import MupError, PeerLostError
from megatron_mup.os_processes import end_now

FAREWELL_SECONDS = 20.0
"""How long a rank that failed may take to leave the process group (assumption)."""

_LOST = re.compile(
    r"connection closed by peer|connection reset|connection was likely closed|connection refused"
    r"|broken pipe|socket closed|timed out|timeout|waiting for clients"
    r"|ncclRemoteError|communicator was aborted",
    re.IGNORECASE,
)
"""Phrases of gloo's transport, of the store and of NCCL in torch 2.11."""


def is_lost_peer(error: BaseException) -> bool:
    """Whether an error, or what it was raised from, says that another rank is gone.

    A network error counts only if it comes from the collectives: gloo
    raises a bare RuntimeError with its source file in the text, the others a ``DistError``.
    """
    text = str(error)
    of_collectives = isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError) and "/gloo/" in text
    )
    if of_collectives and _LOST.search(text):
        return True
    return error.__cause__ is not None and is_lost_peer(error.__cause__)


def _own_failure(error: BaseException) -> BaseException | None:
    """The first error of this rank itself, during whose handling the connection broke."""
    context, first = error.__context__, None
    while context is not None:
        if not is_lost_peer(context):
            first = context
        context = context.__context__
    return first


class Whereabouts:
    """Where this rank is, for the message.

    Attributes:
        rank: global rank of this process.
        iteration: gives the number of finished iterations; None before the first step.
    """

    def __init__(self, rank: int) -> None:
        self.rank = rank
        self.iteration: Callable[[], int] | None = None


@contextmanager
def translate_lost_peers(run: RunConfig, rank: int | None = None) -> Iterator[Whereabouts]:
    """Turn what collectives raise when another rank is gone into a ``PeerLostError``.

    Args:
        run: the run's configuration, for the time limit.
        rank: global rank; unset asks the process group, which must exist then.

    Yields:
        The whereabouts that the message names; set ``iteration`` once steps are counted.

    Raises:
        PeerLostError: another rank died or hung.
    """
    here = Whereabouts(dist.get_rank() if rank is None else rank)
    try:
        yield here
    except Exception as error:
        if not is_lost_peer(error):
            raise
        own = _own_failure(error)
        if isinstance(own, MupError):
            raise own from None
        raise PeerLostError(_message(run, here, error, own)) from error


def _message(run: RunConfig, here: Whereabouts, error: Exception, own: BaseException | None) -> str:
    when, what = "before the first step", "died, hung or was never started"
    if here.iteration is not None:
        when, what = f"after iteration {here.iteration()}", "died or hung"
    lines = str(error).strip().splitlines()
    # Only a defect of this package can be meant, or something that upstream caught.
    also = "" if own is None else f" This came while handling {type(own).__name__}: {own}."
    return (
        f"rank {here.rank} lost another rank {when} ({lines[0].strip()}). Another rank {what}: the "
        f"first error in the logs of the other ranks says why.{also} If it was only slow, raise "
        "parallel.distributed_timeout_minutes, now "
        f"{run.parallel.distributed_timeout_minutes:g}. Start the run again to continue from its "
        "last checkpoint"
    )


@contextmanager
def prompt_farewell(error: BaseException, seconds: float = FAREWELL_SECONDS) -> Iterator[None]:
    """Leave the process group after an error, or end the process when that takes too long.

    Destroying a group can wait for collectives that will never finish.

    Args:
        error: why this rank ends; shown if the process is ended here.
        seconds: how long the block may take.
    """

    def give_up() -> None:
        sys.stderr.writelines(traceback.format_exception(error))
        sys.stderr.write(f"the process group was not left in {seconds:g} s: ending\n")
        end_now(error.exit_code if isinstance(error, MupError) else 1)

    timer = threading.Timer(seconds, give_up)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
