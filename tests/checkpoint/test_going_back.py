"""``checkpoint.ckpt_step``: going back, restarting after it, and what it must not be taken for."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from megatron_mup.checkpoint.folders import TRACKER
from megatron_mup.errors import CheckpointError
from tests.checkpoint.short_runs import folders, losses, names, run_training
from tests.configurations import tiny

OPTIONS = ["lr_decay_iters=6", "save_interval=1"]


def went_back(root: Path) -> list[str]:
    """Train to 4, go back to 2 and train to 3; returns the options that went back."""
    run_training(tiny(*OPTIONS, "train_iters=4", *folders(root)))
    back = [*OPTIONS, "keep_last=2", "ckpt_step=2", *folders(root, load=True)]
    run_training(tiny(*back, "train_iters=3"))
    return back


def test_a_restart_of_a_run_that_went_back_continues_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run_training(tiny(*OPTIONS, "train_iters=4", *folders(tmp_path)))
    back = tiny(
        *OPTIONS, "train_iters=3", "keep_last=1", "ckpt_step=2", *folders(tmp_path, load=True)
    )
    assert [row["iteration"] for row in run_training(back).history] == [3.0]
    # Iteration 2 is gone by now, so going back to it again could not even be obeyed.
    assert names(tmp_path) == {"iter_0000003", "iter_0000004.abandoned", TRACKER}
    longer = replace(back, training=replace(back.training, train_iters=5))
    assert [row["iteration"] for row in run_training(longer).history] == [4.0, 5.0]
    assert "ckpt_step=2 was followed before: iteration 3 was saved after it" in caplog.text
    again = replace(back, training=replace(back.training, train_iters=6))
    assert [row["iteration"] for row in run_training(again).history] == [6.0]


@pytest.mark.parametrize("elsewhere", [["finetune=true"], []])
def test_another_run_gets_the_step_that_it_asks_for(tmp_path: Path, elsewhere: list[str]) -> None:
    went_back(tmp_path / "first")
    fresh = [*OPTIONS, "train_iters=4", f"save={tmp_path / 'second'}", *elsewhere]
    asked = run_training(tiny(*fresh, f"load={tmp_path / 'first'}", "ckpt_step=2"))
    # A finetuned run counts from 1 again.
    assert asked.history[0]["iteration"] == (1.0 if elsewhere else 3.0)
    rest = ["lr_decay_iters=6", "train_iters=4", *elsewhere]
    newest = run_training(tiny(*rest, f"load={tmp_path / 'first'}"))
    assert losses(asked)[0] != losses(newest)[0]


def test_a_changed_option_makes_it_a_new_request_which_is_not_guessed(tmp_path: Path) -> None:
    back = went_back(tmp_path)
    changed = tiny(*back, "train_iters=5", "lr=0.001", "override=[lr]")
    with pytest.raises(
        CheckpointError, match=r"iterations \[3\] were saved since.* once more, move"
    ):
        run_training(changed)
