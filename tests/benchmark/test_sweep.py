"""The benchmark of sweeps: its options, its sweeps, what of their time counts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from megatron_mup.benchmark import sweep
from megatron_mup.benchmark.sweep import Settings, sweep_document
from megatron_mup.errors import ConfigError
from megatron_mup.transfer.sweep.cells import make_cells
from megatron_mup.transfer.sweep.session import RunRequest
from megatron_mup.transfer.sweep.spec import sweep_from_dict


def settings(**changes: Any) -> Settings:
    values: dict[str, Any] = {"widths": (64,), "workers": 2, "cells": 4, "steps": 5, "rounds": 2}
    return Settings(**{**values, **changes})


@pytest.mark.parametrize(
    ("changes", "option"),
    [
        ({"widths": (48,)}, "--width"),
        ({"workers": 1}, "--workers"),
        ({"cells": 3}, "--cells is 3; pass at least 4"),
        ({"steps": 0}, "--steps"),
        ({"rounds": 0}, "--rounds"),
    ],
)
def test_settings_that_measure_nothing_are_refused(changes: dict[str, Any], option: str) -> None:
    with pytest.raises(ConfigError, match=option):
        settings(**changes)


def test_the_command_line_repeats_the_settings() -> None:
    assert settings(widths=(64, 128)).command_line == (
        "python -m megatron_mup.benchmark.sweep --width 64 --width 128 --workers 2 --cells 4 "
        "--steps 5 --rounds 2"
    )


def test_a_sweep_has_the_runs_that_were_asked_for(tmp_path: Path) -> None:
    document = sweep_document(tmp_path, width=64, cells=5, steps=7)
    cells = make_cells(sweep_from_dict(document, origin="benchmark"), tmp_path)
    assert len({cell.log2_lr for cell in cells}) == 5
    assert {cell.run.training.train_iters for cell in cells} == {7}
    assert {cell.run.training.eval_iters for cell in cells} == {1}
    assert {cell.run.model.hidden_size for cell in cells} == {64}


def test_sweeps_take_turns_and_the_first_runs_do_not_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 0.0
    told: list[tuple[int, int]] = []
    monkeypatch.setattr(sweep, "cores_of_machine", lambda: 2)
    monkeypatch.setattr(sweep, "_shards", lambda folder: folder)
    monkeypatch.setattr(sweep.time, "monotonic", lambda: now)

    def run(request: RunRequest, echo: Any) -> int:
        nonlocal now
        share = request.share
        told.append((share.workers, share.threads))
        echo("4 of up to 4 runs are on record")
        # The workers start in 100 s; then four runs end, 4, 3 or 2 s apart.
        now += 100
        for _ in range(4):
            echo("[1 done")
            now += {(1, 1): 4, (1, 2): 3, (2, 1): 2}[share.workers, share.threads]
        return 0

    monkeypatch.setattr(sweep, "run_sweep", run)
    measured = sweep._measured(settings(), 64, tmp_path)
    assert told == [(1, 1), (1, 2), (2, 1), (1, 2), (2, 1), (1, 1), (1, 1)]
    assert measured.alone == (4.0, 4.0)
    assert measured.all_cores == (3.0, 3.0)
    assert measured.together == (2.0, 2.0)
    assert measured.overhead == 4.0
