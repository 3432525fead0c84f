"""kill -9 at random moments of training and saving: nothing is lost but time."""

from __future__ import annotations

import random
import time

import pytest

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
        started = time.monotonic()
        pause = moments.uniform(0.5, longest)
        while time.monotonic() - started < pause:
            time.sleep(0.01)
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
        interrupted += any(run.checkpoints.glob("iter_*.tmp"))
    assert run.start("save_interval=1", "async_save=true").wait() == 0
    assert run.losses == uninterrupted
    # The kills met runs that had got somewhere.
    assert max(reached) > 0
    # And some of them in the middle of a save.
    assert interrupted > 0
