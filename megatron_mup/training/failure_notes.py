"""What a rank notes of its own end for the launcher; see ``rank_outcomes``."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist

from megatron_mup import exit_codes
from megatron_mup.errors import MupError
from megatron_mup.rank_outcomes import tell_outcome
from megatron_mup.training.outcome import TrainResult
from megatron_mup.training.peers import is_lost_peer


def note_failure(rank: int, error: BaseException) -> None:
    """Note an error before this rank leaves the others, which it may not survive.

    Args:
        rank: global rank.
        error: what ends it.
    """
    # Ctrl-C and the like are nobody's failure.
    if not isinstance(error, Exception):
        return
    code = error.exit_code if isinstance(error, MupError) else 1
    if is_lost_peer(error):
        code = exit_codes.LOST_PEERS
    tell_outcome(rank, code, f"{type(error).__name__}: {error}")


@contextmanager
def noted_failure(rank: int) -> Iterator[None]:
    """Note whatever error ends the block.

    Args:
        rank: global rank.
    """
    try:
        yield
    except Exception as error:
        note_failure(rank, error)
        raise


def note_result(result: TrainResult) -> None:
    """Note the end of a run that no error ended, unless it is finished.

    Args:
        result: what the run did.
    """
    if result.exit_code:
        stopped = "" if result.stopped is None else result.stopped.words
        tell_outcome(dist.get_rank(), result.exit_code, result.save_failed or stopped or "bad step")
