"""20-step trajectories of the paper's own code, from presets by name, in one process."""

from __future__ import annotations

import pytest

from megatron_mup.training.processes import Launch, parallel_processes
from tests.training.trajectories import EXPECTED, check_against_the_paper, follow, preset_run


@pytest.mark.parametrize("experiment", list(EXPECTED))
def test_preset_reproduces_the_papers_own_trajectory(experiment: str) -> None:
    run = preset_run(experiment)
    with parallel_processes(run, Launch()):
        trajectory = follow(run, experiment)
    check_against_the_paper(experiment, [trajectory])
