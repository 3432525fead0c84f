"""kill -9 at random moments of training and saving: nothing is lost but time.

On one rank, and on two of which one may survive for a while.
"""

from __future__ import annotations

import os
import random
import signal
import time

import pytest

from megatron_mup import exit_codes
from tests.faults.command_line import Process, pause
from tests.faults.runs import Run

pytestmark = [pytest.mark.dist]

KILLS = 20
SEED = 20260101


def test_twenty_kills_at_random_moments_change_no_loss(
    run: Run, uninterrupted: dict[int, float]
) -> None:
    moments = random.Random(SEED)
    kills, longest = 0, 4.0
    reached, interrupted = [], 0
    while kills < KILLS:
        # Saving every step in the background: about half of the moments fall into a save.
        process = run.start("save_interval=1", "async_save=true", "keep_last=2")
        pause(moments.uniform(0.5, longest))
        code = process.kill()
        if code == 0:
            # It was done before it could be killed: the next start is a new run.
            assert run.losses == uninterrupted
            run = Run(run.starter, run.config, run.folder / "again")
            run.folder.mkdir()
            longest = max(1.0, 0.7 * longest)
            continue
        assert code == -9, process.text[-3000:]
        kills += 1
        reached.append(max(run.saved(), default=0))
        interrupted += run.being_saved()
    assert run.start("save_interval=1", "async_save=true").wait() == 0
    assert run.losses == uninterrupted
    # The kills met runs that had got somewhere.
    assert max(reached) > 0
    # And some of them in the middle of a save.
    assert interrupted > 0


SHARDED = "use_distributed_optimizer=true"
SAVING = ["save_interval=1", "async_save=true", "keep_last=2"]
VICTIMS = [(0, 1), (1,), (0,), (0, 1)]
"""Ranks that each kill hits."""
LIMIT_SECONDS = 60.0
"""Longest life of a rank that has lost the other."""


def test_kills_of_two_ranks_or_of_one_of_them_change_no_loss(run: Run) -> None:
    moments = random.Random(SEED)
    whole = Run(run.starter, run.config, run.folder / "whole")
    whole.folder.mkdir()
    assert [rank.wait() for rank in whole.start_ranks(2, SHARDED)] == [0, 0]
    interrupted = 0
    for victims in VICTIMS:
        target = run.begun() + moments.randint(1, 3)
        ranks = run.start_ranks(2, SHARDED, *SAVING)
        ranks[0].wait_until(lambda target=target: run.begun() >= target, f"save of {target}")
        pause(moments.uniform(0, 0.1))
        kill(ranks, victims)
        interrupted += run.being_saved()
    # The last start continues what the killed ones have saved, some of it in a hurry.
    assert run.saved()
    assert interrupted > 0
    assert [rank.wait() for rank in run.start_ranks(2, SHARDED)] == [0, 0]
    assert run.losses == whole.losses


def kill(ranks: list[Process], victims: tuple[int, ...]) -> None:
    """Kill ranks at once; the others must see it and end."""
    for victim in victims:
        os.killpg(ranks[victim].pid, signal.SIGKILL)
    killed = time.monotonic()
    expected = [-9 if rank in victims else exit_codes.LOST_PEERS for rank in range(len(ranks))]
    assert [rank.wait() for rank in ranks] == expected, ranks[0].text[-3000:]
    assert time.monotonic() - killed < LIMIT_SECONDS
